// The two 16-bit floating-point types: every operation rounds once, to the nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

namespace cuda_on_host {

struct HalfFormat {
  static unsigned short bits(float v) { return std::bit_cast<unsigned short>(_Float16(v)); }
  static float value(unsigned short v) { return std::bit_cast<_Float16>(v); }
};

struct BFloat16Format {
  static unsigned short bits(float v) {
    if (v != v) return 0x7fff;
    const unsigned all = std::bit_cast<unsigned>(v);
    return (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
  static float value(unsigned short v) { return std::bit_cast<float>(unsigned(v) << 16); }
};

template <typename Format>
struct alignas(2) Short {
  unsigned short x;

  Short() = default;
  template <typename T>
    requires std::is_arithmetic_v<T>
  Short(T v) : x(Format::bits(v)) {}
  operator float() const { return Format::value(x); }

  Short operator-() const { return -float(*this); }
  Short& operator+=(Short v) { return *this = float(*this) + float(v); }
  Short& operator-=(Short v) { return *this = float(*this) - float(v); }
  Short& operator*=(Short v) { return *this = float(*this) * float(v); }
  friend Short operator+(Short a, Short b) { return a += b; }
  friend Short operator-(Short a, Short b) { return a -= b; }
  friend Short operator*(Short a, Short b) { return a *= b; }
  friend Short operator/(Short a, Short b) { return float(a) / float(b); }
  friend bool operator==(Short a, Short b) { return float(a) == float(b); }
  friend bool operator<(Short a, Short b) { return float(a) < float(b); }
  friend bool operator>(Short a, Short b) { return float(a) > float(b); }
};

template <typename Format>
struct alignas(4) Short2 {
  Short<Format> x, y;

  friend Short2 operator+(Short2 a, Short2 b) { return {a.x + b.x, a.y + b.y}; }
  friend Short2 operator*(Short2 a, Short2 b) { return {a.x * b.x, a.y * b.y}; }
};

template <typename F>
float2 to_floats(Short2<F> v) {
  return {v.x, v.y};
}
template <typename F>
Short<F> fused(Short<F> a, Short<F> b, Short<F> c) {
  return float(double(float(a)) * float(b) + float(c));  // the product is exact in double
}

}  // namespace cuda_on_host

template <typename F>
cuda_on_host::Short2<F> __hadd2(cuda_on_host::Short2<F> a, cuda_on_host::Short2<F> b) {
  return a + b;
}
template <typename F>
cuda_on_host::Short2<F> __hmul2(cuda_on_host::Short2<F> a, cuda_on_host::Short2<F> b) {
  return a * b;
}
template <typename F>
cuda_on_host::Short<F> __hfma(cuda_on_host::Short<F> a, cuda_on_host::Short<F> b,
                              cuda_on_host::Short<F> c) {
  return cuda_on_host::fused(a, b, c);
}
template <typename F>
cuda_on_host::Short2<F> __hfma2(cuda_on_host::Short2<F> a, cuda_on_host::Short2<F> b,
                                cuda_on_host::Short2<F> c) {
  return {cuda_on_host::fused(a.x, b.x, c.x), cuda_on_host::fused(a.y, b.y, c.y)};
}
template <typename F>
float __low2float(cuda_on_host::Short2<F> v) {
  return v.x;
}
template <typename F>
float __high2float(cuda_on_host::Short2<F> v) {
  return v.y;
}
