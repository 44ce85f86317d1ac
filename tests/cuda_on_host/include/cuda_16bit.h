// The two 16-bit floating-point types; rounded to the nearest, ties to even.
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

// Neither conversions nor operators: torch compiles without them (__CUDA_NO_HALF_CONVERSIONS__ and
// the like).
template <typename Format>
struct alignas(2) Short {
  unsigned short x;

  static Short rounded(float v) { return {Format::bits(v)}; }
  float value() const { return Format::value(x); }
};

}  // namespace cuda_on_host
