// 3x3 convolutions of channels_last maps by Winograd's minimal filtering F(2x2, 3x3) (Lavin and
// Gray, CVPR 2016, arXiv 1509.09308), for one instruction set; see common/vectors.h for what the
// includer defines.
//
// A tile of 2x2 outputs is A' [(G g G') * (B' d B)] A: 16 products for each input and output where
// the sum has 36.

#include "channel_fusion/mixture_kernels.h"

namespace timm_dynamic::ISA {

class Winograd {
 public:
  explicit Winograd(const Mixtures& op)
      : op_(op),
        across_((op.Wo + 1) / 2),
        tiles_((op.rows + 1) / 2 * across_),
        pitch_(tiles_ * op.C + kGap),
        zeros_(op.C),
        inputs_(std::make_unique_for_overwrite<float[]>(op.samples * 16 * pitch_)),
        products_(std::make_unique_for_overwrite<float[]>(16 * tiles_ * kStrip)) {}

  // Floats of a strip's transformed weights.
  static int64_t size(const Mixtures& op, int64_t width) { return 16 * (op.C * width + kGap); }

  // Transforms what `rows` rows of the output of a unit's s-th sample read.
  void read(int64_t s, int64_t b, int64_t y, int64_t rows) {
    y_ = y, count_ = (rows + 1) / 2 * across_;
    const float* const sample = op_.x + b * op_.H * op_.W * op_.C;
    for (int64_t tile = 0; tile < count_; ++tile) {
      const float* pixels[16];
      for (int64_t k = 0; k < 16; ++k) {
        const int64_t i = y + tile / across_ * 2 - op_.padding_y + k / 4;
        const int64_t j = tile % across_ * 2 - op_.padding_x + k % 4;
        const bool inside = i >= 0 && i < op_.H && j >= 0 && j < op_.W;
        pixels[k] = inside ? sample + (i * op_.W + j) * op_.C : zeros_.data();
      }
      float* const to = inputs_.get() + s * 16 * pitch_ + tile * op_.C;
      for (int64_t c = 0; c < op_.C; c += kLanes<float>) {
        const int64_t left = op_.C - c;
        Vec<float> d[16], t[16];
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) d[k] = load<float>(pixels[k] + c, left);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) transform_input<4>(d + k, t + k);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) transform_input<1>(t + 4 * k, d + 4 * k);
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) store<float>(to + k * pitch_ + c, d[k], left);
      }
    }
  }

  // A strip's weights, whose taps and inputs are so many columns apart.
  static void transform_weights(const Mixtures& op, const float* panel, int64_t tap, int64_t input,
                                int64_t width, float* to) {
    const int64_t pitch = op.C * width + kGap;
    for (int64_t c = 0; c < op.C; ++c, panel += input * width)
      for (int64_t o = 0; o < width; o += kLanes<float>) {
        Vec<float> g[9], t[12], u[16];
#pragma GCC unroll 9
        for (int k = 0; k < 9; ++k) g[k] = load<float>(panel + k * tap * width + o);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) transform_weight<3, 3>(g + k, t + k);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) transform_weight<1, 1>(t + 3 * k, u + 4 * k);
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) store<float>(to + k * pitch + c * width + o, u[k]);
      }
  }

  // Of a strip, calls f(sums, at) for some tiles at a time: the outputs at positions at(r) of the
  // sample, of which some may be outside: -1.
  template <int kWidth, typename F>
  INLINE void run(int64_t s, const float* weights, const F& f) {
    constexpr int64_t width = kWidth * kLanes<float>;
    const float* rows[kOutputs];
    for (int64_t k = 0; k < 16; ++k)
      for (int64_t tile = 0; tile < count_; tile += kOutputs) {
        const int64_t count = std::min(kOutputs, count_ - tile);
        take_rows(rows, inputs_.get() + (s * 16 + k) * pitch_ + tile * op_.C, count, op_.C);
        Sums<kWidth> sums = {};
        accumulate<kWidth>(sums, rows, op_.C, weights + k * (op_.C * width + kGap));
        float* const to = products_.get() + (k * tiles_ + tile) * width;
#pragma GCC unroll 8
        for (int64_t r = 0; r < kOutputs; ++r) {
          if (r >= count) break;
#pragma GCC unroll 3
          for (int v = 0; v < kWidth; ++v)
            store<float>(to + r * width + v * kLanes<float>, sums[r][v]);
        }
      }
    constexpr int64_t kTiles = kOutputs / 4;
    for (int64_t tile = 0; tile < count_; tile += kTiles) {
      Sums<kWidth> sums;
#pragma GCC unroll 2
      for (int64_t i = 0; i < kTiles; ++i)
#pragma GCC unroll 3
        for (int v = 0; v < kWidth; ++v) {
          const float* const from =
              products_.get() + std::min(tile + i, count_ - 1) * width + v * kLanes<float>;
          Vec<float> m[16], t[8], y[4];
#pragma GCC unroll 16
          for (int k = 0; k < 16; ++k) m[k] = load<float>(from + k * tiles_ * width);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) transform_output<4>(m + k, t + k);
#pragma GCC unroll 2
          for (int k = 0; k < 2; ++k) transform_output<1, 1>(t + 4 * k, y + 2 * k);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) sums[4 * i + k][v] = y[k];
        }
      f(sums, [&](int64_t r) {
        const int64_t at = tile + r / 4, y = y_ + at / across_ * 2 + r % 4 / 2;
        const int64_t x = at % across_ * 2 + r % 2;
        return at < count_ && y < op_.Ho && x < op_.Wo ? y * op_.Wo + x : -1;
      });
    }
  }

 private:
  // Rows of a matrix are kStep apart, or columns.
  template <int kStep>
  INLINE static void transform_input(const Vec<float>* d, Vec<float>* t) {
    t[0] = d[0] - d[2 * kStep];
    t[kStep] = d[kStep] + d[2 * kStep];
    t[2 * kStep] = d[2 * kStep] - d[kStep];
    t[3 * kStep] = d[kStep] - d[3 * kStep];
  }
  template <int kStep, int kTo>
  INLINE static void transform_weight(const Vec<float>* g, Vec<float>* t) {
    const Vec<float> half = broadcast(0.5f);
    const Vec<float> outer = half * (g[0] + g[2 * kStep]), inner = half * g[kStep];
    t[0] = g[0], t[kTo] = outer + inner, t[2 * kTo] = outer - inner, t[3 * kTo] = g[2 * kStep];
  }
  template <int kStep, int kTo = kStep>
  INLINE static void transform_output(const Vec<float>* m, Vec<float>* t) {
    t[0] = m[0] + m[kStep] + m[2 * kStep];
    t[kTo] = m[kStep] - m[2 * kStep] - m[3 * kStep];
  }

  // Between what is a power of two apart otherwise: few such lines fit into the cache.
  static constexpr int64_t kGap = 16;
  const Mixtures& op_;
  const int64_t across_, tiles_, pitch_;
  int64_t y_ = 0, count_ = 0;
  const std::vector<float> zeros_;
  const std::unique_ptr<float[]> inputs_, products_;
};

}  // namespace timm_dynamic::ISA
