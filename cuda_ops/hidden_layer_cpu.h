// The average-pooled input and a hidden vector of it, for one instruction set: see hidden_layer.h,
// and cpu_vectors.h, which the includer includes before.

namespace timm_dynamic::ISA {

// The mean of every map; units are maps.
inline void pool_maps(const HiddenLayer& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    op.pooled[i] = sum_of(op.x + i * op.positions, op.positions) / op.positions;
}

// Units are the hidden layer's channels.
inline void hidden_layer(const HiddenLayer& op, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h)
    for (int64_t b = 0; b < op.B; ++b)
      op.hidden[b * op.hidden_size + h] = std::max(
          dot(op.hidden_weight + h * op.C, op.pooled + b * op.C, op.C) + op.hidden_bias[h], 0.0f);
}

inline HiddenLayerKernels hidden_layer_kernels() { return {pool_maps, hidden_layer}; }

}  // namespace timm_dynamic::ISA
