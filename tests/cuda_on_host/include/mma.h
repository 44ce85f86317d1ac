// What CUDA's header of this name declares: fragments of 16x16x16, 32x8x16 and 8x32x16 products.
// The lanes of a warp share a matrix; which lane holds which elements is our own choice, as it is
// each GPU's.
#pragma once

#include <source_location>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
  static constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;
  static constexpr int num_elements = rows * columns / warpSize;
  using element_type = T;
  using storage_element_type = T;
  T x[num_elements];

  // The place in the matrix, counted row by row, of element i of a lane.
  static int place(int lane, int i) {
    return (i * 37 % num_elements) * warpSize + (lane * 5 + i) % warpSize;
  }
};

template <typename Fragment, typename T>
void fill_fragment(Fragment& to, const T& value) {
  for (auto& x : to.x) x = value;
}

namespace on_host {

inline void check(const std::source_location& site, const void* at, unsigned stride, size_t size) {
  if (reinterpret_cast<uintptr_t>(at) % 32 != 0)
    cuda_on_host::fail(site, "a matrix not aligned to 32 bytes");
  if (stride * size % 16 != 0)
    cuda_on_host::fail(site, "a leading dimension that is no multiple of 16 bytes");
}

// Meets the other lanes. Memory is read or written before by some and after by others: a fragment's
// functions are no substitute for __syncwarp().
template <typename F>
void around_meeting(const std::source_location& site, F f) {
  const bool early = cuda_on_host::coin();
  if (early) f();
  __syncwarp(0xffffffffu, site);
  if (!early) f();
}

template <typename Fragment, typename F>
void each_element(bool by_rows, unsigned stride, F f) {
  for (int i = 0; i < Fragment::num_elements; ++i) {
    const int place = Fragment::place(cuda_on_host::lane(), i);
    const int row = place / Fragment::columns, column = place % Fragment::columns;
    f(i, by_rows ? row * stride + column : column * stride + row);
  }
}

inline float value(float v) { return v; }
template <typename T>
float value(T v) {
  return v.value();
}

}  // namespace on_host

template <typename Use, int M, int N, int K, typename T, typename Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& to, const T* from, unsigned stride,
                      const std::source_location& site = std::source_location::current()) {
  static_assert(!std::is_void_v<Layout>, "an accumulator is loaded with its layout");
  on_host::check(site, from, stride, sizeof(T));
  on_host::around_meeting(site, [&] {
    on_host::each_element<fragment<Use, M, N, K, T, Layout>>(
        std::is_same_v<Layout, row_major>, stride, [&](int i, unsigned at) { to.x[i] = from[at]; });
  });
}

template <int M, int N, int K, typename T>
void load_matrix_sync(fragment<accumulator, M, N, K, T>& to, const T* from, unsigned stride,
                      layout_t layout,
                      const std::source_location& site = std::source_location::current()) {
  on_host::check(site, from, stride, sizeof(T));
  on_host::around_meeting(site, [&] {
    on_host::each_element<fragment<accumulator, M, N, K, T>>(
        layout == mem_row_major, stride, [&](int i, unsigned at) { to.x[i] = from[at]; });
  });
}

template <int M, int N, int K, typename T>
void store_matrix_sync(T* to, const fragment<accumulator, M, N, K, T>& from, unsigned stride,
                       layout_t layout,
                       const std::source_location& site = std::source_location::current()) {
  on_host::check(site, to, stride, sizeof(T));
  on_host::around_meeting(site, [&] {
    on_host::each_element<fragment<accumulator, M, N, K, T>>(
        layout == mem_row_major, stride, [&](int i, unsigned at) { to[at] = from.x[i]; });
  });
}

template <int M, int N, int K, typename T, typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, M, N, K, float>& d,
              const fragment<matrix_a, M, N, K, T, LayoutA>& a,
              const fragment<matrix_b, M, N, K, T, LayoutB>& b,
              const fragment<accumulator, M, N, K, float>& c,
              const std::source_location& site = std::source_location::current()) {
  static_assert(K == 16 && ((M == 16 && N == 16) || (M == 32 && N == 8) || (M == 8 && N == 32)));
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  using A = fragment<matrix_a, M, N, K, T, LayoutA>;
  using B = fragment<matrix_b, M, N, K, T, LayoutB>;
  using C = fragment<accumulator, M, N, K, float>;
  struct Own {
    const A* a;
    const B* b;
    const C* c;
    C* d;
  } own{&a, &b, &c, &d};
  cuda_on_host::converge(site, 0xffffffffu, &own, [](void* const* lanes) {
    float a[M * K], b[K * N], sums[M * N];
    const auto each = [&](auto f) {
      for (int lane = 0; lane < warpSize; ++lane)
        if (lanes[lane]) f(lane, *static_cast<Own*>(lanes[lane]));
    };
    each([&](int lane, const Own& own) {
      for (int i = 0; i < A::num_elements; ++i) a[A::place(lane, i)] = on_host::value(own.a->x[i]);
      for (int i = 0; i < B::num_elements; ++i) b[B::place(lane, i)] = on_host::value(own.b->x[i]);
      for (int i = 0; i < C::num_elements; ++i) sums[C::place(lane, i)] = own.c->x[i];
    });
    for (int m = 0; m < M; ++m)
      for (int k = 0; k < K; ++k)
        for (int n = 0; n < N; ++n) sums[m * N + n] += a[m * K + k] * b[k * N + n];
    each([&](int lane, const Own& own) {
      for (int i = 0; i < C::num_elements; ++i) own.d->x[i] = sums[C::place(lane, i)];
    });
  });
}

}  // namespace nvcuda::wmma
