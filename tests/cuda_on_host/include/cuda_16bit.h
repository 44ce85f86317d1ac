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

}  // namespace cuda_on_host
