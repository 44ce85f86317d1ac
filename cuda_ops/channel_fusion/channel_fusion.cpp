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

using Pair = std::vector<int64_t>;

// With a mixture of kernels, [N, O, C, Kh, Kw], for every sample; or of cells, [N, cell_outputs,
// cell_inputs], with an attention [B, Kh, Kw, outputs, inputs, N].
Tensor mixtures(const Tensor& x, const Tensor& kernels, const std::optional<Tensor>& attention,
                const std::optional<Tensor>& pairs, const std::optional<Tensor>& a_out,
                const std::optional<Tensor>& shift, double low, double high, const Pair& stride,
                const Pair& padding, const Pair& dilation) {
  Mixtures op = {};
  op.B = x.size(0), op.C = x.size(1), op.H = x.size(2), op.W = x.size(3);
  op.N = kernels.size(0);
  const bool cells = kernels.dim() == 3;
  if (cells) {
    STD_TORCH_CHECK(attention->dim() == 6 && attention->size(4) * kernels.size(2) == op.C,
                    "of cells ", shape_text(kernels), " the attention must be [", op.B,
                    ", Kh, Kw, outputs, inputs, ", op.N, "] with ", op.C,
                    " channels in the inputs' cells, got ", shape_text(*attention));
    op.cell_outputs = kernels.size(1), op.cell_inputs = kernels.size(2);
    op.O = attention->size(3) * op.cell_outputs;
    op.Kh = attention->size(1), op.Kw = attention->size(2);
  } else {
    op.O = kernels.size(1), op.Kh = kernels.size(3), op.Kw = kernels.size(4);
    STD_TORCH_CHECK(kernels.size(2) == op.C && (attention || op.N == 1), "kernels must be [N, O, ",
                    op.C, ", Kh, Kw], one or with an attention, got ", shape_text(kernels));
  }
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation are pairs");
  op.stride_y = stride[0], op.stride_x = stride[1];
  op.padding_y = padding[0], op.padding_x = padding[1];
  op.dilation_y = dilation[0], op.dilation_x = dilation[1];
  op.Ho = (op.H + 2 * op.padding_y - op.dilation_y * (op.Kh - 1) - 1) / op.stride_y + 1;
  op.Wo = (op.W + 2 * op.padding_x - op.dilation_x * (op.Kw - 1) - 1) / op.stride_x + 1;
  STD_TORCH_CHECK(op.Ho > 0 && op.Wo > 0, "x ", shape_text(x), " is too small for kernels ",
                  shape_text(kernels));
  op.channels_last = cells || !x.is_contiguous();
  STD_TORCH_CHECK(!cells || is_dense_channels_last(x), "x must be channels_last");
  const Tensor out = empty(x, {op.B, op.O, op.Ho, op.Wo}, op.channels_last);
  op.x = floats(x), op.out = mutable_floats(out);
  op.kernels = parameter("weight", kernels, kernels.numel(), x);
  const int64_t blocks = cells ? op.O * op.whole_depth() / (kernels.numel() / op.N) : 1;
  op.attention = optional_parameter("attention", attention, op.B * blocks * op.N, x);
  op.pairs = optional_parameter("in_scale", pairs, op.B * op.whole_depth(), x);
  const auto rows_of = [&](const std::optional<Tensor>& t) {  // one for all samples, or for each
    return t && t->dim() == 2 && t->size(0) == 1 ? 1 : op.B;
  };
  op.a_out = optional_parameter("out_scale", a_out, rows_of(a_out) * op.O, x);
  op.a_out_stride = rows_of(a_out) == 1 ? 0 : op.O;
  op.shift = optional_parameter("shift", shift, rows_of(shift) * op.O, x);
  op.shift_stride = rows_of(shift) == 1 ? 0 : op.O;
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  run_mixtures(op);
  return out;
}

Tensor channel_fusion(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& attention,
                      const std::optional<Tensor>& in_scale, const std::optional<Tensor>& out_scale,
                      const std::optional<Tensor>& p, const std::optional<Tensor>& v,
                      const std::optional<Tensor>& shift, double low, double high,
                      const Pair& stride, const Pair& padding, const Pair& dilation) {
  const bool mixes = weight.dim() == 5 || (weight.dim() == 3 && attention);
  check_maps("x", x, mixes);
  if (mixes)
    return mixtures(x, weight, attention, in_scale, out_scale, shift, low, high, stride, padding,
                    dilation);
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
