// The CPU kernel of mixtures.cpp for channels_last maps, for one instruction set; see
// common/vectors.h for what the includer defines.
//
// Some outputs at a time, their weights of a sample are a panel, [Kh * Kw * C, outputs], which
// meets the pixels as they lie in memory: kOutputs positions at a time, each tap reads C numbers of
// each.

#include "channel_fusion/winograd.h"

namespace timm_dynamic::ISA {

// Elements of panels that are there together, positions that meet them before the next ones, and
// elements of a kernel's rows that are mixed before they go to the panel: of a quarter or of four
// times as many, some 5 % slower (layers of 7x7 at batch 16, AMD EPYC with AVX2, November 2026).
const int64_t kPanels = (getenv("WPAN") ? atoi(getenv("WPAN")) : 48) << 10;
constexpr int64_t kPixels = 32, kMixed = 512;

// Where the pixels are that taps read, zeros outside; and where a kernel's elements, (c, tap), are
// in a panel, (tap, c).
class Pixels {
 public:
  Pixels(const Mixtures& op) : op_(op), zeros_(op.C), order_(op.whole_depth()) {
    for (int64_t k = 0; k < op.whole_depth(); ++k) order_[k] = k % op.taps() * op.C + k / op.taps();
  }

  // Of `rows` rows of a sample's output.
  void add(int64_t b, int64_t row, int64_t rows) {
    const float* const sample = op_.x + b * op_.H * op_.W * op_.C;
    for (int64_t y = row; y < row + rows; ++y)
      for (int64_t x = 0; x < op_.Wo; ++x)
        for (int64_t ky = 0; ky < op_.Kh; ++ky)
          for (int64_t kx = 0; kx < op_.Kw; ++kx) {
            const int64_t i = y * op_.stride_y - op_.padding_y + ky * op_.dilation_y;
            const int64_t j = x * op_.stride_x - op_.padding_x + kx * op_.dilation_x;
            const bool inside = i >= 0 && i < op_.H && j >= 0 && j < op_.W;
            pixels_.push_back(inside ? sample + (i * op_.W + j) * op_.C : zeros_.data());
          }
  }
  void clear() { pixels_.clear(); }

  // What the taps of position i read, in the order in which positions were added.
  const float* const* at(int64_t i) const { return pixels_.data() + i * op_.taps(); }
  const int64_t* order() const { return op_.taps() > 1 ? order_.data() : nullptr; }

 private:
  const Mixtures& op_;
  std::vector<float> zeros_;
  std::vector<int64_t> order_;
  std::vector<const float*> pixels_;
};

// Elements [first, first + depth) of `rows` rows, `pitch` apart, to as many columns of a panel that
// is `width` wide, and zeros to their last vector's end; times the gates of elements, if there are
// any. `order` is null where they keep theirs.
inline void fill_panel(const float* from, int64_t pitch, int64_t rows, int64_t first, int64_t depth,
                       const float* gates, const int64_t* order, float* panel, int64_t width) {
  constexpr int64_t n = kLanes<float>;
  for (int64_t i = 0; i < rows; i += n, from += n * pitch)
    for (int64_t j = 0; j < depth; j += n) {
      const int64_t count = std::min(n, depth - j);
      const Vec<float> gate = gates ? load<float>(gates + j, count) : broadcast(1.0f);
      Vec<float> square[n];
#pragma GCC unroll 16
      for (int64_t r = 0; r < n; ++r)
        square[r] = i + r < rows ? gate * load<float>(from + r * pitch + j, count) : Vec<float>{};
      transpose<float>(square);
#pragma GCC unroll 16
      for (int64_t r = 0; r < n; ++r) {
        if (r >= count) break;
        const int64_t k = first + j + r;
        store<float>(panel + (order ? order[k] : k) * width + i, square[r]);
      }
    }
}

// The panels of outputs [row, row + rows) of the samples b and, if kSamples is 2, the next one, at
// `panel` and `size` behind it.
template <int kSamples>
INLINE void make_panels(const Mixtures& op, int64_t b, int64_t row, int64_t rows,
                        const int64_t* order, float* scratch, float* panel, int64_t size,
                        int64_t width) {
  const int64_t whole = op.whole_depth(), pitch = kStrip * kMixed;
  Mixtures weights = op;
  weights.a_out = nullptr;  // it is of the results
  std::vector<float> coefficients(kSamples * op.N);
  for (int64_t k = 0; k < whole; k += kMixed) {
    const int64_t depth = std::min(kMixed, whole - k);
    mix_panels<kSamples>(weights, b, row, rows, k, depth, coefficients.data(), scratch, pitch);
    for (int64_t s = 0; s < kSamples; ++s)
      fill_panel(scratch + s * pitch, depth, rows, k, depth, nullptr, order, panel + s * size,
                 width);
  }
}

constexpr int kCellVectors = 3;  // of a row of all cells that are mixed together

// Mixtures for kTaps taps of `values`, [N, kCellVectors], each with coefficients of its own,
// `apart` from those of the tap before; they are C apart in `to`.
template <int kTaps>
INLINE void mix_cells(const float* values, int64_t N, const float* coefficients, int64_t apart,
                      int64_t left, float* to, int64_t C) {
  constexpr int64_t n = kLanes<float>;
  Vec<float> sums[kTaps][kCellVectors] = {};
  for (int64_t cell = 0; cell < N; ++cell, values += kCellVectors * n)
#pragma GCC unroll 3
    for (int tap = 0; tap < kTaps; ++tap)
#pragma GCC unroll 3
      for (int v = 0; v < kCellVectors; ++v)
        sums[tap][v] += broadcast(coefficients[tap * apart + cell]) * load<float>(values + v * n);
#pragma GCC unroll 3
  for (int tap = 0; tap < kTaps; ++tap)
#pragma GCC unroll 3
    for (int v = 0; v < kCellVectors; ++v)
      store<float>(to + tap * C + v * n, sums[tap][v], left - v * n);
}

INLINE int64_t cell_scratch(const Mixtures& op, int64_t samples) {
  return kLanes<float> * (op.N * kCellVectors + samples * op.whole_depth());
}

// The panels of kernels of cells, whose elements are (tap, c), of some samples.
INLINE void make_cell_panels(const Mixtures& op, int64_t b, int64_t samples, int64_t row,
                             int64_t rows, float* scratch, float* panel, int64_t size,
                             int64_t width) {
  constexpr int64_t n = kLanes<float>;
  const int64_t whole = op.whole_depth(), taps = op.taps();
  const int64_t outputs = op.O / op.cell_outputs, inputs = op.C / op.cell_inputs;
  const int64_t apart = outputs * inputs * op.N;  // of the coefficients of one tap and the next
  float* const kernels = scratch + op.N * kCellVectors * n;
  for (int64_t i = 0; i < rows; i += n) {
    const int64_t count = std::min(n, rows - i);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t input = 0; input < inputs; ++input) {
        const int64_t o = row + i + r, block = o / op.cell_outputs * inputs + input;
        const float* const from = op.kernels + o % op.cell_outputs * op.cell_inputs;
        for (int64_t c = 0; c < op.cell_inputs; c += kCellVectors * n) {
          const int64_t left = op.cell_inputs - c;
          // Cells are apart by a power of two, so that their rows would share few sets of the
          // cache.
          for (int64_t cell = 0; cell < op.N; ++cell) {
            const float* const at = from + cell * op.cell_outputs * op.cell_inputs + c;
            // The next row, which else is waited for: of a layer's time for one sample a tenth (512
            // channels at 7x7, 27 cells, AMD EPYC with AVX2, November 2026).
            for (int64_t k = 0; k < kCellVectors * n; k += 16)
              __builtin_prefetch(at + op.cell_inputs + k, 0, 2);
#pragma GCC unroll 3
            for (int v = 0; v < kCellVectors; ++v)
              store<float>(scratch + (cell * kCellVectors + v) * n,
                           load<float>(at + v * n, left - v * n));
          }
          for (int64_t s = 0; s < samples; ++s) {
            const float* coefficients = op.attention + (b + s) * taps * apart + block * op.N;
            float* to = kernels + (s * n + r) * whole + input * op.cell_inputs + c;
            for (int64_t tap = 0, together; tap < taps; tap += together) {
              together = taps - tap < 3 ? 1 : 3;
              const auto mix = together == 3 ? mix_cells<3> : mix_cells<1>;
              mix(scratch, op.N, coefficients, apart, left, to, op.C);
              coefficients += together * apart, to += together * op.C;
            }
          }
        }
      }
    for (int64_t s = 0; s < samples; ++s)
      fill_panel(kernels + s * n * whole, whole, count, 0, whole, nullptr, nullptr,
                 panel + s * size + i, width);
  }
}

// The same of one kernel, and that of p behind it.
INLINE void copy_panel(const Mixtures& op, int64_t b, int64_t row, int64_t rows,
                       const int64_t* order, float*, float* panel, int64_t, int64_t width) {
  const int64_t whole = op.whole_depth();
  fill_panel(op.kernels + b * op.kernel_stride + row * whole, whole, rows, 0, whole,
             op.pairs ? op.pairs + b * whole : nullptr, order, panel, width);
  if (op.L)
    fill_panel(op.p + row * op.L, op.L, rows, 0, op.L, nullptr, nullptr, panel + whole * width,
               width);
}

// What follows the products, of outputs [row, row + rows) at positions at(r); where that is
// negative there is none. `panel` is that of p. kWhole: these are kOutputs, the outputs whole
// vectors.
template <int kWidth, bool kWhole, typename F>
INLINE void finish_strip(const Mixtures& op, int64_t b, int64_t row, int64_t rows,
                         const float* panel, Sums<kWidth>& sums, const F& at) {
  constexpr int64_t n = kLanes<float>;
  if (kWhole) rows = kWidth * n;
  if (op.a_out) {
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v) {
      const Vec<float> gate =
          load<float>(op.a_out + b * op.a_out_stride + row + v * n, rows - v * n);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kOutputs; ++r) sums[r][v] *= gate;
    }
  }
  if (op.L) {
    const float* latent[kOutputs];
    for (int64_t r = 0; r < kOutputs; ++r)
      latent[r] = op.v + (b * op.positions() + std::max<int64_t>(at(r), 0)) * op.L;
    accumulate<kWidth>(sums, latent, op.L, panel);
  }
  const Vec<float> low = broadcast(op.low), high = broadcast(op.high);
#pragma GCC unroll 8  // or the sums would be in memory
  for (int v = 0; v < kWidth; ++v) {
    const int64_t first = row + v * n, left = rows - v * n;
    const float* const shift = op.shift ? op.shift + b * op.shift_stride + first : nullptr;
    const Vec<float> added = shift ? load<float>(shift, left) : Vec<float>{};
    const Vec<float> scale =
        op.base ? load<float>(op.base_scale + b * op.O + first, left) : Vec<float>{};
#pragma GCC unroll 8
    for (int64_t r = 0; r < kOutputs; ++r) {
      if (!kWhole && at(r) < 0) continue;
      const int64_t to = (b * op.positions() + at(r)) * op.O + first;
      Vec<float> y = sums[r][v] + added;
      if (op.base) y += scale * load<float>(op.base + to, left);
      y = y < low ? low : y;  // NaN stays NaN
      y = y > high ? high : y;
      store<float>(op.out + to, y, left);
    }
  }
}

// A panel's outputs [row, row + rows) at `count` positions. kWhole: these are kOutputs, those whole
// vectors.
template <int kWidth, bool kWhole>
INLINE void pixel_strip(const Mixtures& op, int64_t b, int64_t row, int64_t rows,
                        const float* panel, const float* const* pixels, int64_t position,
                        int64_t count) {
  if (kWhole) count = kOutputs;
  const float* matrix[kOutputs];
  Sums<kWidth> sums = {};
  for (int64_t tap = 0; tap < op.taps(); ++tap, panel += op.C * kWidth * kLanes<float>) {
    for (int64_t r = 0; r < kOutputs; ++r)
      matrix[r] = pixels[std::min(r, count - 1) * op.taps() + tap];
    accumulate<kWidth>(sums, matrix, op.C, panel);
  }
  finish_strip<kWidth, kWhole>(op, b, row, rows, panel, sums,
                               [&](int64_t r) { return r < count ? position + r : -1; });
}

// The same at any number of positions.
template <int kWidth>
INLINE void pixel_strips(const Mixtures& op, int64_t b, int64_t row, int64_t rows,
                         const float* panel, const float* const* pixels, int64_t position,
                         int64_t count) {
  const bool whole = rows == kWidth * kLanes<float>;
  for (; count > 0; count -= kOutputs, position += kOutputs, pixels += kOutputs * op.taps())
    if (whole && count >= kOutputs)
      pixel_strip<kWidth, true>(op, b, row, rows, panel, pixels, position, kOutputs);
    else
      pixel_strip<kWidth, false>(op, b, row, rows, panel, pixels, position,
                                 std::min(count, kOutputs));
}

template <int kWidth>
INLINE void winograd_strip(const Mixtures& op, Winograd& winograd, int64_t s, int64_t b,
                           int64_t row, int64_t rows, const float* weights, const float* panel) {
  winograd.run<kWidth>(s, weights, [&](Sums<kWidth>& sums, const auto& at) {
    finish_strip<kWidth, false>(op, b, row, rows, panel, sums, at);
  });
}

// Units are (samples or rows of one, part of the outputs).
inline void pixel_mixtures(const Mixtures& op, int64_t begin, int64_t end) {
  constexpr int64_t n = kLanes<float>;
  const int64_t whole = op.whole_depth(), depth = whole + op.L, vectors = (op.O + n - 1) / n;
  // Of the outputs, those whose panels are there together.
  const int64_t chunk =
      std::min(std::max<int64_t>(kPanels / (depth * kStrip), 1) * kVectors, vectors);
  const int64_t size = depth * n * chunk;
  // Samples whose panels are made together: each time the kernels are read. With four or sixteen no
  // time is saved (512 channels at 7x7, batch 16, 27 cells, AMD EPYC with AVX2, November 2026).
  const int64_t together = op.attention ? 2 : 1;
  const bool shared = together == 1 && !op.pairs && op.kernel_stride == 0;
  const auto panels = std::make_unique_for_overwrite<float[]>(together * size);
  const auto scratch =
      std::make_unique_for_overwrite<float[]>(op.cell_outputs ? cell_scratch(op, together)
                                              : op.attention  ? 2 * kStrip * kMixed
                                                              : 0);
  Pixels pixels(op);
  std::optional<Winograd> winograd;
  std::vector<float> transformed;
  if (op.winograd)
    winograd.emplace(op),
        transformed.resize((chunk + kVectors - 1) / kVectors * Winograd::size(op, kStrip));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t unit = i / op.parts, part = i % op.parts;
    const int64_t b = unit / op.row_blocks * op.samples, samples = std::min(op.samples, op.B - b);
    const int64_t y = unit % op.row_blocks * op.rows, rows = std::min(op.rows, op.Ho - y);
    const int64_t positions = rows * op.Wo, last = (part + 1) * vectors / op.parts;
    pixels.clear();
    for (int64_t s = 0; s < samples; ++s)
      if (winograd)
        winograd->read(s, b + s, y, rows);
      else
        pixels.add(b + s, y, rows);
    for (int64_t at = part * vectors / op.parts; at < last; at += chunk) {
      // Calls f(first output, outputs, vectors, panel) for every strip of them.
      const auto each_strip = [&](float* panel, const auto& f) {
        const int64_t stop = std::min(at + chunk, last);
        for (int64_t first = at; first < stop;) {
          const int64_t width = strip_vectors(stop - first);
          f(first * n, std::min(width * n, op.O - first * n), width, panel);
          first += width, panel += width * n * depth;
        }
      };
      for (int64_t s = 0; s < samples; ++s) {
        float* const to = panels.get() + s % together * size;
        if (s % together == 0 && (s == 0 || !shared))
          each_strip(to, [&](int64_t row, int64_t outputs, int64_t width, float* panel) {
            if (op.cell_outputs)
              return make_cell_panels(op, b + s, std::min(together, samples - s), row, outputs,
                                      scratch.get(), panel, size, width * n);
            const auto make = together == 1     ? copy_panel
                              : s + 1 < samples ? make_panels<2>
                                                : make_panels<1>;
            make(op, b + s, row, outputs, winograd ? nullptr : pixels.order(), scratch.get(), panel,
                 size, width * n);
          });
        if (winograd) {
          float* weights = transformed.data();
          each_strip(to, [&](int64_t row, int64_t outputs, int64_t width, float* panel) {
            const bool by_tap = op.cell_outputs > 0;
            if (s == 0 || !shared)
              Winograd::transform_weights(op, panel, by_tap ? op.C : 1, by_tap ? 1 : op.taps(),
                                          width * n, weights);
            const auto run = width == 3   ? winograd_strip<3>
                             : width == 2 ? winograd_strip<2>
                                          : winograd_strip<1>;
            run(op, *winograd, s, b + s, row, outputs, weights, panel + whole * width * n);
            weights += Winograd::size(op, width * n);
          });
          continue;
        }
        for (int64_t p = 0; p < positions; p += kPixels)
          each_strip(to, [&](int64_t row, int64_t outputs, int64_t width, float* panel) {
            const auto run = width == 3   ? pixel_strips<3>
                             : width == 2 ? pixel_strips<2>
                                          : pixel_strips<1>;
            run(op, b + s, row, outputs, panel, pixels.at(s * positions + p), y * op.Wo + p,
                std::min(kPixels, positions - p));
          });
      }
    }
  }
}

}  // namespace timm_dynamic::ISA
