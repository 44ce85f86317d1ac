// How CPU kernels share work among threads, and which types they are compiled for.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace timm_dynamic {

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Runs f(begin, end) over [0, units), `work` multiplications each, on as many threads as pay.
template <typename F>
inline void parallel(int64_t units, int64_t work, const F& f) {
  constexpr int64_t kWorkPerThread = 1 << 16;
  torch::stable::parallel_for(0, units, std::max<int64_t>(1, kWorkPerThread / (work + 1)), f);
}

// Calls f(T()) with the dtype's C++ type.
template <typename F>
void dispatch(torch::headeronly::ScalarType dtype, const F& f) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Double) return f(double());
  if (dtype == ScalarType::Float) return f(float());
  if (dtype == ScalarType::BFloat16) return f(c10::BFloat16());
  return f(c10::Half());
}

}  // namespace timm_dynamic
