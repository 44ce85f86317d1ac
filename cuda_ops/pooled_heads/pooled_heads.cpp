// The CPU kernel of timm_dynamic::pooled_heads, which timm_dynamic/ops/pooled_heads defines.

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

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "sigmoid") return Activation::kSigmoid;
  if (name == "sigmoid2") return Activation::kTwiceSigmoid;
  STD_TORCH_CHECK(name == "softmax",
                  "activation must be none, sigmoid, sigmoid2 or softmax, got \"", name, "\"");
  return Activation::kSoftmax;
}

std::vector<Tensor> pooled_heads(const Tensor& x, const Tensor& hidden_weight,
                                 const std::optional<Tensor>& hidden_bias,
                                 const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases,
                                 const std::vector<std::string>& activations, double temperature) {
  check_maps("x", x, true);
  STD_TORCH_CHECK(
      weights.size() == biases.size() && weights.size() == activations.size() && !weights.empty(),
      "as many weights as biases and activations are needed, got ", weights.size(), ", ",
      biases.size(), " and ", activations.size());
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
  std::vector<Tensor> outputs;
  int64_t scores = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t size = biases[i].numel();
    outputs.push_back(empty(x, {op.B, size}));
    op.heads.push_back({size, activation_of(activations[i]),
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("pooled_heads", TORCH_BOX(&pooled_heads));
}

}  // namespace timm_dynamic
