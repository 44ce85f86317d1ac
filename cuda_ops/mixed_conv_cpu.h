// How kernels are weighed, mixed and applied, for one instruction set; see cpu_vectors.h for what
// the includer defines, and mixed_conv.cpp for the operators.

#include "cpu_products.h"
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
INLINE void mix_elements(const MixedPointwise& op, int64_t begin, int64_t end) {
  const int64_t size = op.Co * op.C;
  for (int64_t at = begin; at < end; at += kLanes<float>) {
    Vec<float> sums[kSamples] = {};
    for (int64_t n = 0; n < op.N; ++n) {
      const Vec<float> values = load<float>(op.kernels + n * size + at, end - at);
      for (int64_t b = 0; b < kSamples; ++b)
        sums[b] += broadcast(op.attention[std::min(b, op.B - 1) * op.N + n]) * values;
    }
    for (int64_t b = 0; b < std::min(kSamples, op.B); ++b)
      store<float>(op.weight + b * size + at, sums[b], end - at);
  }
}

// Units are blocks of the kernels' elements.
inline void mix(const MixedPointwise& op, int64_t begin, int64_t end) {
  const int64_t last = std::min(end * kMixBlock, op.Co * op.C);
  if (op.B == 1)
    mix_elements<1>(op, begin * kMixBlock, last);
  else
    mix_elements<kTogether>(op, begin * kMixBlock, last);
}

// `outputs` <= kOutputs rows of the result at `count` <= kWidth vectors of positions; x is [C,
// kWidth vectors].
template <int kWidth>
INLINE void multiply(const MixedPointwise& op, const float* weight, const float* x, float* out,
                     int64_t outputs, int64_t count) {
  const float* rows[kOutputs];
  take_rows(rows, weight, outputs, op.C);
  Sums<kWidth> sums = {};
  accumulate<kWidth>(sums, rows, op.C, x);
  for (int64_t r = 0; r < outputs; ++r, out += op.positions)
    for (int v = 0; v < kWidth; ++v)
      store<float>(out + v * kLanes<float>, sums[r][v], count - v * kLanes<float>);
}

// The same at few positions; x is [count, C].
INLINE void multiply_few(const MixedPointwise& op, const float* weight, const float* x, float* out,
                         int64_t outputs, int64_t count) {
  for (int64_t r = 0; r < outputs; ++r)
    for (int64_t i = 0; i < count; ++i)
      out[r * op.positions + i] = dot(weight + r * op.C, x + i * op.C, op.C);
}

// Units are (part of the outputs, sample, block of positions).
inline void mixed_convolve(const MixedPointwise& op, int64_t begin, int64_t end) {
  const auto packed = std::make_unique_for_overwrite<float[]>(op.C * op.block);
  const int64_t groups = (op.Co + kOutputs - 1) / kOutputs;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t part = i / op.blocks / op.B, b = i / op.blocks % op.B;
    const int64_t first = i % op.blocks * op.block;
    const int64_t count = std::min(op.block, op.positions - first);
    const float* const x = op.x + b * op.C * op.positions + first;
    pack_rows(x, op.positions, nullptr, op.C, 0, op.C, count, packed.get());
    const int64_t last = std::min((part + 1) * groups / op.parts * kOutputs, op.Co);
    for (int64_t row = part * groups / op.parts * kOutputs; row < last; row += kOutputs)
      strips(count, [&](int64_t at, int64_t n, int vectors) {
        const auto run = vectors == 3   ? multiply<3>
                         : vectors == 2 ? multiply<2>
                         : vectors == 1 ? multiply<1>
                                        : multiply_few;
        run(op, op.weight + (b * op.Co + row) * op.C, packed.get() + at * op.C,
            op.out + (b * op.Co + row) * op.positions + first + at, std::min(kOutputs, last - row),
            n);
      });
  }
}

inline MixedPointwiseKernels mixed_pointwise_kernels() { return {mix, mixed_convolve, kStrip}; }

}  // namespace timm_dynamic::ISA
