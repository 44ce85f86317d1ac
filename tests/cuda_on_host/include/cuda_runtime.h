// What CUDA's header of this name declares, as far as the kernels here use it, for g++: kernels run
// on the CPU, see
// ../runtime.h. A thread is a fiber, __shared__ memory a static variable, for one block runs at a
// time.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __constant__ const
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;  // of the fiber that runs
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetLastError();
cudaError_t cudaSetDevice(int);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_on_host {

using Site = std::source_location;

struct Body {  // what every thread runs
  const void* kernel;
  void (*run)(const void* arguments);
  const void* arguments;
  size_t bytes;  // of `arguments`
};
cudaError_t launch(const cudaLaunchConfig_t& config, const Body& body);

void* dynamic_shared();

int block_barrier(const Site& site, int predicate = 0);  // the number of threads with a predicate

// Waits for all lanes of `mask`; the last one calls complete(lanes) before any goes on. lanes[i] is
// what lane i gave as `own`, null for one that is not in the mask or has returned from the kernel.
using Complete = void (*)(void* const* lanes);
void converge(const Site& site, unsigned mask, void* own, Complete complete);

int lane();

// What `from` of this warp gave as `value`.
template <typename T>
T shuffle(const Site& site, unsigned mask, T value, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2);
  struct Own {
    T give, got;
    int from;
  } own{value, {}, from};
  converge(site, mask, &own, [](void* const* lanes) {
    for (int i = 0; i < warpSize; ++i) {
      if (!lanes[i]) continue;
      Own& own = *static_cast<Own*>(lanes[i]);
      std::memset(&own.got, 0xff, sizeof(T));  // undefined on a GPU
      if (lanes[own.from]) own.got = static_cast<Own*>(lanes[own.from])->give;
    }
  });
  return own.got;
}

}  // namespace cuda_on_host

#define SITE const cuda_on_host::Site& site = cuda_on_host::Site::current()

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... args) {
  struct Arguments {
    void (*kernel)(P...);
    std::tuple<P...> values;
  };
  const Arguments all{kernel, std::tuple<P...>(std::forward<A>(args)...)};
  const auto run = [](const void* arguments) {
    const auto& all = *static_cast<const Arguments*>(arguments);
    std::apply(all.kernel, all.values);
  };
  return cuda_on_host::launch(*config,
                              {reinterpret_cast<const void*>(kernel), run, &all, sizeof all});
}

inline void __syncthreads(SITE) { cuda_on_host::block_barrier(site); }
inline int __syncthreads_count(int p, SITE) { return cuda_on_host::block_barrier(site, p != 0); }
inline int __syncthreads_or(int p, SITE) { return cuda_on_host::block_barrier(site, p != 0) > 0; }
inline int __syncthreads_and(int p, SITE) { return cuda_on_host::block_barrier(site, p == 0) == 0; }
inline void __syncwarp(unsigned mask, SITE) {
  int none;
  cuda_on_host::converge(site, mask, &none, [](void* const*) {});
}
inline void __syncwarp(SITE) { __syncwarp(0xffffffffu, site); }

// The lane to read from, or this one where that lies outside its group of `width`.
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize, SITE) {
  const int first = cuda_on_host::lane() & -width;
  return cuda_on_host::shuffle(site, mask, value, first + (from & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, SITE) {
  const int own = cuda_on_host::lane(), from = own ^ bits;
  return cuda_on_host::shuffle(site, mask, value, from < (own & -width) + width ? from : own);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SITE) {
  const int own = cuda_on_host::lane(), from = own - int(delta);
  return cuda_on_host::shuffle(site, mask, value, from >= (own & -width) ? from : own);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SITE) {
  const int own = cuda_on_host::lane(), from = own + int(delta);
  return cuda_on_host::shuffle(site, mask, value, from < (own & -width) + width ? from : own);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SITE) {
  struct Own {
    bool give;
    unsigned got;
  } own{predicate != 0, 0};
  cuda_on_host::converge(site, mask, &own, [](void* const* lanes) {
    unsigned bits = 0;
    for (int i = 0; i < warpSize; ++i)
      bits |= unsigned(lanes[i] && static_cast<Own*>(lanes[i])->give) << i;
    for (int i = 0; i < warpSize; ++i)
      if (lanes[i]) static_cast<Own*>(lanes[i])->got = bits;
  });
  return own.got;
}
inline int __any_sync(unsigned mask, int predicate, SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SITE) {
  return __ballot_sync(mask, !predicate, site) == 0;
}
#undef SITE

inline int __popc(unsigned v) { return std::popcount(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

template <typename T>
T __ldg(const T* at) {
  return *at;
}
