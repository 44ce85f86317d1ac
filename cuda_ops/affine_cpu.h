// A norm in eval mode and a clamp, in place, for one instruction set; see cpu_vectors.h for what
// the includer defines, and affine.cpp for the operator.

#include "cpu_vectors.h"

namespace timm_dynamic::ISA {

// Units are maps.
inline void affine(const Affine& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float scale = op.scale[i % op.C], shift = op.shift[i % op.C];
    float* const y = op.y + i * op.positions;
    for (int64_t j = 0; j < op.positions; ++j)  // in this order NaN stays NaN
      y[j] = std::min(std::max(scale * y[j] + shift, op.low), op.high);
  }
}

inline AffineKernel affine_kernel() { return affine; }

}  // namespace timm_dynamic::ISA
