// What CUDA's header of this name declares, as far as the kernels here use it; see cuda_runtime.h.
#pragma once

#include "cuda_16bit.h"

using __half = cuda_on_host::Short<cuda_on_host::HalfFormat>;
using __half2 = cuda_on_host::Short2<cuda_on_host::HalfFormat>;
using half = __half;
using half2 = __half2;

inline __half __float2half(float v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline float __half2float(__half v) { return v; }
inline short __half_as_short(__half v) { return v.x; }
inline unsigned short __half_as_ushort(__half v) { return v.x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half v) { return {v, v}; }
inline __half2 __float2half2_rn(float v) { return {v, v}; }
inline float2 __half22float2(__half2 v) { return cuda_on_host::to_floats(v); }
