// Gates, for one instruction set; see cpu_vectors.h for what the includer defines, and
// factored_gates.cpp for the operator.

#include "cpu_vectors.h"
#include "hidden_layer_cpu.h"

namespace timm_dynamic::ISA {

// Units are gates.
inline void gates(const FactoredGates& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    int64_t row = i, head = 0;
    while (row >= op.sizes[head]) row -= op.sizes[head++];
    const float* const weight = op.weights[head] + row * op.layer.hidden_size;
    for (int64_t b = 0; b < op.layer.B; ++b) {
      const float logit =
          dot(weight, op.layer.hidden + b * op.layer.hidden_size, op.layer.hidden_size) +
          op.biases[head][row];
      op.outputs[head][b * op.sizes[head] + row] = 1 / (1 + std::exp(-logit));
    }
  }
}

inline FactoredGatesKernel gates_kernel() { return gates; }

}  // namespace timm_dynamic::ISA
