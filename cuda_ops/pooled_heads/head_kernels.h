// A hidden vector of the average-pooled input and heads on it, for one instruction set; see
// common/vectors.h for what the includer defines, and pooled_heads.cpp for the operator.

#include "common/pooling.h"

namespace timm_dynamic::ISA {

inline void pool_maps(const PooledHeads& op, int64_t begin, int64_t end) {
  pool(op.x, {op.C, 1, op.positions, op.channels_last}, 1, op.pooled, begin, end);
}

// Calls f(b, product of `row` and the b-th of `count` vectors of n numbers).
template <typename F>
INLINE void each_dot(const float* row, const float* vectors, int64_t n, int64_t count, const F& f) {
  // That read the row once: 0.4 of the time with 16 vectors of 102 (AMD EPYC with AVX2, November
  // 2026).
  constexpr int kTogether = 4;
  int64_t b = 0;
  for (; b + kTogether <= count; b += kTogether, vectors += kTogether * n) {
    Vec<float> sums[kTogether] = {};
    const auto add = [&](int64_t k, int64_t left) {
      const Vec<float> values = load<float>(row + k, left);
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i)
        sums[i] += values * load<float>(vectors + i * n + k, left);
    };
    int64_t k = 0;
    for (; k + kLanes<float> <= n; k += kLanes<float>) add(k, kLanes<float>);
    if (k < n) add(k, n - k);
    for (int i = 0; i < kTogether; ++i) f(b + i, sum_lanes(sums[i]));
  }
  for (; b < count; ++b, vectors += n) f(b, dot(row, vectors, n));
}

// Units are the hidden layer's channels.
inline void hidden_layer(const PooledHeads& op, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h) {
    const float bias = op.hidden_bias ? op.hidden_bias[h] : 0.0f;
    each_dot(op.hidden_weight + h * op.C, op.pooled, op.C, op.B, [&](int64_t b, float sum) {
      op.hidden[b * op.hidden_size + h] = sum + bias < 0 ? 0 : sum + bias;  // NaN stays
    });
  }
}

// Units are the numbers of all heads, one after the other.
inline void head_scores(const PooledHeads& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    int64_t row = i;
    auto head = op.heads.begin();
    for (; row >= head->size; ++head) row -= head->size;
    const auto finish = [&](int64_t b, float sum) {
      float score = (sum + head->bias[row]) / op.temperature;
      if (head->activation == Activation::kSigmoid) score = 1 / (1 + std::exp(-score));
      if (head->activation == Activation::kTwiceSigmoid) score = 2 / (1 + std::exp(-score));
      head->out[b * head->size + row] = score;
    };
    each_dot(head->weight + row * op.hidden_size, op.hidden, op.hidden_size, op.B, finish);
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
