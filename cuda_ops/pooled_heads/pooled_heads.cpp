// The CPU kernel of timm_dynamic::pooled_heads, which timm_dynamic/ops/pooled_heads defines: heads
// of the pooled input, and the convolution with the kernel that they mix and gate.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "channel_fusion/mixtures.h"
#include "common/arguments.h"
#include "common/parallel.h"

namespace timm_dynamic {

enum class Activation { kNone, kSigmoid, kTwiceSigmoid, kSoftmax };

// One head's scores of `size` numbers a sample.
struct Head {
  int64_t size;
  Activation activation;
  const float *weight, *bias;
  float* out;
};

struct PooledHeads {
  int64_t B, C, positions, hidden_size;
  bool channels_last;
  const float *x, *hidden_weight, *hidden_bias;
  float *pooled, *hidden;
  std::vector<Head> heads;
  float temperature;
};

struct PooledHeadsKernels {
  using Kernel = void (*)(const PooledHeads&, int64_t begin, int64_t end);
  Kernel pool, hidden, scores, softmax;
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "pooled_heads/head_kernels.h"
#include "common/dispatch.h"

namespace timm_dynamic {
namespace {

using Tensors = std::vector<Tensor>;
using Gate = std::optional<Tensor>;

// What a head's numbers are: gates of inputs, outputs or taps, the attention over the kernels, or
// scores.
constexpr char kInputs = 'i', kOutputs = 'o', kTaps = 't', kKernels = 'k', kScores = 's';

Activation activation_of(char role, bool neutral) {
  STD_TORCH_CHECK(
      role == kInputs || role == kOutputs || role == kTaps || role == kKernels || role == kScores,
      "roles must be of the letters i, o, t, k and s, got ", std::string(1, role));
  if (role == kScores) return Activation::kNone;
  if (role == kKernels) return Activation::kSoftmax;
  return neutral ? Activation::kTwiceSigmoid : Activation::kSigmoid;
}

Tensors run_heads(const Tensor& x, const Tensor& hidden_weight, const Gate& hidden_bias,
                  const Tensors& weights, const Tensors& biases, const std::string& roles,
                  bool neutral, double temperature) {
  check_maps("x", x, true);
  STD_TORCH_CHECK(
      weights.size() == biases.size() && weights.size() == roles.size() && !weights.empty(),
      "as many weights as biases and roles are needed, got ", weights.size(), ", ", biases.size(),
      " and ", roles.size());
  PooledHeads op;
  op.B = x.size(0), op.C = x.size(1), op.positions = x.size(2) * x.size(3);
  op.channels_last = !x.is_contiguous();
  op.hidden_size = hidden_weight.numel() / op.C;
  op.temperature = static_cast<float>(temperature);
  op.x = floats(x);
  op.hidden_weight = parameter("hidden_weight", hidden_weight, op.hidden_size * op.C, x);
  op.hidden_bias = optional_parameter("hidden_bias", hidden_bias, op.hidden_size, x);
  const Tensor scratch = empty(x, {op.B * (op.C + op.hidden_size)});
  op.pooled = mutable_floats(scratch), op.hidden = op.pooled + op.B * op.C;
  Tensors outputs;
  int64_t scores = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t size = biases[i].numel();
    outputs.push_back(empty(x, {op.B, size}));
    op.heads.push_back({size, activation_of(roles[i], neutral),
                        parameter("weight", weights[i], size * op.hidden_size, x),
                        parameter("bias", biases[i], size, x), mutable_floats(outputs[i])});
    scores += size;
  }
  const PooledHeadsKernels kernels = CHOOSE_KERNELS(pooled_heads_kernels());
  const auto run = [&](int64_t units, int64_t work, PooledHeadsKernels::Kernel kernel) {
    parallel(units, work, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
  };
  run(op.B * op.C, op.positions, kernels.pool);
  run(op.hidden_size, op.B * op.C, kernels.hidden);
  run(scores, op.B * (op.hidden_size + 16), kernels.scores);
  run(op.B, 16 * scores, kernels.softmax);
  return outputs;
}

// Coefficients of kernels that are stored as their mean and the deviations of all but the first.
void take_around_mean(const Tensor& attention) {
  const int64_t N = attention.size(1);
  float* at = mutable_floats(attention);
  for (int64_t b = 0; b < attention.size(0); ++b, at += N) {
    for (int64_t n = 1; n < N; ++n) at[n] -= at[0];
    at[0] = 1;
  }
}

// [B, I * taps]: the products of the gates of inputs and taps.
Gate pairs_of(const Gate& inputs, const Gate& taps, int64_t size, const Tensor& x) {
  if (!inputs && !taps) return std::nullopt;
  const int64_t B = x.size(0), I = inputs ? inputs->size(1) : size / taps->size(1);
  const int64_t count = taps ? taps->size(1) : size / I;
  STD_TORCH_CHECK(I * count == size, "the kernels take ", size,
                  " gates of inputs and taps, the heads have ", I * std::max<int64_t>(count, 1));
  const Tensor pairs = empty(x, {B, size});
  float* to = mutable_floats(pairs);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0; i < I; ++i) {
      const float gate = inputs ? floats(*inputs)[b * I + i] : 1.0f;
      for (int64_t tap = 0; tap < count; ++tap)
        *to++ = taps ? gate * floats(*taps)[b * count + tap] : gate;
    }
  return pairs;
}

// The gates of a depthwise convolution's channels: of outputs times of inputs, one or as many.
Gate channel_gates(const Gate& inputs, const Gate& outputs, int64_t C, const Tensor& x) {
  if (!inputs) return outputs;
  const int64_t B = x.size(0), I = inputs->size(1);
  STD_TORCH_CHECK(I == 1 || I == C, "there must be one gate or ", C, " gates of inputs, got ", I);
  if (!outputs && I == C) return inputs;
  const Tensor gates = empty(x, {B, C});
  float* const to = mutable_floats(gates);
  for (int64_t i = 0; i < B * C; ++i)
    to[i] = (outputs ? floats(*outputs)[i] : 1.0f) * floats(*inputs)[I == 1 ? i / C : i];
  return gates;
}

// [B, O]: the mixtures of biases [N, O].
Tensor mixed_bias(const Tensor& attention, const Tensor& biases, const Tensor& x) {
  const int64_t B = x.size(0), N = attention.size(1), O = biases.numel() / N;
  const float* const from = parameter("bias", biases, N * O, x);
  const Tensor bias = empty(x, {B, O});
  float* const to = mutable_floats(bias);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t n = 0; n < N; ++n) {
      const float coefficient = floats(attention)[b * N + n];
      for (int64_t o = 0; o < O; ++o)
        to[b * O + o] = (n ? to[b * O + o] : 0.0f) + coefficient * from[n * O + o];
    }
  return bias;
}

Tensors pooled_heads(const Tensor& x, const Tensor& hidden_weight, const Gate& hidden_bias,
                     const Tensors& weights, const Tensors& biases, const std::string& roles,
                     bool neutral, double temperature, const std::optional<Tensor>& kernels,
                     const Gate& bias, const Pair& stride, const Pair& padding,
                     const Pair& dilation, std::optional<double> low, std::optional<double> high) {
  const Tensors heads =
      run_heads(x, hidden_weight, hidden_bias, weights, biases, roles, neutral, temperature);
  if (!kernels) return heads;
  STD_TORCH_CHECK(kernels->dim() == 5, "kernels must be [N, O, I, Kh, Kw], got ",
                  shape_text(*kernels));
  const auto find = [&](char role) {
    const size_t at = roles.find(role);
    return at == std::string::npos ? Gate() : Gate(heads[at]);
  };
  Gate attention = find(kKernels), inputs = find(kInputs), outputs = find(kOutputs), shift = bias;
  if (attention && neutral) take_around_mean(*attention);
  if (attention && bias && bias->dim() == 2) shift = mixed_bias(*attention, *bias, x);
  if (kernels->size(2) == 1 && x.size(1) > 1) {
    outputs = channel_gates(inputs, outputs, x.size(1), x);
    inputs = std::nullopt;
  }
  const int64_t size = kernels->size(2) * kernels->size(3) * kernels->size(4);
  const Gate pairs = pairs_of(inputs, find(kTaps), size, x);
  return {mixed_convolution(x, *kernels, attention, pairs, outputs, shift, low.value_or(-INFINITY),
                            high.value_or(INFINITY), stride, padding, dilation)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("pooled_heads", TORCH_BOX(&pooled_heads));
}

}  // namespace timm_dynamic
