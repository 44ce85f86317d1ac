// What the CUDA kernels of sparse execution (cuda_*.cu) share.
//
// Most walk over rows, lists of which say where to read or write. A group of adjacent threads, the
// lanes, works on kRows rows at a time, such that so many loads are under way.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "sparse/cuda_calls.h"

namespace timm_dynamic {

constexpr int kThreads = 256;
constexpr int kRows = 4;

// The fewest lanes that load a row of `loads` at once, all of a warp if none do.
inline int lanes_for(int loads, int least = 1) {
  int lanes = kWarp;
  while (lanes > least && lanes / 2 >= loads) lanes /= 2;
  return lanes;
}

inline unsigned blocks_for(int64_t items, int of_block = kThreads) {
  return ceil_div(items, of_block);
}

// How many elements are 16 bytes.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

// Calls f.operator()<T>() for float32, bfloat16 or float16.
template <typename F>
void dispatch(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) return f.template operator()<float>();
  if (dtype == Dtype::kBFloat16) return f.template operator()<torch::headeronly::BFloat16>();
  f.template operator()<torch::headeronly::Half>();
}

}  // namespace timm_dynamic
