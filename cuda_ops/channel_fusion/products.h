// 1x1 convolutions of float32 NCHW maps as channel_fusion.cpp computes them, also for the operators
// of other files.
#pragma once

#include <cstdint>
#include <limits>

namespace timm_dynamic {

// out[b,o] = clamp(out_scale[b,o] * sum_c weight[o,c] in_scale[b,c] x[b,c] + sum_l p[o,l] v[b,l]
//                  + shift[b,o])
// Pointers may be null: scales of 1, no second convolution (L is 0 then), no shift. Strides between
// samples may be 0.
struct Products {
  int64_t B, C, O, L, positions, block, blocks, parts;
  const float *x, *weight, *in_scale, *out_scale, *p, *v, *shift;
  int64_t weight_stride, out_scale_stride, shift_stride;
  float low, high;
  float* out;
};

// The product alone, with one weight.
inline Products plain_products(int64_t B, int64_t C, int64_t O, int64_t positions, const float* x,
                               const float* weight, float* out) {
  Products op = {};
  op.B = B, op.C = C, op.O = O, op.positions = positions;
  op.x = x, op.weight = weight, op.out = out;
  op.low = -std::numeric_limits<float>::infinity(), op.high = -op.low;
  return op;
}

// `block`, `blocks` and `parts` are set here.
void run_products(Products op);

}  // namespace timm_dynamic
