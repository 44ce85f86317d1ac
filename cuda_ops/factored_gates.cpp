// The CPU kernel of timm_dynamic::factored_gates, which timm_dynamic/ops/factored_gates.py defines.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "hidden_layer.h"

namespace timm_dynamic {

constexpr int kHeads = 3;  // of inputs, outputs and taps

struct FactoredGates {
  HiddenLayer layer;
  int64_t sizes[kHeads];
  const float *weights[kHeads], *biases[kHeads];
  float* outputs[kHeads];
};

using FactoredGatesKernel = void (*)(const FactoredGates&, int64_t begin, int64_t end);

}  // namespace timm_dynamic

#define KERNELS_HEADER "factored_gates_cpu.h"
#include "cpu_dispatch.h"

namespace timm_dynamic {
namespace {

std::tuple<Tensor, Tensor, Tensor> factored_gates(const Tensor& x, const Tensor& hidden_weight,
                                                  const Tensor& hidden_bias, const Tensor& weight1,
                                                  const Tensor& bias1, const Tensor& weight2,
                                                  const Tensor& bias2, const Tensor& weight3,
                                                  const Tensor& bias3) {
  FactoredGates op;
  const HiddenLayerKernels hidden = CHOOSE_KERNELS(hidden_layer_kernels());
  const Tensor scratch = run_hidden_layer(op.layer, hidden, x, hidden_weight, hidden_bias);
  const Tensor* const weights[] = {&weight1, &weight2, &weight3};
  const Tensor* const biases[] = {&bias1, &bias2, &bias3};
  Tensor outputs[kHeads] = {x, x, x};
  int64_t gates = 0;
  for (int i = 0; i < kHeads; ++i) {
    op.sizes[i] = biases[i]->numel();
    op.weights[i] = parameter("weight", *weights[i], op.sizes[i] * op.layer.hidden_size, x);
    op.biases[i] = parameter("bias", *biases[i], op.sizes[i], x);
    outputs[i] = empty(x, {op.layer.B, op.sizes[i]});
    op.outputs[i] = static_cast<float*>(outputs[i].mutable_data_ptr());
    gates += op.sizes[i];
  }
  const FactoredGatesKernel kernel = CHOOSE_KERNELS(gates_kernel());
  parallel(gates, op.layer.B * (op.layer.hidden_size + 16),
           [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("factored_gates", TORCH_BOX(&factored_gates));
}

}  // namespace timm_dynamic
