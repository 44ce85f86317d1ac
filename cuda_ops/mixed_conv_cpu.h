// How kernels are weighed, mixed and applied, for one instruction set; see cpu_vectors.h for what
// the includer defines, and mixed_conv.cpp for the operators.

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

constexpr int64_t kOutputs = ISA_LEVEL == 4 ? 8 : 4;
constexpr int kVectors = 3;  // as many accumulators for each output: within the registers

// `outputs` <= kOutputs rows of the result at `count` <= kWidth vectors of positions; x is [C,
// kWidth vectors].
template <int kWidth>
INLINE void multiply(const MixedPointwise& op, const float* weight, const float* x, float* out,
                     int64_t outputs, int64_t count) {
  const float* rows[kOutputs];
  for (int64_t r = 0; r < kOutputs; ++r) rows[r] = weight + std::min(r, outputs - 1) * op.C;
  Vec<float> sums[kOutputs][kWidth] = {};
  for (int64_t c = 0; c < op.C; ++c, x += kWidth * kLanes<float>) {
    Vec<float> values[kWidth];
    for (int v = 0; v < kWidth; ++v) values[v] = load<float>(x + v * kLanes<float>);
    for (int64_t r = 0; r < kOutputs; ++r)
      for (int v = 0; v < kWidth; ++v) sums[r][v] += broadcast(rows[r][c]) * values[v];
  }
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

// Divides `count` positions into strips of up to kVectors vectors, and a last one of single
// positions where they are few. Calls f(first, count, vectors), 0 vectors for single positions.
template <typename F>
INLINE void strips(int64_t count, const F& f) {
  constexpr int64_t n = kLanes<float>;
  int64_t at = 0;
  for (; count - at >= kVectors * n; at += kVectors * n) f(at, kVectors * n, kVectors);
  int64_t left = count - at;
  const int64_t few = left % n <= n / 4 ? left % n : 0;
  left -= few;
  if (left) f(at, left, static_cast<int>((left + n - 1) / n));
  if (few) f(at + left, few, 0);
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
    strips(count, [&](int64_t at, int64_t n, int vectors) {
      float* to = packed.get() + at * op.C;
      for (int64_t c = 0; c < op.C; ++c) {
        const float* const from = x + c * op.positions + at;
        for (int v = 0; v < vectors; ++v, to += kLanes<float>)
          store<float>(to, load<float>(from + v * kLanes<float>, n - v * kLanes<float>));
        if (!vectors)
          for (int64_t k = 0; k < n; ++k) to[k * op.C + c] = from[k];
      }
    });
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

inline MixedPointwiseKernels mixed_pointwise_kernels() {
  return {mix, mixed_convolve, kVectors * kLanes<float>};
}

}  // namespace timm_dynamic::ISA
