// The CPU kernel of mixtures.cpp for NCHW maps, for one instruction set; see common/vectors.h for
// what the includer defines.

#include "channel_fusion/strips.h"

namespace timm_dynamic::ISA {

// What a kernel's elements read at `rows` rows of the output.
class Columns {
 public:
  Columns(const Mixtures& op, int64_t rows)
      : op_(op),
        rows_(rows),
        height_((rows - 1) * op.stride_y + (op.Kh - 1) * op.dilation_y + 1),
        width_(op.W + 2 * op.padding_x),
        whole_(op.taps() == 1 && op.stride_y == 1 && op.stride_x == 1 && op.padding_y == 0 &&
               op.padding_x == 0),
        padded_(std::make_unique_for_overwrite<float[]>(height_ * width_ + kLanes<float>)),
        line_(std::make_unique_for_overwrite<float[]>(rows * op.Wo + kLanes<float>)) {}

  // Of elements [first, first + depth), of a sample from row `row` on, in the order of `strips`,
  // each [depth, vectors], or [positions, depth].
  void pack(int64_t b, int64_t row, int64_t first, int64_t depth, float* packed) {
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t c = (first + k) / op_.taps(), tap = (first + k) % op_.taps();
      const float* line = op_.x + (b * op_.C + c) * op_.H * op_.W + row * op_.W;
      if (!whole_) {
        if (k == 0 || tap == 0) pad(op_.x + (b * op_.C + c) * op_.H * op_.W, row);
        const int64_t y = tap / op_.Kw * op_.dilation_y, x = tap % op_.Kw * op_.dilation_x;
        load_rows<float>(line_.get(), op_.Wo, padded_.get() + y * width_ + x, op_.stride_y * width_,
                         op_.stride_x, rows_, op_.Wo);
        line = line_.get();
      }
      strips(rows_ * op_.Wo, [&](int64_t at, int64_t n, int vectors) {
        float* const to = packed + at * depth + k * vectors * kLanes<float>;
        for (int64_t skip = 0; skip < vectors * kLanes<float>; skip += kLanes<float>)
          store<float>(to + skip, load<float>(line + at + skip, n - skip));
        if (!vectors)
          for (int64_t i = 0; i < n; ++i) to[i * depth + k] = line[at + i];
      });
    }
  }

 private:
  // The rows of a channel that are read, with its padding.
  void pad(const float* channel, int64_t row) {
    float* to = padded_.get();
    for (int64_t i = 0; i < height_; ++i, to += width_) {
      const int64_t y = row * op_.stride_y - op_.padding_y + i;
      std::fill_n(to, width_, 0.0f);
      if (y >= 0 && y < op_.H) std::copy_n(channel + y * op_.W, op_.W, to + op_.padding_x);
    }
  }

  const Mixtures& op_;
  const int64_t rows_, height_, width_;
  const bool whole_;  // the map is what they read
  const std::unique_ptr<float[]> padded_, line_;
};

// kCount vectors of a row of the mixtures of kSamples samples, `pitch` apart in `panel`. Pairs are
// null, or gates of the row's elements.
template <int kSamples, int kCount>
INLINE void mix_vectors(const float* kernel, int64_t size, int64_t N, const float* coefficients,
                        const float* const (&pairs)[kSamples], int64_t first, float* panel,
                        int64_t pitch, int64_t count) {
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
      if (pairs[s]) sums[s][v] *= load<float>(pairs[s] + first + skip, count - skip);
      store<float>(panel + s * pitch + skip, sums[s][v], count - skip);
    }
}

// Rows [row, row + rows) and elements [first, first + depth) of the gated mixtures of kSamples
// samples from b on, each [rows, depth], `pitch` apart in `panel`.
template <int kSamples>
INLINE void mix_panels(const Mixtures& op, int64_t b, int64_t row, int64_t rows, int64_t first,
                       int64_t depth, float* coefficients, float* panel, int64_t pitch) {
  constexpr int kCount = 4;
  constexpr int64_t kStep = kCount * kLanes<float>;
  const int64_t whole = op.whole_depth(), size = op.O * whole;
  for (int64_t r = row; r < row + rows; ++r, panel += depth) {
    const float* const kernel = op.kernels + r * whole + first;
    const float* pairs[kSamples];
    for (int64_t s = 0; s < kSamples; ++s) {
      pairs[s] = op.pairs ? op.pairs + (b + s) * whole + first : nullptr;
      const float gate = op.a_out ? op.a_out[(b + s) * op.a_out_stride + r] : 1.0f;
      for (int64_t n = 0; n < op.N; ++n)
        coefficients[s * op.N + n] =
            gate * (op.attention ? op.attention[(b + s) * op.N + n] : 1.0f);
    }
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep)
      mix_vectors<kSamples, kCount>(kernel + k, size, op.N, coefficients, pairs, k, panel + k,
                                    pitch, kStep);
    for (; k < depth; k += kLanes<float>)
      mix_vectors<kSamples, 1>(kernel + k, size, op.N, coefficients, pairs, k, panel + k, pitch,
                               depth - k);
  }
}

// Where a block of the mixtures meets columns: sample, row of the output, and whether it is the
// first or the last one in depth.
struct Block {
  int64_t b, row, depth;
  bool first, last;
};

// Adds a block's sums to what is in `out`. kWhole: they are of kOutputs rows and whole vectors.
template <int kWidth, bool kWhole>
INLINE void add_sums(const Mixtures& op, const Block& block, int64_t row, int64_t rows,
                     const Sums<kWidth>& sums, float* out, int64_t count) {
  const Vec<float> low = broadcast(op.low), high = broadcast(op.high);
#pragma GCC unroll 8
  for (int64_t r = 0; r < kOutputs; ++r, out += op.positions()) {
    if (!kWhole && r >= rows) return;
    const bool shifted = block.first && op.shift;
    const Vec<float> shift =
        broadcast(shifted ? op.shift[block.b * op.shift_stride + row + r] : 0.0f);
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) {
      const int64_t skip = v * kLanes<float>, n = kWhole ? kLanes<float> : count - skip;
      Vec<float> y = sums[r][v];
      y += block.first ? shift : load<float>(out + skip, n);
      if (block.last) {
        y = y < low ? low : y;  // NaN stays NaN
        y = y > high ? high : y;
      }
      store<float>(out + skip, y, n);
    }
  }
}

// Rows [row, row + rows) at `count` <= kWidth vectors of positions, to out; panel is [rows, depth],
// x [depth, kWidth vectors].
template <int kWidth>
INLINE void mixture_strip(const Mixtures& op, const Block& block, int64_t row, int64_t rows,
                          const float* panel, const float* x, float* out, int64_t count) {
  if (!block.first)
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < kWidth; ++v)
        __builtin_prefetch(out + r * op.positions() + v * kLanes<float>, 1);
  const float* matrix[kOutputs];
  take_rows(matrix, panel, rows, block.depth);
  Sums<kWidth> sums = {};
  accumulate<kWidth>(sums, matrix, block.depth, x);
  if (rows == kOutputs && count == kWidth * kLanes<float>)
    add_sums<kWidth, true>(op, block, row, rows, sums, out, count);
  else
    add_sums<kWidth, false>(op, block, row, rows, sums, out, count);
}

// The same at few positions; x is [count, depth].
INLINE void mixture_singles(const Mixtures& op, const Block& block, int64_t row, int64_t rows,
                            const float* panel, const float* x, float* out, int64_t count) {
  const int64_t depth = block.depth, n = kLanes<float>;
  const float* matrix[kOutputs];
  take_rows(matrix, panel, rows, depth);
  for (int64_t i = 0; i < count; ++i, x += depth) {
    Vec<float> sums[kOutputs][2] = {};
    for (int64_t k = 0; k < depth; k += 2 * n)
      for (int v = 0; v < 2; ++v) {
        const Vec<float> values = load<float>(x + k + v * n, depth - k - v * n);
        for (int64_t r = 0; r < kOutputs; ++r)
          sums[r][v] += load<float>(matrix[r] + k + v * n, depth - k - v * n) * values;
      }
    for (int64_t r = 0; r < rows; ++r) {
      float& y = out[r * op.positions() + i];
      if (block.first) y = op.shift ? op.shift[block.b * op.shift_stride + row + r] : 0.0f;
      y += sum_lanes(sums[r][0] + sums[r][1]);
      if (block.last) {
        y = y < op.low ? op.low : y;
        y = y > op.high ? op.high : y;
      }
    }
  }
}

// A block of the mixture of a sample with its columns.
INLINE void multiply_panel(const Mixtures& op, const Block& block, int64_t row, int64_t rows,
                           const float* panel, const float* columns, int64_t positions,
                           float* out) {
  strips(positions, [&](int64_t at, int64_t n, int vectors) {
    const auto run = vectors == 3   ? mixture_strip<3>
                     : vectors == 2 ? mixture_strip<2>
                     : vectors == 1 ? mixture_strip<1>
                                    : mixture_singles;
    for (int64_t r = 0; r < rows; r += kOutputs)
      run(op, block, row + r, std::min(kOutputs, rows - r), panel + r * block.depth,
          columns + at * block.depth, out + r * op.positions() + at, n);
  });
}

// Units are (samples or rows of one, part of the outputs).
inline void mixtures(const Mixtures& op, int64_t begin, int64_t end) {
  const int64_t whole = op.whole_depth(), panels = (op.O + kPanel - 1) / kPanel;
  const int64_t size = op.depth * ((op.rows * op.Wo + kStrip - 1) / kStrip * kStrip);
  const auto packed = std::make_unique_for_overwrite<float[]>(op.samples * size);
  const auto mixed = std::make_unique_for_overwrite<float[]>(2 * kPanel * op.depth);
  const auto coefficients = std::make_unique_for_overwrite<float[]>(2 * op.N);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t unit = i / op.parts, part = i % op.parts;
    const int64_t b = unit / op.row_blocks * op.samples, samples = std::min(op.samples, op.B - b);
    const int64_t y = unit % op.row_blocks * op.rows, rows = std::min(op.rows, op.Ho - y);
    const int64_t last = std::min((part + 1) * panels / op.parts * kPanel, op.O);
    Columns columns(op, rows);
    for (int64_t k = 0; k < whole; k += op.depth) {
      Block block = {0, y, std::min(op.depth, whole - k), k == 0, k + op.depth >= whole};
      for (int64_t s = 0; s < samples; ++s)
        columns.pack(b + s, y, k, block.depth, packed.get() + s * size);
      for (int64_t row = part * panels / op.parts * kPanel; row < last; row += kPanel) {
        const int64_t outputs = std::min(kPanel, last - row);
        for (int64_t s = 0; s < samples; ++s) {
          block.b = b + s;
          if (s % 2 == 0) {  // for two at a time: each reads the kernels
            const auto mix = s + 1 < samples ? mix_panels<2> : mix_panels<1>;
            mix(op, block.b, row, outputs, k, block.depth, coefficients.get(), mixed.get(),
                kPanel * block.depth);
          }
          multiply_panel(op, block, row, outputs, mixed.get() + s % 2 * kPanel * block.depth,
                         packed.get() + s * size, rows * op.Wo,
                         op.out + (block.b * op.O + row) * op.positions() + y * op.Wo);
        }
      }
    }
  }
}

}  // namespace timm_dynamic::ISA
