// What CUDA's header of this name declares, as far as the kernels here use it; see cuda_runtime.h.
#pragma once

#include "cuda_16bit.h"

using __nv_bfloat16 = cuda_on_host::Short<cuda_on_host::BFloat16Format>;

inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16::rounded(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return v.value(); }  // for torch's BFloat16.h
