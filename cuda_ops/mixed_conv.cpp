// CPU kernels of timm_dynamic::kernel_attention and ::mixed_pointwise; timm_dynamic/ops/
// kernel_attention.py and mixed_conv.py define the operators.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include "hidden_layer.h"

namespace timm_dynamic {

constexpr int64_t kTogether = 4;     // samples whose weights are mixed in one pass over the kernels
constexpr int64_t kMixBlock = 1024;  // elements of a kernel, the unit of mixing
constexpr int64_t kPacked = 1 << 16;  // elements of a block of positions, to stay in the cache

struct KernelAttention {
  HiddenLayer layer;
  int64_t N;
  float temperature;
  const float *score_weight, *score_bias;
  float* out;
};

using KernelAttentionScores = void (*)(const KernelAttention&, int64_t begin, int64_t end);

// The samples [first, first + B) of the batch.
struct MixedPointwise {
  int64_t B, N, C, Co, positions, block, blocks, parts;
  const float *x, *attention, *kernels;
  float *weight, *out;
};

struct MixedPointwiseKernels {
  using Kernel = void (*)(const MixedPointwise&, int64_t begin, int64_t end);
  Kernel mix, convolve;
  int64_t step;  // positions that `block` is a multiple of
};

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

Tensor mixed_pointwise(const Tensor& x, const Tensor& attention, const Tensor& kernels) {
  check_input(x);
  MixedPointwise op;
  const int64_t B = x.size(0);
  STD_TORCH_CHECK(kernels.dim() == 5 && kernels.numel() > 0 && kernels.size(2) == x.size(1) &&
                      kernels.size(3) * kernels.size(4) == 1,
                  "kernels must be [N, Co, ", x.size(1), ", 1, 1], got ", shape_text(kernels));
  op.N = kernels.size(0), op.Co = kernels.size(1), op.C = x.size(1);
  op.positions = x.size(2) * x.size(3);
  const MixedPointwiseKernels run = CHOOSE_KERNELS(mixed_pointwise_kernels());
  const int64_t whole = (op.positions + run.step - 1) / run.step * run.step;
  op.block = op.C * op.positions <= kPacked
                 ? whole
                 : std::clamp(kPacked / op.C / run.step * run.step, run.step, whole);
  op.blocks = (op.positions + op.block - 1) / op.block;
  const auto x_data = static_cast<const float*>(x.const_data_ptr());
  const float* const attention_data = parameter("attention", attention, B * op.N, x);
  op.kernels = parameter("kernels", kernels, kernels.numel(), x);

  const Tensor weight = empty(x, {std::min(B, kTogether), op.Co * op.C}),
               out = empty(x, {B, op.Co, x.size(2), x.size(3)});
  op.weight = static_cast<float*>(weight.mutable_data_ptr());
  const auto out_data = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t first = 0; first < B; first += kTogether) {
    op.B = std::min(kTogether, B - first);
    op.x = x_data + first * op.C * op.positions;
    op.out = out_data + first * op.Co * op.positions;
    op.attention = attention_data + first * op.N;
    // Few blocks of positions: the outputs are divided too.
    op.parts = std::clamp<int64_t>(4 / (op.B * op.blocks), 1, op.Co);
    parallel((op.Co * op.C + kMixBlock - 1) / kMixBlock, op.B * op.N * kMixBlock / 8,
             [&](int64_t begin, int64_t end) { run.mix(op, begin, end); });
    parallel(op.B * op.blocks * op.parts, op.Co * op.C * op.block / op.parts / 8,
             [&](int64_t begin, int64_t end) { run.convolve(op, begin, end); });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("kernel_attention", TORCH_BOX(&kernel_attention));
  m.impl("mixed_pointwise", TORCH_BOX(&mixed_pointwise));
}

}  // namespace timm_dynamic
