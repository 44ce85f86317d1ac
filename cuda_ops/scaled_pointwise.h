// A 1x1 convolution with scaled inputs and outputs, and a second one added to it, of float32 NCHW
// maps; timm_dynamic/ops/scaled_pointwise.py defines the operators.
#pragma once

#include <cstdint>
#include <limits>

namespace timm_dynamic {

// out[b,o] = clamp(norm[o] * (out_scale[b,o] * sum_c weight[o,c] in_scale[b,c] x[b,c]
//                             + sum_l p[o,l] v[b,l]) + shift[b,o])
// Pointers may be null: scales of 1, no second convolution (L is 0 then), no shift. Strides between
// samples may be 0.
struct ScaledPointwise {
  int64_t B, C, O, L, positions, block, blocks, parts;
  const float *x, *weight, *in_scale, *out_scale, *p, *v, *norm, *shift;
  int64_t weight_stride, shift_stride;
  float low, high;
  float* out;
};

// The product alone, with one weight.
inline ScaledPointwise unlimited(int64_t B, int64_t C, int64_t O, int64_t positions, const float* x,
                                 const float* weight, float* out) {
  ScaledPointwise op = {};
  op.B = B, op.C = C, op.O = O, op.positions = positions;
  op.x = x, op.weight = weight, op.out = out;
  op.low = -std::numeric_limits<float>::infinity(), op.high = -op.low;
  return op;
}

// `block`, `blocks` and `parts` are set here.
void run_scaled_pointwise(ScaledPointwise op);

// With D_b = [grad_b; dz_b] [x_b; v_b]^T, over positions:
// dweight = sum_b scale_b D_b, dscale_b = sum_c weight D_b, dp = sum_b D_b, dq = sum_b D_b
// of its blocks (grad, x), (grad, x), (grad, v), (dz, x).
// dscale is [parts, B, O]: the parts are to be added.
struct ScaledPointwiseGrads {
  int64_t B, C, O, L, positions, parts, row_parts;
  const float *grad, *dz, *x, *v, *scale, *weight;
  float *dweight, *dscale, *dp, *dq;
};

}  // namespace timm_dynamic
