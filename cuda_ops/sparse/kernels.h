// Convolutions of listed positions, for one instruction set; see common/vectors.h for what the
// includer defines, and convolutions.cpp for the operators.

#include "common/vectors.h"

namespace timm_dynamic::ISA {

// A tile of the result, in registers: V vectors of columns by so many rows.
template <int V>
constexpr int kTileRows = ISA_LEVEL == 4   ? (V <= 2   ? 12
                                              : V == 3 ? 8
                                                       : 6)
                          : ISA_LEVEL == 2 ? 6
                                           : 4;
constexpr int64_t kDepth = 256;  // inputs of a tile between two visits, to stay in the cache

template <int R, int V>
struct Tile {
  Vec<float> sums[R][V];

  // Adds `depth` columns of R rows times as many rows of a panel, `width` apart.
  INLINE void multiply(const float* const* rows, const float* panel, int64_t width, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, panel += width) {
      Vec<float> values[V];
      for (int v = 0; v < V; ++v) values[v] = load<float>(panel + v * kLanes<float>);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] += broadcast(rows[r][k]) * values[v];
    }
  }
};

INLINE Vec<float> clamp(Vec<float> v, float low, float high) {
  v = v < low ? broadcast(low) : v;  // NaN stays
  return v > high ? broadcast(high) : v;
}

// R rows from `row` on and V vectors of columns from `column` on, of a panel and a part of the
// inputs. `partial` holds the sums between two parts.
template <int R, int V>
INLINE void gather_tile(const GatherConv& op, int64_t row, int64_t panel, int64_t column,
                        int64_t tap, int64_t first, int64_t depth, float* partial) {
  const float* rows[R];
  for (int r = 0; r < R; ++r) {
    const int64_t at = op.table ? op.table[(row + r) * op.T + tap] : row + r;
    rows[r] = at < 0 ? op.zeros : op.source + at * op.C + first;
  }
  constexpr int64_t n = kLanes<float>;
  const int64_t begin = panel * op.width + column, inputs = op.T * op.C, done = tap * op.C + first;
  Tile<R, V> tile;
  for (int v = 0; v < V; ++v) {
    const Vec<float> bias = load<float>(op.bias + begin + v * n, op.N - begin - v * n);
    for (int r = 0; r < R; ++r)
      tile.sums[r][v] = done ? load<float>(partial + r * op.width + column + v * n) : bias;
  }
  tile.multiply(rows, op.matrix + (panel * inputs + done) * op.width + column, op.width, depth);
  if (done + depth < inputs) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        store<float>(partial + r * op.width + column + v * n, tile.sums[r][v]);
    return;
  }
  for (int r = 0; r < R; ++r) {
    if (op.positions && op.positions[row + r] < 0) continue;
    const int64_t to = (op.positions ? op.positions[row + r] : row + r) * op.N + begin;
    for (int v = 0; v < V; ++v) {
      const int64_t count = op.N - begin - v * n;
      Vec<float> sum = tile.sums[r][v];
      if (op.positions) sum += load<float>(op.out + to + v * n, count);
      store<float>(op.out + to + v * n, clamp(sum, op.low, op.high), count);
    }
  }
}

template <int V, int R>
inline void gather_rows(const GatherConv& op, int64_t row, int64_t panel, int64_t tap,
                        int64_t first, int64_t depth, float* partial) {
  for (int64_t column = 0; column < op.width; column += V * kLanes<float>)
    gather_tile<R, V>(op, row, panel, column, tap, first, depth, partial);
}

// Units are (panel, block of rows). A panel's width is a multiple of V vectors.
template <int V, int... R>
INLINE void gather_panels(const GatherConv& op, int64_t begin, int64_t end,
                          std::integer_sequence<int, R...>) {
  constexpr decltype(&gather_rows<V, 1>) kRuns[] = {gather_rows<V, R + 1>...};
  const auto scratch = std::make_unique_for_overwrite<float[]>((op.M / op.blocks + 1) * op.width);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t panel = unit / op.blocks, block = unit % op.blocks;
    const int64_t first_row = block * op.M / op.blocks;
    const int64_t count = (block + 1) * op.M / op.blocks - first_row;
    // Tiles as equal as can be: one of few rows costs as much as a full one.
    const int64_t tiles = (count + sizeof...(R) - 1) / sizeof...(R);
    for (int64_t tap = 0; tap < op.T; ++tap)
      for (int64_t first = 0; first < op.C; first += kDepth)
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t row = tile * count / tiles, rows = (tile + 1) * count / tiles - row;
          kRuns[rows - 1](op, first_row + row, panel, tap, first, std::min(kDepth, op.C - first),
                          scratch.get() + row * op.width);
        }
  }
}

template <int V>
inline void gather_panels(const GatherConv& op, int64_t begin, int64_t end) {
  gather_panels<V>(op, begin, end, std::make_integer_sequence<int, kTileRows<V>>());
}

inline void gather_conv(const GatherConv& op, int64_t begin, int64_t end) {
#if ISA_LEVEL == 4
  if (op.width == 64) return gather_panels<4>(op, begin, end);
  if (op.width == 48) return gather_panels<3>(op, begin, end);
  if (op.width == 16) return gather_panels<1>(op, begin, end);
#endif
  gather_panels<2>(op, begin, end);
}

// R rows from `row` on, V vectors of channels from `channel` on.
template <int R, int V>
INLINE void depthwise_tile(const GatherDepthwise& op, int64_t row, int64_t channel) {
  constexpr int64_t n = kLanes<float>;
  const int64_t left = op.C - channel;
  Vec<float> sums[R][V];
  for (int v = 0; v < V; ++v)
    for (int r = 0; r < R; ++r) sums[r][v] = load<float>(op.bias + channel + v * n, left - v * n);
  for (int64_t t = 0; t < op.T; ++t) {
    Vec<float> weights[V];
    for (int v = 0; v < V; ++v)
      weights[v] = load<float>(op.weight + t * op.C + channel + v * n, left - v * n);
    for (int r = 0; r < R; ++r) {
      const int64_t at = op.table[(row + r) * op.T + t];
      const float* const from = at < 0 ? op.zeros : op.source + at * op.C + channel;
      for (int v = 0; v < V; ++v)
        sums[r][v] += weights[v] * load<float>(from + v * n, left - v * n);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      store<float>(op.out + (row + r) * op.C + channel + v * n, clamp(sums[r][v], op.low, op.high),
                   left - v * n);
}

template <int R>
inline void depthwise_rows(const GatherDepthwise& op, int64_t row) {
  constexpr int64_t n = kLanes<float>;
  int64_t channel = 0;
  for (; channel + 2 * n <= op.C; channel += 2 * n) depthwise_tile<R, 2>(op, row, channel);
  for (; channel < op.C; channel += n) depthwise_tile<R, 1>(op, row, channel);
}

// Units are blocks of rows.
inline void gather_depthwise(const GatherDepthwise& op, int64_t begin, int64_t end) {
  int64_t row = begin * kDepthwiseRows;
  const int64_t last = std::min(end * kDepthwiseRows, op.M);
  for (; row + 4 <= last; row += 4) depthwise_rows<4>(op, row);
  for (; row < last; ++row) depthwise_rows<1>(op, row);
}

// Units are rows of the mask.
inline void mask_logits(const MaskLogits& op, int64_t begin, int64_t end) {
  const Window<int64_t>& w = op.window;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / w.Ho, y = i % w.Ho;
    const float* const dots = op.dots + b * w.H * w.W * kDots;
    for (int64_t x = 0; x < w.Wo; ++x) {
      float sum = op.means[b];
      w.each_tap(y, x, [&](int64_t tap, int64_t at) { sum += dots[at * kDots + tap]; });
      op.out[i * w.Wo + x] = sum;
    }
  }
}

inline SparseKernels sparse_kernels() { return {gather_conv, gather_depthwise, mask_logits}; }

}  // namespace timm_dynamic::ISA
