#include "channel_fusion/strips.h"

namespace timm_dynamic::ISA {

// The columns of a sample, of `depth` elements of the kernels: what each reads at `rows` rows of
// the output.
struct Columns {
  const Mixtures& op;
  int64_t b, row, rows;
  std::unique_ptr<float[]> padded, line;  // a channel with its padding; a row of columns
  int64_t channel = -1;

  int64_t width() const { return op.W + 2 * op.padding_x; }
  int64_t height() const { return (rows - 1) * op.stride_y + (op.Kh - 1) * op.dilation_y + 1; }
  int64_t positions() const { return rows * op.Wo; }
  bool direct() const {
    return op.taps() == 1 && op.padding_x == 0 && op.padding_y == 0;
  }

  explicit Columns(const Mixtures& op, int64_t rows) : op(op), b(0), row(0), rows(rows) {
    padded = std::make_unique<float[]>(height() * width() + 2 * kLanes<float>);
    line = std::make_unique<float[]>(rows * op.Wo + kLanes<float>);
  }

  void take(int64_t c) {
    if (channel == c) return;
    channel = c;
    const float* const from = op.x + (b * op.C + c) * op.H * op.W;
    const int64_t top = row * op.stride_y - op.padding_y;
    for (int64_t y = 0; y < height(); ++y) {
      float* const to = padded.get() + y * width();
      const bool inside = top + y >= 0 && top + y < op.H;
      if (!inside) {
        std::fill(to, to + width(), 0.0f);
        continue;
      }
      std::fill(to, to + op.padding_x, 0.0f);
      const float* const source = from + (top + y) * op.W;
      for (int64_t i = 0; i < op.W; i += kLanes<float>)
        store<float>(to + op.padding_x + i, load<float>(source + i, op.W - i), op.W - i);
      std::fill(to + op.padding_x + op.W, to + width(), 0.0f);
    }
  }

  // Row k of the columns.
  const float* get(int64_t k) {
    if (direct() && op.stride_x == 1 && op.stride_y == 1)
      return op.x + (b * op.C + k) * op.H * op.W + row * op.W;
    const int64_t c = k / op.taps(), tap = k % op.taps();
    const int64_t ky = tap / op.Kw * op.dilation_y, kx = tap % op.Kw * op.dilation_x;
    take(c);
    load_rows<float>(line.get(), op.Wo, padded.get() + ky * width() + kx, op.stride_y * width(),
                     op.stride_x, rows, op.Wo);
    return line.get();
  }

  void pack(int64_t first, int64_t depth, float* packed) {
    channel = -1;
    for (int64_t k = 0; k < depth; ++k) {
      const float* const from = get(first + k);
      strips(positions(), [&](int64_t at, int64_t n, int vectors) {
        float* const to = packed + at * depth + k * (vectors ? vectors * kLanes<float> : 1);
        for (int v = 0; v < vectors; ++v)
          store<float>(to + v * kLanes<float>,
                       load<float>(from + at + v * kLanes<float>, n - v * kLanes<float>));
        if (!vectors)
          for (int64_t i = 0; i < n; ++i) packed[(at + i) * depth + k] = from[at + i];
      });
    }
  }
};

// kVectors vectors of a row of the mixtures of kSamples samples, `pitch` apart in `panel`.
template <int kSamples, int kCount>
INLINE void mix_vectors(const float* kernel, int64_t size, int64_t N, const float* coefficients,
                        const float* const (&pairs)[kSamples], float* panel, int64_t pitch,
                        int64_t count) {
  Vec<float> sums[kSamples][kCount] = {};
  for (int64_t n = 0; n < N; ++n)
    for (int v = 0; v < kCount; ++v) {
      const int64_t skip = v * kLanes<float>;
      const Vec<float> values = load<float>(kernel + n * size + skip, count - skip);
      for (int s = 0; s < kSamples; ++s) sums[s][v] += broadcast(coefficients[s * N + n]) * values;
    }
  for (int s = 0; s < kSamples; ++s)
    for (int v = 0; v < kCount; ++v) {
      const int64_t skip = v * kLanes<float>;
      if (pairs[s]) sums[s][v] *= load<float>(pairs[s] + skip, count - skip);
      store<float>(panel + s * pitch + skip, sums[s][v], count - skip);
    }
}

// Rows [row, row + rows) and elements [first, first + depth) of the gated mixtures of kSamples
// samples from b on.
template <int kSamples>
INLINE void mix_panels(const Mixtures& op, int64_t b, int64_t row, int64_t rows, int64_t first,
                       int64_t depth, float* coefficients, float* panel) {
  constexpr int kCount = 4;
  constexpr int64_t kStep = kCount * kLanes<float>;
  const int64_t whole = op.whole_depth(), size = op.O * whole, pitch = kPanel * depth;
  for (int64_t r = 0; r < rows; ++r, panel += depth) {
    const float* const kernel = op.kernels + (row + r) * whole + first;
    for (int s = 0; s < kSamples; ++s)
      for (int64_t n = 0; n < op.N; ++n)
        coefficients[s * op.N + n] = (op.a_out ? op.a_out[(b + s) * op.O + row + r] : 1.0f) *
                                     (op.attention ? op.attention[(b + s) * op.N + n] : 1.0f);
    const float* pairs[kSamples];
    for (int s = 0; s < kSamples; ++s) pairs[s] = op.pairs ? op.pairs + (b + s) * whole + first : nullptr;
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep) {
      mix_vectors<kSamples, kCount>(kernel + k, size, op.N, coefficients, pairs, panel + k, pitch, kStep);
      for (int s = 0; s < kSamples; ++s) if (pairs[s]) pairs[s] += kStep;
    }
    for (; k < depth; k += kLanes<float>) {
      mix_vectors<kSamples, 1>(kernel + k, size, op.N, coefficients, pairs, panel + k, pitch, depth - k);
      for (int s = 0; s < kSamples; ++s) if (pairs[s]) pairs[s] += kLanes<float>;
    }
  }
}

template <int kWidth>
INLINE void mixture_strip(const Mixtures& op, int64_t b, int64_t row, int64_t rows, bool first,
                          bool last, const float* panel, int64_t depth, const float* x, float* out,
                          int64_t pitch, int64_t count) {
  const float* matrix[kOutputs];
  take_rows(matrix, panel, rows, depth);
  Sums<kWidth> sums = {};
  accumulate<kWidth>(sums, matrix, depth, x);
  for (int64_t r = 0; r < rows; ++r, out += pitch)
    for (int v = 0; v < kWidth; ++v) {
      const int64_t skip = v * kLanes<float>;
      Vec<float> y = sums[r][v];
      if (!first) y += load<float>(out + skip, count - skip);
      if (last) {
        if (op.shift) y += broadcast(op.shift[b * op.shift_stride + row + r]);
        const Vec<float> low = broadcast(op.low), high = broadcast(op.high);
        y = y < low ? low : y;
        y = y > high ? high : y;
      }
      store<float>(out + skip, y, count - skip);
    }
}

INLINE void mixture_singles(const Mixtures& op, int64_t b, int64_t row, int64_t rows, bool first,
                            bool last, const float* panel, int64_t depth, const float* x,
                            float* out, int64_t pitch, int64_t count) {
  const float* matrix[kOutputs];
  take_rows(matrix, panel, rows, depth);
  for (int64_t i = 0; i < count; ++i, x += depth) {
    Vec<float> sums[kOutputs][2] = {};
    int64_t k = 0;
    for (; k + 2 * kLanes<float> <= depth; k += 2 * kLanes<float>)
      for (int64_t r = 0; r < kOutputs; ++r)
        for (int v = 0; v < 2; ++v)
          sums[r][v] += load<float>(matrix[r] + k + v * kLanes<float>) *
                        load<float>(x + k + v * kLanes<float>);
    for (; k < depth; k += kLanes<float>)
      for (int64_t r = 0; r < kOutputs; ++r)
        sums[r][0] += load<float>(matrix[r] + k, depth - k) * load<float>(x + k, depth - k);
    for (int64_t r = 0; r < rows; ++r) {
      float& y = out[r * pitch + i];
      y = (first ? 0.0f : y) + sum_lanes(sums[r][0] + sums[r][1]);
      if (last) {
        if (op.shift) y += op.shift[b * op.shift_stride + row + r];
        y = y < op.low ? op.low : y;
        y = y > op.high ? op.high : y;
      }
    }
  }
}

// Units are (samples or rows of one, part of the outputs).
inline void mixtures(const Mixtures& op, int64_t begin, int64_t end) {
  const int64_t whole = op.whole_depth(), most = op.rows * op.Wo;
  const int64_t pitch = op.Ho * op.Wo;
  const int64_t padded = (most + kStrip - 1) / kStrip * kStrip;
  const auto packed =
      std::make_unique_for_overwrite<float[]>(op.samples * op.depth * padded + kLanes<float>);
  const auto panel = std::make_unique_for_overwrite<float[]>(2 * kPanel * op.depth + kLanes<float>);
  const auto coefficients = std::make_unique_for_overwrite<float[]>(2 * op.N);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t unit = i / op.parts, part = i % op.parts;
    const int64_t b0 = unit / op.row_blocks * op.samples;
    const int64_t samples = std::min(op.samples, op.B - b0);
    const int64_t y0 = unit % op.row_blocks * op.rows, rows = std::min(op.rows, op.Ho - y0);
    const int64_t positions = rows * op.Wo;
    const int64_t groups = (op.O + kPanel - 1) / kPanel;
    const int64_t o0 = part * groups / op.parts * kPanel;
    const int64_t o1 = std::min((part + 1) * groups / op.parts * kPanel, op.O);
    Columns columns(op, rows);
    columns.row = y0;
    for (int64_t k0 = 0; k0 < whole; k0 += op.depth) {
      const int64_t depth = std::min(op.depth, whole - k0);
      const bool first = k0 == 0, last = k0 + depth == whole;
      for (int64_t s = 0; s < samples; ++s) {
        columns.b = b0 + s;
        columns.pack(k0, depth, packed.get() + s * op.depth * padded);
      }
      for (int64_t o = o0; o < o1; o += kPanel) {
        const int64_t outputs = std::min(kPanel, o1 - o);
        for (int64_t s = 0; s < samples; ++s) {
          const int64_t b = b0 + s, half = s % 2 * kPanel * depth;
          if (s % 2 == 0) {
            if (s + 1 < samples)
              mix_panels<2>(op, b, o, outputs, k0, depth, coefficients.get(), panel.get());
            else
              mix_panels<1>(op, b, o, outputs, k0, depth, coefficients.get(), panel.get());
          }
          strips(positions, [&](int64_t at, int64_t n, int vectors) {
            const auto run = vectors == 3   ? mixture_strip<3>
                             : vectors == 2 ? mixture_strip<2>
                             : vectors == 1 ? mixture_strip<1>
                                            : mixture_singles;
            for (int64_t r = 0; r < outputs; r += kOutputs)
              run(op, b, o + r, std::min(kOutputs, outputs - r), first, last,
                  panel.get() + half + r * depth, depth,
                  packed.get() + s * op.depth * padded + at * depth,
                  op.out + (b * op.O + o + r) * pitch + y0 * op.Wo + at, pitch, n);
          });
        }
      }
    }
  }
}

inline MixtureKernels mixture_kernels() { return {mixtures, kLanes<float>}; }

}  // namespace timm_dynamic::ISA
