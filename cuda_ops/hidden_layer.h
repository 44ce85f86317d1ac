// What operators share that make a hidden vector of the average-pooled input:
// hidden = relu(weight . mean(x) + bias).
#pragma once

#include <cstdint>

#include "ddf_args.h"
#include "ddf_cpu.h"

namespace timm_dynamic {

struct HiddenLayer {
  int64_t B, C, positions, hidden_size;
  const float *x, *hidden_weight, *hidden_bias;
  float *pooled, *hidden;
};

struct HiddenLayerKernels {
  using Kernel = void (*)(const HiddenLayer&, int64_t begin, int64_t end);
  Kernel pool, hidden_layer;
};

inline void check_input(const Tensor& x) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.numel() > 0 && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
      "x must be [B, C, H, W], float32, contiguous and not empty, got ", shape_text(x));
}

// Fills `op` and runs it; what is returned is its memory.
inline Tensor run_hidden_layer(HiddenLayer& op, const HiddenLayerKernels& kernels, const Tensor& x,
                               const Tensor& weight, const Tensor& bias) {
  check_input(x);
  op.B = x.size(0), op.C = x.size(1), op.positions = x.size(2) * x.size(3);
  op.hidden_size = bias.numel();
  op.x = static_cast<const float*>(x.const_data_ptr());
  op.hidden_weight = parameter("hidden_weight", weight, op.hidden_size * op.C, x);
  op.hidden_bias = parameter("hidden_bias", bias, op.hidden_size, x);
  const Tensor scratch = empty(x, {op.B * (op.C + op.hidden_size)});
  op.pooled = static_cast<float*>(scratch.mutable_data_ptr());
  op.hidden = op.pooled + op.B * op.C;
  const auto run = [&](int64_t units, int64_t work, HiddenLayerKernels::Kernel kernel) {
    parallel(units, work, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
  };
  run(op.B * op.C, op.positions, kernels.pool);
  run(op.hidden_size, op.B * op.C, kernels.hidden_layer);
  return scratch;
}

}  // namespace timm_dynamic
