// CPU kernels of timm_dynamic::dcd_branch_, ::dcd_pointwise and ::dcd_sample_weights;
// timm_dynamic/ops/dcd_branch.py defines the operators.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_pointwise_args.h"
#include "ddf_args.h"
#include "ddf_cpu.h"
#include "scaled_pointwise.h"

namespace timm_dynamic {

// A batch norm in eval mode: slope * z + offset.
struct AffineNorm {
  const float *weight, *bias, *mean, *variance;
  double eps;

  float slope(int64_t l) const {
    return weight[l] / std::sqrt(variance[l] + static_cast<float>(eps));
  }
  float offset(int64_t l) const { return bias[l] - mean[l] * slope(l); }
};

struct DcdBranch {
  int64_t B, O, hidden, pool_size, pooled_size, taps;
  Pointwise q, p;  // C to L, and L to O
  const float *x, *fc_weight, *gate_weight, *phi_weight, *scale_weight;
  AffineNorm norm1, norm2;
  float *pooled, *z, *gated, *phi, *scale, *slopes, *offsets;
  float *y, *u, *v;  // of dcd_branch_ alone; the rest of dcd_sample_weights
  const float *weight, *bias;
  float *base, *folded, *sample_weight, *sample_bias;
};

struct DcdBranchKernels {
  using Kernel = void (*)(const DcdBranch&, int64_t begin, int64_t end);
  Kernel pool, squeeze, gate, factors, project, fuse_channels, expand, fold_base, fold,
      sample_weights;
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "dcd_branch_cpu.h"
#include "cpu_dispatch.h"

namespace timm_dynamic {
namespace {

using Tensors = std::vector<Tensor>;

void run(const DcdBranch& op, int64_t units, int64_t work, DcdBranchKernels::Kernel kernel) {
  parallel(units, work, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
}

AffineNorm make_norm(const Tensors& t, double eps, int64_t L, const Tensor& x) {
  STD_TORCH_CHECK(t.size() == 4, "a norm has weight, bias, mean and variance, got ", t.size());
  return {parameter("norm weight", t[0], L, x), parameter("norm bias", t[1], L, x),
          parameter("norm mean", t[2], L, x), parameter("norm variance", t[3], L, x), eps};
}

// Runs what both operators need, up to Phi and scale. `scratch` is to live as long as `op`.
DcdBranch make_factors(const Tensor& x, const Tensors& fc, const Tensor& q, const Tensors& norm1,
                       const Tensors& norm2, double eps1, double eps2, int64_t pool_size,
                       int64_t stride_y, int64_t stride_x, const Tensor& p, Tensor& scratch) {
  DcdBranch op = {};
  Pointwise& conv = op.q;
  op.B = x.size(0), conv.C = x.size(1), conv.H = x.size(2), conv.W = x.size(3);
  conv.Ho = output_size(conv.H, stride_y), conv.Wo = output_size(conv.W, stride_x);
  conv.stride_y = stride_y, conv.stride_x = stride_x, conv.rows = q.size(0);
  op.hidden = fc[0].size(0), op.O = fc[3].size(0);
  op.pool_size = pool_size, op.pooled_size = conv.C * pool_size * pool_size;
  const int64_t L = conv.rows, squared = L * L, s = op.hidden;
  op.x = static_cast<const float*>(x.const_data_ptr());
  op.fc_weight = parameter("fc", fc[0], s * op.pooled_size, x);
  op.gate_weight = parameter("gate", fc[1], s * s, x);
  op.phi_weight = parameter("fc_phi", fc[2], squared * s, x);
  op.scale_weight = parameter("fc_scale", fc[3], op.O * s, x);
  conv.weight = parameter("q", q, L * conv.C, x);
  op.p = {L,      conv.Ho, conv.Wo, conv.Ho, conv.Wo, 1, 1, op.O, parameter("p", p, op.O * L, x),
          nullptr};
  op.norm1 = make_norm(norm1, eps1, L, x), op.norm2 = make_norm(norm2, eps2, L, x);

  const int64_t maps = op.B * L * conv.outputs(), folded = L * (conv.C + 1);
  const int64_t sizes[] = {op.B * op.pooled_size,
                           op.B * s,
                           op.B * s,
                           op.B * squared,
                           op.B * op.O,
                           L,
                           L,
                           maps,
                           maps,
                           folded,
                           op.B * folded};
  float** const buffers[] = {&op.pooled,  &op.z, &op.gated, &op.phi,  &op.scale, &op.slopes,
                             &op.offsets, &op.u, &op.v,     &op.base, &op.folded};
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  scratch = empty(x, {total});
  float* at = static_cast<float*>(scratch.mutable_data_ptr());
  for (int i = 0; i < 11; at += sizes[i++]) *buffers[i] = at;

  const DcdBranchKernels kernels = CHOOSE_KERNELS(dcd_branch_kernels());
  run(op, op.B * conv.C, conv.H * conv.W, kernels.pool);
  run(op, s, op.B * op.pooled_size, kernels.squeeze);
  run(op, s, op.B * s, kernels.gate);
  run(op, squared + op.O, op.B * s, kernels.factors);
  return op;
}

void check(const Tensor& x, const Tensors& fc, const Tensor& q, int64_t pool_size, int64_t stride_y,
           int64_t stride_x) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.numel() > 0 && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
      "x must be [B, C, H, W], float32, contiguous and not empty, got ", shape_text(x));
  STD_TORCH_CHECK(fc.size() == 4 && fc[0].dim() == 2 && fc[3].dim() == 2 && q.dim() >= 2,
                  "fc must be the weights of fc, gate, fc_phi and fc_scale, and q [L, C, 1, 1]");
  STD_TORCH_CHECK(pool_size >= 1 && stride_y >= 1 && stride_x >= 1,
                  "pool_size and stride must be positive");
}

// v, the branch before P.
void run_latent(const DcdBranch& op) {
  const DcdBranchKernels kernels = CHOOSE_KERNELS(dcd_branch_kernels());
  const Pointwise& q = op.q;
  if (q.stride_y == 1 && q.stride_x == 1) {
    for (int64_t l = 0; l < q.rows; ++l)
      op.slopes[l] = op.norm1.slope(l), op.offsets[l] = op.norm1.offset(l);
    ScaledPointwise project = unlimited(op.B, q.C, q.rows, q.outputs(), op.x, q.weight, op.u);
    project.norm = op.slopes, project.shift = op.offsets;
    run_scaled_pointwise(project);
  } else {
    run(op, op.B * q.blocks() * q.row_groups(), kRows * q.C * kBlock, kernels.project);
  }
  run(op, op.B * q.rows, q.rows * q.outputs(), kernels.fuse_channels);
}

void dcd_branch_(const Tensor& x, const Tensors& fc, const Tensor& q, const Tensors& norm1,
                 const Tensors& norm2, double eps1, double eps2, int64_t pool_size, const Tensor& p,
                 int64_t stride_y, int64_t stride_x, Tensor y) {
  check(x, fc, q, pool_size, stride_y, stride_x);
  Tensor scratch = x;
  DcdBranch op =
      make_factors(x, fc, q, norm1, norm2, eps1, eps2, pool_size, stride_y, stride_x, p, scratch);
  parameter("y", y, op.B * op.O * op.q.outputs(), x);
  op.y = static_cast<float*>(y.mutable_data_ptr());
  const DcdBranchKernels kernels = CHOOSE_KERNELS(dcd_branch_kernels());
  run_latent(op);
  run(op, op.B * op.p.blocks() * op.p.row_groups(), kRows * op.p.C * kBlock, kernels.expand);
}

void make_sample_weights(DcdBranch op, const Tensor& weight, const std::optional<Tensor>& bias,
                         float* weights, float* biases) {
  const int64_t L = op.q.rows, C = op.q.C;
  op.taps = weight.numel() / (op.O * C);
  op.weight = parameter("weight", weight, op.O * C * op.taps, weight);
  op.bias = bias ? parameter("bias", *bias, op.O, weight) : nullptr;
  op.sample_weight = weights, op.sample_bias = biases;
  const DcdBranchKernels kernels = CHOOSE_KERNELS(dcd_branch_kernels());
  run(op, L, C, kernels.fold_base);
  run(op, op.B * L, L * C, kernels.fold);
  run(op, op.B * op.O, (L + op.taps) * C, kernels.sample_weights);
}

// The layer's biases, [B, O], become those behind the norm.
void add_norm(ScaledPointwise& product, std::vector<float>& biases, const float* shift) {
  for (size_t i = 0; i < biases.size(); ++i) {
    const size_t o = i % product.O;
    biases[i] = (product.norm ? product.norm[o] : 1.0f) * biases[i] + (shift ? shift[o] : 0.0f);
  }
  product.shift = biases.data(), product.shift_stride = product.O;
}

Tensor dcd_pointwise(const Tensor& x, const Tensors& fc, const Tensor& q, const Tensors& norm1,
                     const Tensors& norm2, double eps1, double eps2, int64_t pool_size,
                     const Tensor& p, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& norm_scale,
                     const std::optional<Tensor>& norm_shift, double low, double high) {
  check(x, fc, q, pool_size, 1, 1);
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) * weight.size(3) == 1,
      "weight must be [O, ", x.size(1), ", 1, 1], got ", shape_text(weight));
  Tensor scratch = x;
  DcdBranch op = make_factors(x, fc, q, norm1, norm2, eps1, eps2, pool_size, 1, 1, p, scratch);
  const int64_t B = op.B, C = op.q.C, O = op.O, positions = op.q.outputs();
  const Tensor out = empty(x, {B, O, x.size(2), x.size(3)});
  ScaledPointwise product =
      unlimited(B, C, O, positions, op.x, parameter("weight", weight, O * C, x),
                static_cast<float*>(out.mutable_data_ptr()));
  product.norm = optional_parameter("norm_scale", norm_scale, O, x);
  const float* const shift = optional_parameter("norm_shift", norm_shift, O, x);
  product.low = static_cast<float>(low), product.high = static_cast<float>(high);
  std::vector<float> biases(B * O);
  if (2 * O * C <= positions * (C + O)) {  // maps are large beside the weight
    const auto weights = std::make_unique_for_overwrite<float[]>(B * O * C);
    make_sample_weights(op, weight, bias, weights.get(), biases.data());
    product.weight = weights.get(), product.weight_stride = O * C;
    add_norm(product, biases, shift);
    run_scaled_pointwise(product);
    return out;
  }
  if (bias) {
    const float* const own = parameter("bias", *bias, O, x);
    for (int64_t i = 0; i < B * O; ++i) biases[i] = op.scale[i] * own[i % O];
  }
  add_norm(product, biases, shift);
  product.out_scale = op.scale, product.L = op.q.rows, product.p = op.p.weight, product.v = op.v;
  run_latent(op);
  run_scaled_pointwise(product);
  return out;
}

std::tuple<Tensor, Tensor> dcd_sample_weights(const Tensor& x, const Tensors& fc, const Tensor& q,
                                              const Tensors& norm1, const Tensors& norm2,
                                              double eps1, double eps2, int64_t pool_size,
                                              const Tensor& p, const Tensor& weight,
                                              const std::optional<Tensor>& bias) {
  check(x, fc, q, pool_size, 1, 1);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1),
                  "weight must be [O, C, Kh, Kw], got ", shape_text(weight));
  Tensor scratch = x;
  const DcdBranch op =
      make_factors(x, fc, q, norm1, norm2, eps1, eps2, pool_size, 1, 1, p, scratch);
  const Tensor weights = empty(x, {op.B, op.O, op.q.C, weight.size(2), weight.size(3)});
  const Tensor biases = empty(x, {op.B, op.O});
  make_sample_weights(op, weight, bias, static_cast<float*>(weights.mutable_data_ptr()),
                      static_cast<float*>(biases.mutable_data_ptr()));
  return {weights, biases};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("dcd_branch_", TORCH_BOX(&dcd_branch_));
  m.impl("dcd_pointwise", TORCH_BOX(&dcd_pointwise));
  m.impl("dcd_sample_weights", TORCH_BOX(&dcd_sample_weights));
}

}  // namespace timm_dynamic
