// CPU kernels of timm_dynamic::kernel_attention and ::mixed_pointwise; timm_dynamic/ops/
// kernel_attention.py and mixed_conv.py define the operators.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#include "hidden_layer.h"
#include "scaled_pointwise.h"

namespace timm_dynamic {

constexpr int64_t kTogether = 4;     // samples whose weights are mixed in one pass over the kernels
constexpr int64_t kMixBlock = 1024;  // elements of a kernel, the unit of mixing

struct KernelAttention {
  HiddenLayer layer;
  int64_t N;
  float temperature;
  const float *score_weight, *score_bias;
  float* out;
};

using KernelAttentionScores = void (*)(const KernelAttention&, int64_t begin, int64_t end);

// The weights of B samples, `size` elements each.
struct KernelMix {
  int64_t B, N, size;
  const float *attention, *kernels;
  float* weight;
};

using MixKernels = void (*)(const KernelMix&, int64_t begin, int64_t end);

}  // namespace timm_dynamic

#define KERNELS_HEADER "mixed_conv_cpu.h"
#include "cpu_dispatch.h"

namespace timm_dynamic {
namespace {

Tensor kernel_attention(const Tensor& x, const Tensor& hidden_weight, const Tensor& hidden_bias,
                        const Tensor& score_weight, const Tensor& score_bias, double temperature) {
  KernelAttention op;
  const HiddenLayerKernels hidden = CHOOSE_KERNELS(hidden_layer_kernels());
  const Tensor scratch = run_hidden_layer(op.layer, hidden, x, hidden_weight, hidden_bias);
  op.N = score_bias.numel(), op.temperature = static_cast<float>(temperature);
  op.score_weight = parameter("score_weight", score_weight, op.N * op.layer.hidden_size, x);
  op.score_bias = parameter("score_bias", score_bias, op.N, x);
  const Tensor out = empty(x, {op.layer.B, op.N});
  op.out = static_cast<float*>(out.mutable_data_ptr());
  const KernelAttentionScores scores = CHOOSE_KERNELS(attention_scores_kernel());
  parallel(op.layer.B, op.N * op.layer.hidden_size,
           [&](int64_t begin, int64_t end) { scores(op, begin, end); });
  return out;
}

Tensor mixed_pointwise(const Tensor& x, const Tensor& attention, const Tensor& kernels,
                       const std::optional<Tensor>& norm_scale,
                       const std::optional<Tensor>& norm_shift, double low, double high) {
  check_input(x);
  const int64_t B = x.size(0), C = x.size(1);
  STD_TORCH_CHECK(kernels.dim() == 5 && kernels.numel() > 0 && kernels.size(2) == C &&
                      kernels.size(3) * kernels.size(4) == 1,
                  "kernels must be [N, Co, ", C, ", 1, 1], got ", shape_text(kernels));
  const int64_t N = kernels.size(0), O = kernels.size(1), positions = x.size(2) * x.size(3);
  const MixKernels mix = CHOOSE_KERNELS(mix_kernel());
  const auto x_data = static_cast<const float*>(x.const_data_ptr());
  const float* const attention_data = parameter("attention", attention, B * N, x);
  const float* const kernels_data = parameter("kernels", kernels, kernels.numel(), x);
  const float* const scale = optional_parameter("norm_scale", norm_scale, O, x);
  const float* const shift = optional_parameter("norm_shift", norm_shift, O, x);

  const Tensor weight = empty(x, {std::min(B, kTogether), O * C}),
               out = empty(x, {B, O, x.size(2), x.size(3)});
  const auto weight_data = static_cast<float*>(weight.mutable_data_ptr());
  const auto out_data = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t first = 0; first < B; first += kTogether) {
    const int64_t count = std::min(kTogether, B - first);
    const KernelMix op = {count, N, O * C, attention_data + first * N, kernels_data, weight_data};
    parallel((op.size + kMixBlock - 1) / kMixBlock, count * N * kMixBlock / 8,
             [&](int64_t begin, int64_t end) { mix(op, begin, end); });
    ScaledPointwise product = unlimited(count, C, O, positions, x_data + first * C * positions,
                                        weight_data, out_data + first * O * positions);
    product.weight_stride = op.size;
    product.norm = scale, product.shift = shift;
    product.low = static_cast<float>(low), product.high = static_cast<float>(high);
    run_scaled_pointwise(product);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("kernel_attention", TORCH_BOX(&kernel_attention));
  m.impl("mixed_pointwise", TORCH_BOX(&mixed_pointwise));
}

}  // namespace timm_dynamic
