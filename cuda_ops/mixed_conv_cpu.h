// How kernels are weighed and mixed, for one instruction set; see cpu_vectors.h for what
// the includer defines, and mixed_conv.cpp for the operators.

#include "cpu_vectors.h"
#include "hidden_layer_cpu.h"

namespace timm_dynamic::ISA {

// The softmax of the scores; units are samples.
inline void attention_scores(const KernelAttention& op, int64_t begin, int64_t end) {
  const int64_t size = op.layer.hidden_size;
  for (int64_t b = begin; b < end; ++b) {
    float* const out = op.out + b * op.N;
    for (int64_t n = 0; n < op.N; ++n)
      out[n] =
          (dot(op.score_weight + n * size, op.layer.hidden + b * size, size) + op.score_bias[n]) /
          op.temperature;
    const float largest = *std::max_element(out, out + op.N);
    float sum = 0;
    for (int64_t n = 0; n < op.N; ++n) sum += out[n] = std::exp(out[n] - largest);
    for (int64_t n = 0; n < op.N; ++n) out[n] /= sum;
  }
}

inline KernelAttentionScores attention_scores_kernel() { return attention_scores; }

// Elements [begin, end) of the weights of kSamples samples, or of the B <= kSamples there are.
template <int64_t kSamples>
INLINE void mix_elements(const KernelMix& op, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kLanes<float>) {
    Vec<float> sums[kSamples] = {};
    for (int64_t n = 0; n < op.N; ++n) {
      const Vec<float> values = load<float>(op.kernels + n * op.size + at, end - at);
      for (int64_t b = 0; b < kSamples; ++b)
        sums[b] += broadcast(op.attention[std::min(b, op.B - 1) * op.N + n]) * values;
    }
    for (int64_t b = 0; b < std::min(kSamples, op.B); ++b)
      store<float>(op.weight + b * op.size + at, sums[b], end - at);
  }
}

// Units are blocks of the kernels' elements.
inline void mix(const KernelMix& op, int64_t begin, int64_t end) {
  const int64_t last = std::min(end * kMixBlock, op.size);
  if (op.B == 1)
    mix_elements<1>(op, begin * kMixBlock, last);
  else
    mix_elements<kTogether>(op, begin * kMixBlock, last);
}

inline MixKernels mix_kernel() { return mix; }

}  // namespace timm_dynamic::ISA
