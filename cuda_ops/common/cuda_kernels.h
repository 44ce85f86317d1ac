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

#endif

}  // namespace timm_dynamic
