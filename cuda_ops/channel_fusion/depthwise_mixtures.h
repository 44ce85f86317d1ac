// The CPU kernel of mixtures.cpp for depthwise convolutions, for one instruction set; see
// common/vectors.h for what the includer defines.
//
// Some channels at a time, the rows of the map that are read are copied with their padding to
// where all of them stay in the cache: no tap has to ask whether it is outside.

#include "channel_fusion/pixel_mixtures.h"

namespace timm_dynamic::ISA {

constexpr int kTile = 2;  // vectors of channels
constexpr int64_t kTileWidth = kTile * kLanes<float>;
constexpr int64_t kAhead = 4;  // positions that meet the weights together

class DepthwiseTile {
 public:
  DepthwiseTile(const Mixtures& op)
      : op_(op),
        height_((op.rows - 1) * op.stride_y + (op.Kh - 1) * op.dilation_y + 1),
        width_(op.W + 2 * op.padding_x),
        padded_(height_ * width_ * kTileWidth),
        scratch_((op.taps() + 1) * kTileWidth),
        weights_((op.taps() + op.L) * kTileWidth),
        line_(op.Wo * kTileWidth),
        coefficients_(op.N) {}

  // Rows [y, y + rows) of the output of channels [first, first + channels).
  void run(int64_t b, int64_t first, int64_t channels, int64_t y, int64_t rows) {
    mix(b, first, channels);
    pad(b, first, channels, y, rows);
    const int64_t size = op_.channels_last ? op_.O : kTileWidth;
    for (int64_t row = 0; row < rows; ++row) {
      float* const out = op_.out + b * op_.positions() * op_.O;
      float* const to = op_.channels_last ? out + (y + row) * op_.Wo * op_.O + first : line_.data();
      // The last positions are computed twice where they are no whole number of times as many.
      const bool ahead = op_.Wo >= kAhead;
      for (int64_t x = 0; x < op_.Wo; x += ahead ? kAhead : 1) {
        const int64_t at = ahead ? std::min(x, op_.Wo - kAhead) : x;
        const auto run = ahead ? &DepthwiseTile::positions<kAhead> : &DepthwiseTile::positions<1>;
        (this->*run)(b, first, channels, y, row, at, to + at * size, size);
      }
      if (!op_.channels_last)
        copy_transposed<false>(out + first * op_.positions() + (y + row) * op_.Wo, op_.positions(),
                               line_.data(), kTileWidth, 1, op_.Wo, channels);
    }
  }

 private:
  // A sample's gated weights, [taps, channels], and those of p behind them.
  void mix(int64_t b, int64_t first, int64_t channels) {
    constexpr int64_t n = kLanes<float>;
    const int64_t taps = op_.taps(), count = channels * taps;
    const float* const nothing[1] = {};
    for (int64_t i = 0; i < op_.N; ++i)
      coefficients_[i] = op_.attention ? op_.attention[b * op_.N + i] : 1.0f;
    for (int64_t k = 0; k < count; k += n)
      mix_vectors<1, 1>(op_.kernels + first * taps + k, op_.O * taps, op_.N, coefficients_.data(),
                        nothing, 0, scratch_.data() + k, 0, count - k);
    fill_panel(scratch_.data(), taps, channels, 0, taps, op_.pairs ? op_.pairs + b * taps : nullptr,
               nullptr, weights_.data(), kTileWidth);
    if (op_.L)
      fill_panel(op_.p + first * op_.L, op_.L, channels, 0, op_.L, nullptr, nullptr,
                 weights_.data() + taps * kTileWidth, kTileWidth);
    if (!op_.a_out) return;
    for (int64_t c = 0; c < channels; c += n) {
      const Vec<float> gate =
          load<float>(op_.a_out + b * op_.a_out_stride + first + c, channels - c);
      for (int64_t tap = 0; tap < taps; ++tap) {
        float* const at = weights_.data() + tap * kTileWidth + c;
        store<float>(at, gate * load<float>(at));
      }
    }
  }

  void pad(int64_t b, int64_t first, int64_t channels, int64_t y, int64_t rows) {
    const int64_t height = height_ - (op_.rows - rows) * op_.stride_y;
    const float* const sample = op_.x + b * op_.H * op_.W * op_.O;
    for (int64_t i = 0; i < height; ++i) {
      const int64_t row = y * op_.stride_y - op_.padding_y + i;
      float* to = padded_.data() + i * width_ * kTileWidth;
      if (row < 0 || row >= op_.H) {
        std::fill_n(to, width_ * kTileWidth, 0.0f);
        continue;
      }
      std::fill_n(to, op_.padding_x * kTileWidth, 0.0f);
      to += op_.padding_x * kTileWidth;
      std::fill_n(to + op_.W * kTileWidth, op_.padding_x * kTileWidth, 0.0f);
      if (!op_.channels_last) {
        copy_transposed<false>(to, kTileWidth, sample + first * op_.H * op_.W + row * op_.W,
                               op_.H * op_.W, 1, channels, op_.W);
        continue;
      }
      const float* from = sample + row * op_.W * op_.O + first;
      for (int64_t x = 0; x < op_.W; ++x, to += kTileWidth, from += op_.O)
        for (int64_t c = 0; c < channels; c += kLanes<float>)
          store<float>(to + c, load<float>(from + c, channels - c));
    }
  }

  // kCount positions of a row behind the y-th, `size` apart in `to`.
  template <int64_t kCount>
  void positions(int64_t b, int64_t first, int64_t channels, int64_t y, int64_t row, int64_t x,
                 float* to, int64_t size) const {
    constexpr int64_t n = kLanes<float>;
    const int64_t pitch = width_ * kTileWidth, step = op_.stride_x * kTileWidth;
    const float* const corner = padded_.data() + row * op_.stride_y * pitch + x * step;
    const float* weights = weights_.data();
    Vec<float> sums[kCount][kTile] = {};
    for (int64_t ky = 0; ky < op_.Kh; ++ky)
      for (int64_t kx = 0; kx < op_.Kw; ++kx, weights += kTileWidth) {
        const float* const from =
            corner + ky * op_.dilation_y * pitch + kx * op_.dilation_x * kTileWidth;
        const auto pixel = [&](int64_t r, int v) { return load<float>(from + r * step + v * n); };
        add(sums, weights, pixel);
      }
    const float* const latent = op_.v + (b * op_.positions() + (y + row) * op_.Wo + x) * op_.L;
    for (int64_t l = 0; l < op_.L; ++l, weights += kTileWidth)
      add(sums, weights, [&](int64_t r, int) { return broadcast(latent[r * op_.L + l]); });
    const Vec<float> low = broadcast(op_.low), high = broadcast(op_.high);
#pragma GCC unroll 2
    for (int v = 0; v < kTile; ++v) {
      const int64_t left = channels - v * n;
      if (left <= 0) break;
      const float* const shift =
          op_.shift ? op_.shift + b * op_.shift_stride + first + v * n : nullptr;
      const Vec<float> added = shift ? load<float>(shift, left) : Vec<float>{};
#pragma GCC unroll 4
      for (int64_t r = 0; r < kCount; ++r) {
        Vec<float> sum = sums[r][v] + added;
        sum = sum < low ? low : sum;  // NaN stays NaN
        sum = sum > high ? high : sum;
        store<float>(to + r * size + v * n, sum, left);
      }
    }
  }

  template <int64_t kCount, typename F>
  INLINE static void add(Vec<float> (&sums)[kCount][kTile], const float* weights, const F& pixel) {
#pragma GCC unroll 2
    for (int v = 0; v < kTile; ++v) {
      const Vec<float> weight = load<float>(weights + v * kLanes<float>);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kCount; ++r) sums[r][v] += weight * pixel(r, v);
    }
  }

  const Mixtures& op_;
  const int64_t height_, width_;
  // Not all are written where channels are no whole tile: numbers of other ones are there then.
  std::vector<float> padded_, scratch_, weights_, line_, coefficients_;
};

// Units are (sample, rows of its output, part of the channels).
inline void depthwise_mixtures(const Mixtures& op, int64_t begin, int64_t end) {
  DepthwiseTile tile(op);
  const int64_t tiles = (op.O + kTileWidth - 1) / kTileWidth;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t unit = i / op.parts, part = i % op.parts;
    const int64_t b = unit / op.row_blocks, y = unit % op.row_blocks * op.rows;
    for (int64_t at = part * tiles / op.parts; at < (part + 1) * tiles / op.parts; ++at)
      tile.run(b, at * kTileWidth, std::min(kTileWidth, op.O - at * kTileWidth), y,
               std::min(op.rows, op.Ho - y));
  }
}

inline MixtureKernels mixture_kernels() {
  return {mixtures, pixel_mixtures, depthwise_mixtures, kLanes<float>};
}

}  // namespace timm_dynamic::ISA
