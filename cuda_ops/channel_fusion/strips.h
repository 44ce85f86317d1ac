// Products of a matrix and a map's positions, some rows and vectors of positions at a time, for one
// instruction set; see common/vectors.h for what the includer defines.

#include "common/vectors.h"

namespace timm_dynamic::ISA {

constexpr int64_t kOutputs = ISA_LEVEL == 4 ? 8 : 4;
constexpr int kVectors = 3;  // as many accumulators for each output: within the registers
constexpr int64_t kStrip = kVectors * kLanes<float>;

template <int kWidth>
using Sums = Vec<float>[kOutputs][kWidth];

// sums[r] += sum_c rows[r][c] * x[c]; x is [C, kWidth vectors].
template <int kWidth>
INLINE void accumulate(Sums<kWidth>& sums, const float* const (&rows)[kOutputs], int64_t C,
                       const float* x) {
  for (int64_t c = 0; c < C; ++c, x += kWidth * kLanes<float>) {
    Vec<float> values[kWidth];
    for (int v = 0; v < kWidth; ++v) values[v] = load<float>(x + v * kLanes<float>);
    for (int64_t r = 0; r < kOutputs; ++r)
      for (int v = 0; v < kWidth; ++v) sums[r][v] += broadcast(rows[r][c]) * values[v];
  }
}

// Rows [0, count) of a [*, C] matrix; beyond, the last one again.
INLINE void take_rows(const float* (&rows)[kOutputs], const float* matrix, int64_t count,
                      int64_t C) {
  for (int64_t r = 0; r < kOutputs; ++r) rows[r] = matrix + std::min(r, count - 1) * C;
}

// Vectors of the next strip, of those that are left: 2 and 2 of 4.
INLINE int64_t strip_vectors(int64_t left) {
  return left == 4 ? 2 : std::min<int64_t>(left, kVectors);
}

// Divides `count` positions into strips of up to kVectors vectors, and a last one of single
// positions where they are few. Calls f(first, count, vectors), 0 vectors for single positions.
template <typename F>
INLINE void strips(int64_t count, const F& f) {
  constexpr int64_t n = kLanes<float>;
  int64_t at = 0;
  for (; count - at >= kStrip; at += kStrip) f(at, kStrip, kVectors);
  int64_t left = count - at;
  const int64_t singles = left % n <= n / 4 ? left % n : 0;
  left -= singles;
  if (left) f(at, left, static_cast<int>((left + n - 1) / n));
  if (singles) f(at + left, singles, 0);
}

// Puts rows [first, first + C) of a matrix of `rows` rows in the order in which they are used: by
// strips of positions, each [rows, vectors], or [positions, rows]. `from` is [C, pitch], of which
// `count` positions are taken, times the rows' scale if there is one.
INLINE void pack_rows(const float* from, int64_t pitch, const float* scale, int64_t C,
                      int64_t first, int64_t rows, int64_t count, float* packed) {
  strips(count, [&](int64_t at, int64_t n, int vectors) {
    float* to = packed + at * rows + first * (vectors ? vectors * kLanes<float> : 1);
    for (int64_t c = 0; c < C; ++c) {
      const float* const row = from + c * pitch + at;
      const float factor = scale ? scale[c] : 1.0f;
      for (int v = 0; v < vectors; ++v, to += kLanes<float>) {
        const int64_t skip = v * kLanes<float>;
        store<float>(to, broadcast(factor) * load<float>(row + skip, n - skip));
      }
      if (!vectors)
        for (int64_t k = 0; k < n; ++k) to[k * rows + c] = factor * row[k];
    }
  });
}

}  // namespace timm_dynamic::ISA
