// What all CUDA kernels share. Plain CUDA C++, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace timm_dynamic {

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {  // loaded and stored by one instruction
  T at[V];
};

// Every kernel is launched through this, a function and no syntax of nvcc's: tests compile the
// kernels with g++ (tests/cuda_on_host). Errors are left to cudaGetLastError().
template <typename... P, typename... A>
void run_kernel(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                cudaStream_t stream, A&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
}

// Sums values[0..N) over groups of `lanes` >= N adjacent lanes: lane l of a group returns sum
// l / (lanes / N). Each exchange halves the values a lane carries, so that the sums together cost
// N - 1 + log2(lanes / N) shuffles.
template <int N>
__device__ float lane_sums(float (&values)[N], int lanes) {
  int offset = lanes / 2;
#  pragma unroll
  for (int n = N / 2; n >= 1; n /= 2, offset /= 2) {
    const bool upper = threadIdx.x & offset;
#  pragma unroll
    for (int i = 0; i < n; ++i) {
      const float keep = upper ? values[i + n] : values[i];
      const float give = upper ? values[i] : values[i + n];
      values[i] = keep + __shfl_xor_sync(kAllLanes, give, offset);
    }
  }
  for (; offset >= 1; offset /= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
  return values[0];
}

#endif

}  // namespace timm_dynamic
