// What the kernels of fused_conv_cuda.cu and fused_conv_cuda_grad.cu share: tiles for tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <mma.h>

#include <type_traits>

#include "fused_conv_cuda.h"

namespace timm_dynamic {

namespace wmma = nvcuda::wmma;

constexpr int kThreads = 256;
constexpr int kTile = 16;       // of a tensor core's product, in every direction
constexpr int kChunk = 8;       // elements of 16 bytes
constexpr int kSkew = 8;        // rows of tiles begin in different banks of shared memory
constexpr int kTileAlign = 32;  // in bytes: what loads of tiles want

using Sums = wmma::fragment<wmma::accumulator, kTile, kTile, kTile, float>;

// Begins to copy 16 bytes to shared memory, zeros if not `inside`.
template <typename T>
__device__ void copy_chunk(T* to, const T* from, bool inside) {
  __pipeline_memcpy_async(to, from, 16, inside ? 0 : 16);
}

// To the nearest. Torch compiles without the types' own conversions.
template <typename T>
__device__ T rounded(float value) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(value);
  else
    return __float2bfloat16_rn(value);
}

template <typename F>
void dispatch_half(Dtype dtype, F f) {
  if (dtype == Dtype::kBFloat16) return f.template operator()<__nv_bfloat16>();
  f.template operator()<__half>();
}

}  // namespace timm_dynamic
