// What CUDA's header of this name declares, as far as the kernels here use it; see cuda_runtime.h.
#pragma once

#include "cuda_16bit.h"

using __nv_bfloat16 = cuda_on_host::Short<cuda_on_host::BFloat16Format>;

inline float __bfloat162float(__nv_bfloat16 v) { return v; }  // torch's BFloat16.h asks for this
