// What the CUDA kernels of sparse execution (sparse_cuda*.cu) share.
//
// Most walk over rows, lists of which say where to read or write. A group of adjacent threads, the
// lanes, works on kRows rows at a time, such that so many loads are under way.
#pragma once

#include "cuda_dtypes.h"
#include "sparse_cuda.h"

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

}  // namespace timm_dynamic
