// The types that most CUDA kernels are compiled for.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda_kernels.h"

namespace timm_dynamic {

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
