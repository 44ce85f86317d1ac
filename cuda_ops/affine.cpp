// The CPU kernel of timm_dynamic::affine_, which timm_dynamic/ops/affine.py defines.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "ddf_args.h"
#include "ddf_cpu.h"

namespace timm_dynamic {

struct Affine {
  int64_t C, positions;
  float low, high;
  const float *scale, *shift;
  float* y;
};

using AffineKernel = void (*)(const Affine&, int64_t begin, int64_t end);

}  // namespace timm_dynamic

#define KERNELS_HEADER "affine_cpu.h"
#include "cpu_dispatch.h"

namespace timm_dynamic {
namespace {

void affine_(Tensor y, const Tensor& scale, const Tensor& shift, double low, double high) {
  STD_TORCH_CHECK(y.dim() == 4 && y.is_contiguous() && y.scalar_type() == ScalarType::Float,
                  "y must be [B, C, H, W], float32 and contiguous, got ", shape_text(y));
  Affine op;
  op.C = y.size(1), op.positions = y.size(2) * y.size(3);
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  op.scale = parameter("scale", scale, op.C, y), op.shift = parameter("shift", shift, op.C, y);
  op.y = static_cast<float*>(y.mutable_data_ptr());
  const AffineKernel kernel = CHOOSE_KERNELS(affine_kernel());
  parallel(y.size(0) * op.C, op.positions / 4,
           [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) { m.impl("affine_", TORCH_BOX(&affine_)); }

}  // namespace timm_dynamic
