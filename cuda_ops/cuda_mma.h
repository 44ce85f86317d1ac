// Products of small matrices by the tensor cores, for CUDA kernels.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "cuda_kernels.h"

namespace timm_dynamic {

#ifdef __CUDACC__

// Adds to c, 16 x 8, the product of a, 16 x 16, and b, 16 x 8, of bfloat16 or float16; all 32 lanes
// of a warp take part. With g = lane / 4 and q = lane % 4 a lane has
//   a[0..3]  row g, g + 8, g, g + 8; of columns 2q and 2q + 1, the last two of 2q + 8 and 2q + 9
//   b[0..1]  column g; of rows 2q and 2q + 1, the last of 2q + 8 and 2q + 9
//   c[0..3]  row g, g, g + 8, g + 8; columns 2q, 2q + 1, 2q, 2q + 1
template <typename T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#  if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#  else  // tensor cores that do not know this product, or none
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const auto from = [](uint32_t bits, int lane) {
    bits = __shfl_sync(kAllLanes, bits, lane);
    const auto pair = reinterpret_cast<const T*>(&bits);
    return float2{float(pair[0]), float(pair[1])};
  };
#    pragma unroll 1
  for (int s = 0; s < 4; ++s) {
    const float2 rows[4] = {from(a[0], 4 * g + s), from(a[1], 4 * g + s), from(a[2], 4 * g + s),
                            from(a[3], 4 * g + s)};
    for (int j = 0; j < 2; ++j) {
      for (int half = 0; half < 2; ++half) {
        const float2 column = from(b[half], 4 * (2 * q + j) + s);
        for (int i = 0; i < 2; ++i) {
          const float2 row = rows[2 * half + i];
          c[2 * i + j] = fmaf(row.y, column.y, fmaf(row.x, column.x, c[2 * i + j]));
        }
      }
    }
  }
#  endif
}

#endif

}  // namespace timm_dynamic
