// The CPU kernel of timm_dynamic::dcd_conv, which timm_dynamic/ops/channel_fusion defines.
//
// The layer is affine in x but for its factors, which are of the pooled input:
//   out = clamp(scale (conv(x, weight) + bias) + P (S2 (Phi u) + t2 + u) + shift), u = S1 Q x + t1
// Where maps are large beside the weight every sample gets one of its own, with the product of P,
// (S2 Phi + I) and S1 Q at the central tap; elsewhere the branch is computed.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "channel_fusion/mixtures.h"
#include "channel_fusion/products.h"
#include "common/arguments.h"
#include "common/parallel.h"

namespace timm_dynamic {

// A batch norm in eval mode, or none, of what `added` is added to: slope * z + offset.
struct AffineNorm {
  const float *weight, *bias, *mean, *variance;
  double eps;
  const float* added;

  float slope(int64_t l) const {
    return weight ? weight[l] / std::sqrt(variance[l] + static_cast<float>(eps)) : 1.0f;
  }
  float offset(int64_t l) const {
    const float before = added ? added[l] : 0.0f;
    return weight ? bias[l] + (before - mean[l]) * slope(l) : before;
  }
};

// Of the samples that are computed together.
struct DcdConv {
  int64_t B, C, H, W, O, Ho, Wo, L, hidden, pool_size, Ky, Kx;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  const float *x, *fc, *gate, *phi_head, *scale_head, *q, *p, *weight, *bias, *shift;
  AffineNorm norm1, norm2;
  bool channels_last, depthwise;
  float low, high;
  float *pooled, *z, *gated, *phi, *scale, *slopes, *offsets;
  float* shifts;  // [B, O]: what is added to the products
  float* maps;    // [B, C, Ho, Wo]: x at the stride
  float *u, *v;   // [B, L, Ho * Wo]: the branch before Phi and before P
  float *base, *folded, *sample_weights;

  int64_t taps() const { return Ky * Kx; }
  int64_t inputs() const { return H * W; }
  int64_t outputs() const { return Ho * Wo; }
  int64_t pooled_size() const { return C * pool_size * pool_size; }
};

struct DcdConvKernels {
  using Kernel = void (*)(const DcdConv&, int64_t begin, int64_t end);
  Kernel pool, squeeze, gate, factors, subsample, fuse_channels, fold_base, fold, sample_weights;
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "channel_fusion/dcd_kernels.h"
#include "common/dispatch.h"

namespace timm_dynamic {
namespace {

using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr int64_t kSamples = 32;  // that are computed together, at most

void run(const DcdConv& op, int64_t units, int64_t work, DcdConvKernels::Kernel kernel) {
  parallel(units, work, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
}

AffineNorm make_norm(const Tensors& t, double eps, int64_t L, const Tensor& x) {
  if (t.empty()) return {};
  STD_TORCH_CHECK(t.size() == 4, "a norm has weight, bias, mean and variance, got ", t.size());
  return {parameter("norm weight", t[0], L, x),
          parameter("norm bias", t[1], L, x),
          parameter("norm mean", t[2], L, x),
          parameter("norm variance", t[3], L, x),
          eps,
          nullptr};
}

// A tensor of this memory that autograd knows nothing of.
Tensor view_of(const float* at, const Sizes& sizes, const Tensor& like,
               bool channels_last = false) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  if (channels_last) strides = {strides[0], 1, sizes[3] * sizes[1], sizes[1]};
  return torch::stable::from_blob(const_cast<float*>(at), sizes, strides, like.device(),
                                  ScalarType::Float);
}

// Torch's, of B samples from `x` on.
class Convolution {
 public:
  Convolution(const DcdConv& op, int64_t groups, const Tensor& like)
      : op_(op), groups_(groups), like_(like) {}

  Tensor operator()(int64_t B, const float* x, const float* weight, const float* bias) const {
    using torch::stable::detail::from;
    const Sizes stride = {op_.stride_y, op_.stride_x}, padding = {op_.padding_y, op_.padding_x},
                dilation = {op_.dilation_y, op_.dilation_x}, no_padding = {0, 0};
    std::optional<Tensor> optional_bias;
    if (bias) optional_bias = view_of(bias, {op_.O}, like_);
    StableIValue stack[] = {from(view_of(x, {B, op_.C, op_.H, op_.W}, like_, op_.channels_last)),
                            from(view_of(weight, {op_.O, op_.C / groups_, op_.Ky, op_.Kx}, like_)),
                            from(optional_bias),
                            from(stride),
                            from(padding),
                            from(dilation),
                            from(false),
                            from(no_padding),
                            from(groups_)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::convolution", "", stack, TORCH_ABI_VERSION));
    const Tensor y = torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]),
                                               MemoryFormat::ChannelsLast);
    STD_TORCH_CHECK(y.scalar_type() == ScalarType::Float && y.numel() == B * op_.O * op_.outputs(),
                    "the convolution gave ", shape_text(y), " or no float32 (autocast?)");
    return y;
  }

 private:
  const DcdConv& op_;
  int64_t groups_;
  const Tensor& like_;
};

// The parameters, checked.
DcdConv make_layer(const Tensor& x, const Tensors& heads, const Tensor& q, const Tensors& norm1,
                   const Tensors& norm2, double eps1, double eps2, int64_t pool_size,
                   const Tensor& p, const std::optional<Tensor>& shift, const Tensor& weight,
                   const std::optional<Tensor>& bias, const Sizes& stride, const Sizes& padding,
                   const Sizes& dilation, int64_t groups, const std::optional<Tensor>& q_bias) {
  STD_TORCH_CHECK(heads.size() == 4 && heads[0].dim() == 2 && heads[3].dim() == 2 && q.dim() >= 2,
                  "heads must be the weights of fc, gate, fc_phi and fc_scale, and q [L, C, 1, 1]");
  for (const auto* sizes : {&stride, &padding, &dilation})
    STD_TORCH_CHECK(sizes->size() == 2, "stride, padding and dilation must be pairs");
  STD_TORCH_CHECK(pool_size >= 1 && stride[0] >= 1 && stride[1] >= 1 && dilation[0] >= 1 &&
                      dilation[1] >= 1 && groups >= 1,
                  "pool_size, stride, dilation and groups must be positive");
  DcdConv op = {};
  op.C = x.size(1), op.H = x.size(2), op.W = x.size(3);
  op.O = heads[3].size(0), op.hidden = heads[0].size(0), op.L = q.size(0);
  op.pool_size = pool_size;
  op.stride_y = stride[0], op.stride_x = stride[1];
  op.padding_y = padding[0], op.padding_x = padding[1];
  op.dilation_y = dilation[0], op.dilation_x = dilation[1];
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == op.O && weight.size(1) * groups == op.C &&
                      op.O % groups == 0,
                  "weight must be [", op.O, ", ", op.C / groups, ", Kh, Kw], got ",
                  shape_text(weight));
  op.Ky = weight.size(2), op.Kx = weight.size(3);
  op.depthwise = groups > 1 && groups == op.C && groups == op.O;
  STD_TORCH_CHECK(op.Ky % 2 == 1 && op.Kx % 2 == 1 &&
                      2 * op.padding_y == op.dilation_y * (op.Ky - 1) &&
                      2 * op.padding_x == op.dilation_x * (op.Kx - 1),
                  "the kernel must have a central tap, and padding that puts it on Q's position");
  op.Ho = (op.H - 1) / op.stride_y + 1, op.Wo = (op.W - 1) / op.stride_x + 1;
  op.fc = parameter("fc", heads[0], op.hidden * op.pooled_size(), x);
  op.gate = parameter("gate", heads[1], op.hidden * op.hidden, x);
  op.phi_head = parameter("fc_phi", heads[2], op.L * op.L * op.hidden, x);
  op.scale_head = parameter("fc_scale", heads[3], op.O * op.hidden, x);
  op.q = parameter("q", q, op.L * op.C, x), op.p = parameter("p", p, op.O * op.L, x);
  op.norm1 = make_norm(norm1, eps1, op.L, x), op.norm2 = make_norm(norm2, eps2, op.L, x);
  op.norm1.added = optional_parameter("q_bias", q_bias, op.L, x);
  op.weight = parameter("weight", weight, weight.numel(), x);
  op.bias = optional_parameter("bias", bias, op.O, x);
  op.shift = optional_parameter("shift", shift, op.O, x);
  return op;
}

enum class Way {
  kSampleWeights,  // and products, or a convolution a sample
  kProducts,       // of x, or of its columns
  kConvolution     // of all samples, to which the branch is added
};

// Takes the memory of B samples' buffers.
Tensor make_buffers(DcdConv& op, int64_t B, Way way, bool subsamples, const Tensor& x) {
  const bool weighted = way == Way::kSampleWeights;
  const int64_t depth = op.C * op.taps(), latent = weighted ? 0 : B * op.L * op.outputs();
  const int64_t folded = weighted ? op.L * (op.C + 1) : 0;
  const std::pair<float**, int64_t> buffers[] = {
      {&op.pooled, B * op.pooled_size()},
      {&op.z, B * op.hidden},
      {&op.gated, B * op.hidden},
      {&op.phi, B * op.L * op.L},
      {&op.scale, B * op.O},
      {&op.slopes, op.L},
      {&op.offsets, op.L},
      {&op.shifts, B * op.O},
      {&op.maps, subsamples ? B * op.C * op.outputs() : 0},
      {&op.u, latent},
      {&op.v, latent},
      {&op.base, folded},
      {&op.folded, B * folded},
      {&op.sample_weights, weighted ? B * op.O * depth : 0}};
  int64_t total = 0;
  for (const auto& buffer : buffers) total += buffer.second;
  const Tensor scratch = empty(x, {total});
  float* at = mutable_floats(scratch);
  for (const auto& [buffer, size] : buffers) *buffer = size ? at : nullptr, at += size;
  return scratch;
}

void run_factors(const DcdConv& op, const DcdConvKernels& kernels) {
  run(op, op.B * op.C, op.inputs(), kernels.pool);
  run(op, op.hidden, op.B * op.pooled_size(), kernels.squeeze);
  run(op, op.hidden, op.B * op.hidden, kernels.gate);
  run(op, op.L * op.L + op.O, op.B * op.hidden, kernels.factors);
}

// v, the branch before P; `maps` are what Q reads.
void run_latent(const DcdConv& op, const DcdConvKernels& kernels, const float* maps) {
  for (int64_t l = 0; l < op.L; ++l)
    op.slopes[l] = op.norm1.slope(l), op.offsets[l] = op.norm1.offset(l);
  Products project = plain_products(op.B, op.C, op.L, op.outputs(), maps, op.q, op.u);
  project.out_scale = op.slopes, project.shift = op.offsets;
  run_products(project);
  run(op, op.B * op.L, op.L * op.outputs(), kernels.fuse_channels);
}

void run_sample_weights(const DcdConv& op, const DcdConvKernels& kernels) {
  run(op, op.L, op.C, kernels.fold_base);
  run(op, op.B * op.L, op.L * op.C, kernels.fold);
  run(op, op.B * op.O, (op.L + op.taps()) * op.C, kernels.sample_weights);
}

// The products of the samples with their weights, or of one weight and the branch.
void run_limited(const DcdConv& op, const float* maps, const float* weight, float* out) {
  Products product = plain_products(op.B, op.C, op.O, op.outputs(), maps, weight, out);
  product.low = op.low, product.high = op.high;
  product.shift = op.shifts, product.shift_stride = op.O;
  if (weight == op.sample_weights) {
    product.weight_stride = op.O * op.C;
  } else {
    product.out_scale = op.scale, product.out_scale_stride = op.O;
    product.L = op.L, product.p = op.p, product.v = op.v;
  }
  run_products(product);
}

// A convolution of channels_last maps with `kernel`, [O, C, Ky, Kx].
Mixtures pixel_convolution(const DcdConv& op, int64_t C, int64_t O, const float* x,
                           const float* kernel, float* out) {
  Mixtures conv = {};
  conv.channels_last = true;
  conv.B = op.B, conv.N = 1, conv.C = C, conv.O = O;
  conv.H = op.H, conv.W = op.W, conv.Ho = op.Ho, conv.Wo = op.Wo;
  conv.Kh = conv.Kw = conv.dilation_y = conv.dilation_x = 1;
  conv.stride_y = op.stride_y, conv.stride_x = op.stride_x;
  conv.x = x, conv.kernels = kernel, conv.out = out;
  conv.low = -INFINITY, conv.high = INFINITY;
  return conv;
}

// All of it but the factors, in channels_last.
void run_pixels(const DcdConv& op, const DcdConvKernels& kernels, const Convolution& convolve,
                Way way, float* out) {
  Mixtures conv = pixel_convolution(op, op.C, op.O, op.x, op.weight, out);
  if (op.depthwise) conv.depthwise = true, conv.C = 1;
  conv.Kh = op.Ky, conv.Kw = op.Kx;
  conv.padding_y = op.padding_y, conv.padding_x = op.padding_x;
  conv.dilation_y = op.dilation_y, conv.dilation_x = op.dilation_x;
  conv.low = op.low, conv.high = op.high;
  conv.shift = op.shifts, conv.shift_stride = op.O;
  if (way == Way::kSampleWeights) {
    run_sample_weights(op, kernels);
    conv.kernels = op.sample_weights, conv.kernel_stride = op.O * op.C * op.taps();
    return run_mixtures(conv);
  }
  for (int64_t l = 0; l < op.L; ++l)
    op.slopes[l] = op.norm1.slope(l), op.offsets[l] = op.norm1.offset(l);
  Mixtures project = pixel_convolution(op, op.C, op.L, op.x, op.q, op.u);
  project.a_out = op.slopes, project.shift = op.offsets;
  run_mixtures(project);
  for (int64_t l = 0; l < op.L; ++l) op.offsets[l] = op.norm2.offset(l);
  for (int64_t i = 0; i < op.B * op.L; ++i)  // to S2 Phi + I
    for (int64_t l = i % op.L, m = 0; m < op.L; ++m)
      op.phi[i * op.L + m] = op.norm2.slope(l) * op.phi[i * op.L + m] + (l == m);
  DcdConv maps = op;
  maps.H = op.Ho, maps.W = op.Wo, maps.stride_y = maps.stride_x = 1;
  Mixtures fuse = pixel_convolution(maps, op.L, op.L, op.u, op.phi, op.v);
  fuse.kernel_stride = op.L * op.L, fuse.shift = op.offsets;
  run_mixtures(fuse);
  if (way == Way::kProducts) {
    conv.a_out = op.scale, conv.a_out_stride = op.O;
    conv.L = op.L, conv.p = op.p, conv.v = op.v;
    return run_mixtures(conv);
  }
  const Tensor y = convolve(op.B, op.x, op.weight, op.bias);
  Mixtures add = pixel_convolution(maps, op.L, op.O, op.v, op.p, out);
  add.base = floats(y), add.base_scale = op.scale;
  add.shift = op.shifts, add.shift_stride = op.O;
  add.low = op.low, add.high = op.high;
  run_mixtures(add);
}

Tensor dcd_conv(const Tensor& given, const Tensors& heads, const Tensor& q, const Tensors& norm1,
                const Tensors& norm2, double eps1, double eps2, int64_t pool_size, const Tensor& p,
                const std::optional<Tensor>& shift, const Tensor& weight,
                const std::optional<Tensor>& bias, const Sizes& stride, const Sizes& padding,
                const Sizes& dilation, int64_t groups, double low, double high,
                const std::optional<Tensor>& q_bias) {
  check_maps("x", given, true);
  // In NCHW only products are computed: other maps are copied there and back.
  const bool one_tap = groups == 1 && weight.dim() == 4 && weight.size(2) * weight.size(3) == 1;
  const bool copies = !one_tap && given.is_contiguous();
  const Tensor x = copies ? torch::stable::contiguous(given, MemoryFormat::ChannelsLast) : given;
  DcdConv op = make_layer(x, heads, q, norm1, norm2, eps1, eps2, pool_size, p, shift, weight, bias,
                          stride, padding, dilation, groups, q_bias);
  op.channels_last = !one_tap || !x.is_contiguous();
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  const DcdConvKernels kernels = CHOOSE_KERNELS(dcd_conv_kernels());
  const Convolution convolve(op, groups, x);
  const int64_t B = x.size(0), samples = std::min(B, kSamples), depth = op.C * op.taps();
  const bool large_maps = groups == 1 && 2 * op.O * depth <= op.outputs() * (op.C + op.O);
  const bool products = groups == 1 || op.depthwise;
  const Way way = large_maps ? Way::kSampleWeights : products ? Way::kProducts : Way::kConvolution;
  const bool subsamples = op.stride_y * op.stride_x > 1 && !op.channels_last;
  const Tensor scratch = make_buffers(op, samples, way, subsamples, x);
  const Tensor out = empty(x, {B, op.O, op.Ho, op.Wo}, op.channels_last);
  for (int64_t first = 0; first < B; first += samples) {
    op.B = std::min(samples, B - first);
    op.x = floats(x) + first * op.C * op.inputs();
    float* const to = mutable_floats(out) + first * op.O * op.outputs();
    run_factors(op, kernels);
    if (way != Way::kSampleWeights)
      for (int64_t i = 0; i < op.B * op.O; ++i)  // a convolution adds the bias
        op.shifts[i] = (way == Way::kProducts && op.bias ? op.scale[i] * op.bias[i % op.O] : 0.0f) +
                       (op.shift ? op.shift[i % op.O] : 0.0f);
    if (op.channels_last) {
      run_pixels(op, kernels, convolve, way, to);
      continue;
    }
    const float* const maps = subsamples ? op.maps : op.x;
    if (subsamples) run(op, op.B * op.C, op.outputs(), kernels.subsample);
    if (way == Way::kSampleWeights)
      run_sample_weights(op, kernels);
    else
      run_latent(op, kernels, maps);
    run_limited(op, maps, way == Way::kSampleWeights ? op.sample_weights : op.weight, to);
  }
  return copies ? torch::stable::contiguous(out, MemoryFormat::Contiguous) : out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) { m.impl("dcd_conv", TORCH_BOX(&dcd_conv)); }

}  // namespace timm_dynamic
