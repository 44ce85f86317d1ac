// What CUDA's header of this name declares, as far as the kernels here use it; see cuda_runtime.h.
#pragma once

#include "cuda_16bit.h"

using __half = cuda_on_host::Short<cuda_on_host::HalfFormat>;
using half = __half;

inline __half __float2half_rn(float v) { return __half::rounded(v); }
