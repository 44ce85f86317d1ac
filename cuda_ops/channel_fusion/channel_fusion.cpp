// CPU kernels of timm_dynamic::channel_fusion and ::channel_fusion_backward, which
// timm_dynamic/ops/channel_fusion defines.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "channel_fusion/mixtures.h"
#include "channel_fusion/products.h"
#include "common/arguments.h"
#include "common/parallel.h"

namespace timm_dynamic {

constexpr int64_t kPacked = 1 << 16;  // elements of a block of positions, to stay in the cache

// With D_b = [grad_b; dz_b] [x_b; v_b]^T, over positions:
// dweight = sum_b scale_b D_b, dscale_b = sum_c weight D_b, dp = sum_b D_b, dq = sum_b D_b
// of its blocks (grad, x), (grad, x), (grad, v), (dz, x).
// dscale is [parts, B, O]: the parts are to be added.
struct ProductGrads {
  int64_t B, C, O, L, positions, parts, row_parts;
  const float *grad, *dz, *x, *v, *scale, *weight;
  float *dweight, *dscale, *dp, *dq;
};

struct ProductKernels {
  void (*products)(const Products&, int64_t begin, int64_t end);
  void (*grads)(const ProductGrads&, int64_t begin, int64_t end);
  int64_t step, rows, lanes;  // positions that `block` is a multiple of; rows, columns at once
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "channel_fusion/product_kernels.h"
#include "common/dispatch.h"

namespace timm_dynamic {

void run_products(Products op) {
  const ProductKernels kernels = CHOOSE_KERNELS(product_kernels());
  const int64_t depth = op.C + op.L;
  const int64_t whole = (op.positions + kernels.step - 1) / kernels.step * kernels.step;
  op.block = depth * op.positions <= kPacked
                 ? whole
                 : std::clamp(kPacked / depth / kernels.step * kernels.step, kernels.step, whole);
  op.blocks = (op.positions + op.block - 1) / op.block;
  // Few blocks of positions: the outputs are divided too.
  op.parts = std::clamp<int64_t>(4 / (op.B * op.blocks), 1, op.O);
  parallel(op.B * op.blocks * op.parts, op.O * depth * op.block / op.parts / 8,
           [&](int64_t begin, int64_t end) { kernels.products(op, begin, end); });
}

namespace {

Tensor channel_fusion(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& attention,
                      const std::optional<Tensor>& in_scale, const std::optional<Tensor>& out_scale,
                      const std::optional<Tensor>& p, const std::optional<Tensor>& v,
                      const std::optional<Tensor>& shift, double low, double high,
                      const Pair& stride, const Pair& padding, const Pair& dilation) {
  const bool mixes = weight.dim() == 5 || (weight.dim() == 3 && attention);
  check_maps("x", x, mixes);
  STD_TORCH_CHECK(weight.dim() != 5 || weight.size(2) == x.size(1), "kernels must be [N, O, ",
                  x.size(1), ", Kh, Kw], got ", shape_text(weight));
  if (mixes)
    return mixed_convolution(x, weight, attention, in_scale, out_scale, shift, low, high, stride,
                             padding, dilation);
  const bool one = weight.dim() == 2;
  const int64_t B = x.size(0), C = x.size(1), positions = x.size(2) * x.size(3);
  STD_TORCH_CHECK(
      one ? weight.size(1) == C : weight.dim() == 3 && weight.size(0) == B && weight.size(2) == C,
      "weight must be [O, C], or [", B, ", O, C] for x ", shape_text(x), ", got ",
      shape_text(weight));
  const int64_t O = weight.size(one ? 0 : 1);
  const Tensor out = empty(x, {B, O, x.size(2), x.size(3)});
  Products op = plain_products(B, C, O, positions, floats(x),
                               parameter("weight", weight, weight.numel(), x), mutable_floats(out));
  op.weight_stride = one ? 0 : O * C;
  op.in_scale = optional_parameter("in_scale", in_scale, B * C, x);
  op.out_scale = optional_parameter("out_scale", out_scale, B * O, x), op.out_scale_stride = O;
  STD_TORCH_CHECK(p.has_value() == v.has_value(), "p and v come together");
  if (p) {
    STD_TORCH_CHECK(p->dim() == 2, "p must be [O, L], got ", shape_text(*p));
    op.L = p->size(1);
    op.p = parameter("p", *p, O * op.L, x);
    op.v = parameter("v", *v, B * op.L * positions, x);
  }
  if (shift) {
    const bool shared = shift->dim() == 2 && shift->size(0) == 1;
    op.shift = parameter("shift", *shift, (shared ? 1 : B) * O, x);
    op.shift_stride = shared ? 0 : O;
  }
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  run_products(op);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> channel_fusion_backward(const Tensor& grad,
                                                                   const Tensor& dz,
                                                                   const Tensor& x, const Tensor& v,
                                                                   const Tensor& scale,
                                                                   const Tensor& weight) {
  check_maps("x", x);
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be [O, C], got ", shape_text(weight));
  ProductGrads op = {};
  op.B = x.size(0), op.C = x.size(1), op.positions = x.size(2) * x.size(3), op.O = weight.size(0);
  op.L = v.numel() / (op.B * op.positions);
  op.x = floats(x);
  op.grad = parameter("grad", grad, op.B * op.O * op.positions, x);
  op.dz = parameter("dz", dz, op.B * op.L * op.positions, x);
  op.v = parameter("v", v, op.B * op.L * op.positions, x);
  op.scale = parameter("scale", scale, op.B * op.O, x);
  op.weight = parameter("weight", weight, op.O * op.C, x);
  const ProductKernels kernels = CHOOSE_KERNELS(product_kernels());
  const auto ceil_of = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t vectors = ceil_of(op.C, kernels.lanes) + ceil_of(op.L, kernels.lanes);
  op.parts = std::min<int64_t>(threads, ceil_of(vectors, 3));
  op.row_parts = std::clamp<int64_t>(threads / op.parts, 1, ceil_of(op.O, kernels.rows));
  const Tensor dweight = empty(x, {op.O, op.C}), parts = empty(x, {op.parts, op.B, op.O}),
               dp = empty(x, {op.O, op.L}), dq = empty(x, {op.L, op.C});
  const auto zeroed = [](const Tensor& t) {
    float* const data = mutable_floats(t);
    std::fill(data, data + t.numel(), 0.0f);
    return data;
  };
  op.dweight = zeroed(dweight), op.dscale = zeroed(parts), op.dp = zeroed(dp), op.dq = zeroed(dq);
  const int64_t units = op.parts * op.row_parts;
  parallel(units, op.B * op.O * op.C * op.positions / units / 8,
           [&](int64_t begin, int64_t end) { kernels.grads(op, begin, end); });
  const Tensor dscale = empty(x, {op.B, op.O});
  float* const to = mutable_floats(dscale);
  for (int64_t i = 0; i < op.B * op.O; ++i) {
    to[i] = 0;
    for (int64_t part = 0; part < op.parts; ++part) to[i] += op.dscale[part * op.B * op.O + i];
  }
  return {dweight, dscale, dp, dq};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("channel_fusion", TORCH_BOX(&channel_fusion));
  m.impl("channel_fusion_backward", TORCH_BOX(&channel_fusion_backward));
}

}  // namespace timm_dynamic
