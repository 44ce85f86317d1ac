// A hidden vector of the average-pooled input and heads on it, for one instruction set; see
// common/vectors.h for what the includer defines, and pooled_heads.cpp for the operator.

#include "common/pooling.h"

namespace timm_dynamic::ISA {

inline void pool_maps(const PooledHeads& op, int64_t begin, int64_t end) {
  pool(op.x, {op.C, 1, op.positions, op.channels_last}, 1, op.pooled, begin, end);
}

// Units are the hidden layer's channels.
inline void hidden_layer(const PooledHeads& op, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h)
    for (int64_t b = 0; b < op.B; ++b) {
      const float sum = dot(op.hidden_weight + h * op.C, op.pooled + b * op.C, op.C);
      const float biased = sum + (op.hidden_bias ? op.hidden_bias[h] : 0.0f);
      op.hidden[b * op.hidden_size + h] = biased < 0 ? 0 : biased;  // NaN stays
    }
}

// Units are the numbers of all heads, one after the other.
inline void head_scores(const PooledHeads& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    int64_t row = i;
    auto head = op.heads.begin();
    for (; row >= head->size; ++head) row -= head->size;
    const float* const weight = head->weight + row * op.hidden_size;
    for (int64_t b = 0; b < op.B; ++b) {
      float score = dot(weight, op.hidden + b * op.hidden_size, op.hidden_size) + head->bias[row];
      score /= op.temperature;
      if (head->activation == Activation::kSigmoid) score = 1 / (1 + std::exp(-score));
      if (head->activation == Activation::kTwiceSigmoid) score = 2 / (1 + std::exp(-score));
      head->out[b * head->size + row] = score;
    }
  }
}

// Of the heads that have one; units are samples.
inline void softmax(const PooledHeads& op, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    for (const Head& head : op.heads) {
      if (head.activation != Activation::kSoftmax) continue;
      float* const out = head.out + b * head.size;
      const float largest = *std::max_element(out, out + head.size);
      float sum = 0;
      for (int64_t n = 0; n < head.size; ++n) sum += out[n] = std::exp(out[n] - largest);
      for (int64_t n = 0; n < head.size; ++n) out[n] /= sum;
    }
}

inline PooledHeadsKernels pooled_heads_kernels() {
  return {pool_maps, hidden_layer, head_scores, softmax};
}

}  // namespace timm_dynamic::ISA
