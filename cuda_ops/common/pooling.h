// Average pooling of float32 maps, for one instruction set; see common/vectors.h for what the
// includer defines.

#include "common/vectors.h"

namespace timm_dynamic::ISA {

struct Maps {
  int64_t C, H, W;
  bool channels_last;
};

// Adds `columns` pixels of some rows, of `C` numbers each, to `to`, for up to kCount vectors of
// them.
template <int kCount>
INLINE void add_vectors(const float* from, int64_t C, int64_t row_pitch, int64_t rows,
                        int64_t columns, int64_t channels, float* to) {
  constexpr int64_t n = kLanes<float>;
  Vec<float> sums[kCount] = {};
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = 0; x < columns; ++x)
#pragma GCC unroll 8
      for (int v = 0; v < kCount; ++v)
        sums[v] += load<float>(from + y * row_pitch + x * C + v * n, channels - v * n);
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) store<float>(to + v * n, sums[v], channels - v * n);
}

// The same for all `channels`.
template <int kCount = 8>
INLINE void add_pixels(const float* from, int64_t C, int64_t row_pitch, int64_t rows,
                       int64_t columns, int64_t channels, float* to) {
  constexpr int64_t whole = kCount * kLanes<float>;
  for (; channels >= whole; channels -= whole, from += whole, to += whole)
    add_vectors<kCount>(from, C, row_pitch, rows, columns, whole, to);
  if constexpr (kCount > 1)
    add_pixels<kCount - 1>(from, C, row_pitch, rows, columns, channels, to);
  else if (channels)
    add_vectors<1>(from, C, row_pitch, rows, columns, channels, to);
}

// [B, C, size, size] means of x, cut as adaptive_avg_pool2d does it; units are (b, c).
inline void pool(const float* x, const Maps& maps, int64_t size, float* pooled, int64_t begin,
                 int64_t end) {
  const auto [C, H, W, channels_last] = maps;
  const int64_t cells = size * size;
  std::vector<float> sums(channels_last ? C : 0);
  for (int64_t i = begin, next; i < end; i = next) {
    const int64_t b = i / C, c = i % C, channels = std::min(C - c, end - i);
    next = channels_last ? i + channels : i + 1;
    for (int64_t cell = 0; cell < cells; ++cell) {
      const int64_t top = cell / size * H / size,
                    bottom = ((cell / size + 1) * H + size - 1) / size;
      const int64_t left = cell % size * W / size;
      const int64_t right = ((cell % size + 1) * W + size - 1) / size;
      const int64_t rows = bottom - top, columns = right - left;
      float* const to = pooled + i * cells + cell;
      if (channels_last) {
        add_pixels(x + ((b * H + top) * W + left) * C + c, C, W * C, rows, columns, channels,
                   sums.data());
        for (int64_t k = 0; k < channels; ++k) to[k * cells] = sums[k] / (rows * columns);
        continue;
      }
      const float* const map = x + i * H * W;
      float sum = 0;
      if (columns == W)  // whole rows, one after the other
        sum = sum_of(map + top * W, rows * W);
      else
        for (int64_t y = top; y < bottom; ++y) sum += sum_of(map + y * W + left, columns);
      *to = sum / (rows * columns);
    }
  }
}

}  // namespace timm_dynamic::ISA
