// CPU kernels of timm_dynamic::scaled_pointwise and ::scaled_pointwise_grads, which
// timm_dynamic/ops/scaled_pointwise.py defines.

#include "scaled_pointwise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ddf_args.h"
#include "ddf_cpu.h"

namespace timm_dynamic {

constexpr int64_t kPacked = 1 << 16;  // elements of a block of positions, to stay in the cache

struct ScaledPointwiseKernels {
  void (*products)(const ScaledPointwise&, int64_t begin, int64_t end);
  void (*grads)(const ScaledPointwiseGrads&, int64_t begin, int64_t end);
  int64_t step, rows, lanes;  // positions that `block` is a multiple of; rows, columns at once
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "scaled_pointwise_cpu.h"
#include "cpu_dispatch.h"

namespace timm_dynamic {

void run_scaled_pointwise(ScaledPointwise op) {
  const ScaledPointwiseKernels kernels = CHOOSE_KERNELS(scaled_pointwise_kernels());
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

void check_maps(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(
      t.dim() == 4 && t.numel() > 0 && t.is_contiguous() && t.scalar_type() == ScalarType::Float,
      name, " must be [B, C, H, W], float32, contiguous and not empty, got ", shape_text(t));
}

Tensor scaled_pointwise(const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& in_scale,
                        const std::optional<Tensor>& out_scale, const std::optional<Tensor>& p,
                        const std::optional<Tensor>& v, const std::optional<Tensor>& shift,
                        double low, double high) {
  check_maps("x", x);
  STD_TORCH_CHECK(weight.dim() == 2 || weight.dim() == 3,
                  "weight must be [O, C] or [B, O, C], got ", shape_text(weight));
  const bool own = weight.dim() == 3;
  const int64_t B = x.size(0), C = x.size(1), O = weight.size(own);
  const Tensor out = empty(x, {B, O, x.size(2), x.size(3)});
  ScaledPointwise op =
      unlimited(B, C, O, x.size(2) * x.size(3), static_cast<const float*>(x.const_data_ptr()),
                parameter("weight", weight, (own ? B : 1) * O * C, x),
                static_cast<float*>(out.mutable_data_ptr()));
  op.weight_stride = own ? O * C : 0;
  op.in_scale = optional_parameter("in_scale", in_scale, op.B * op.C, x);
  op.out_scale = optional_parameter("out_scale", out_scale, op.B * op.O, x);
  STD_TORCH_CHECK(p.has_value() == v.has_value(), "p and v come together");
  if (p) {
    STD_TORCH_CHECK(p->dim() == 2, "p must be [O, L], got ", shape_text(*p));
    op.L = p->size(1);
    op.p = parameter("p", *p, op.O * op.L, x);
    op.v = parameter("v", *v, op.B * op.L * op.positions, x);
  }
  op.shift = optional_parameter("shift", shift, op.B * op.O, x), op.shift_stride = op.O;
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  run_scaled_pointwise(op);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scaled_pointwise_grads(const Tensor& grad,
                                                                  const Tensor& dz, const Tensor& x,
                                                                  const Tensor& v,
                                                                  const Tensor& scale,
                                                                  const Tensor& weight) {
  check_maps("x", x);
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be [O, C], got ", shape_text(weight));
  ScaledPointwiseGrads op = {};
  op.B = x.size(0), op.C = x.size(1), op.positions = x.size(2) * x.size(3), op.O = weight.size(0);
  op.L = v.numel() / (op.B * op.positions);
  op.x = static_cast<const float*>(x.const_data_ptr());
  op.grad = parameter("grad", grad, op.B * op.O * op.positions, x);
  op.dz = parameter("dz", dz, op.B * op.L * op.positions, x);
  op.v = parameter("v", v, op.B * op.L * op.positions, x);
  op.scale = parameter("scale", scale, op.B * op.O, x);
  op.weight = parameter("weight", weight, op.O * op.C, x);
  const ScaledPointwiseKernels kernels = CHOOSE_KERNELS(scaled_pointwise_kernels());
  const auto ceil_of = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t vectors = ceil_of(op.C, kernels.lanes) + ceil_of(op.L, kernels.lanes);
  op.parts = std::min<int64_t>(threads, ceil_of(vectors, 3));
  op.row_parts = std::clamp<int64_t>(threads / op.parts, 1, ceil_of(op.O, kernels.rows));
  const Tensor dweight = empty(x, {op.O, op.C}), parts = empty(x, {op.parts, op.B, op.O}),
               dp = empty(x, {op.O, op.L}), dq = empty(x, {op.L, op.C});
  const auto zeroed = [](const Tensor& t) {
    float* const data = static_cast<float*>(t.mutable_data_ptr());
    std::fill(data, data + t.numel(), 0.0f);
    return data;
  };
  op.dweight = zeroed(dweight), op.dscale = zeroed(parts), op.dp = zeroed(dp), op.dq = zeroed(dq);
  const int64_t units = op.parts * op.row_parts;
  parallel(units, op.B * op.O * op.C * op.positions / units / 8,
           [&](int64_t begin, int64_t end) { kernels.grads(op, begin, end); });
  const Tensor dscale = empty(x, {op.B, op.O});
  float* const to = static_cast<float*>(dscale.mutable_data_ptr());
  for (int64_t i = 0; i < op.B * op.O; ++i) {
    to[i] = 0;
    for (int64_t part = 0; part < op.parts; ++part) to[i] += op.dscale[part * op.B * op.O + i];
  }
  return {dweight, dscale, dp, dq};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("scaled_pointwise", TORCH_BOX(&scaled_pointwise));
  m.impl("scaled_pointwise_grads", TORCH_BOX(&scaled_pointwise_grads));
}

}  // namespace timm_dynamic
