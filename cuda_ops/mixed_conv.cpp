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

#include "ddf_args.h"
#include "ddf_cpu.h"

namespace timm_dynamic {

constexpr int64_t kTogether = 4;     // samples whose weights are mixed in one pass over the kernels
constexpr int64_t kMixBlock = 1024;  // elements of a kernel, the unit of mixing
constexpr int64_t kPacked = 1 << 16;  // elements of a block of positions, to stay in the cache

struct KernelAttention {
  int64_t B, C, positions, hidden_size, N;
  float temperature;
  const float *x, *hidden_weight, *hidden_bias, *score_weight, *score_bias;
  float *pooled, *hidden, *out;
};

struct KernelAttentionKernels {
  using Kernel = void (*)(const KernelAttention&, int64_t begin, int64_t end);
  Kernel pool, hidden_layer, scores;
};

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

void check_input(const Tensor& x) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.numel() > 0 && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
      "x must be [B, C, H, W], float32, contiguous and not empty, got ", shape_text(x));
}

Tensor kernel_attention(const Tensor& x, const Tensor& hidden_weight, const Tensor& hidden_bias,
                        const Tensor& score_weight, const Tensor& score_bias, double temperature) {
  check_input(x);
  KernelAttention op;
  op.B = x.size(0), op.C = x.size(1), op.positions = x.size(2) * x.size(3);
  op.hidden_size = hidden_bias.numel(), op.N = score_bias.numel();
  op.temperature = static_cast<float>(temperature);
  op.x = static_cast<const float*>(x.const_data_ptr());
  op.hidden_weight = parameter("hidden_weight", hidden_weight, op.hidden_size * op.C, x);
  op.hidden_bias = parameter("hidden_bias", hidden_bias, op.hidden_size, x);
  op.score_weight = parameter("score_weight", score_weight, op.N * op.hidden_size, x);
  op.score_bias = parameter("score_bias", score_bias, op.N, x);

  const Tensor scratch = empty(x, {op.B * (op.C + op.hidden_size)}), out = empty(x, {op.B, op.N});
  op.pooled = static_cast<float*>(scratch.mutable_data_ptr());
  op.hidden = op.pooled + op.B * op.C;
  op.out = static_cast<float*>(out.mutable_data_ptr());

  const KernelAttentionKernels kernels = CHOOSE_KERNELS(kernel_attention_kernels());
  const auto run = [&](int64_t units, int64_t work, KernelAttentionKernels::Kernel kernel) {
    parallel(units, work, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
  };
  run(op.B * op.C, op.positions, kernels.pool);
  run(op.hidden_size, op.B * op.C, kernels.hidden_layer);
  run(op.B, op.N * op.hidden_size, kernels.scores);
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
