// CUDA kernels of timm_dynamic::scaled_sum and ::scaled_sum_backward, which
// timm_dynamic/ops/scaled_sum.py defines.
//
// Both read and write every map once. With ones for y, which are not read, they are the gradient of
// timm_dynamic::sum_and_project and that operator itself.
//
// A sample's maps are a matrix whose rows lie one after the other: of channels (NCHW) or of
// positions (channels_last). A warp has 32 x 32 of it at a time, of which a lane has kRows rows and
// kColumns columns, V adjacent ones of these at an address. The sums over latent channels, or going
// back over channels, are products of small matrices in shared memory: by tensor cores for the
// 16-bit types, else by float32 multiplications.

#include <type_traits>

#include "cuda_dtypes.h"
#include "cuda_mma.h"
#include "scaled_sum_cuda.h"

namespace timm_dynamic {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kSide = 32;  // of a warp's tile
constexpr int kRows = 4, kColumns = 8;
constexpr int kDepth = 16;  // of a product by the tensor cores
constexpr int kMostRows = kSide * kWarps, kMostColumns = 2 * kSide;

template <typename T>
constexpr bool kBy16 = sizeof(T) == 2;

// Elements that keep the rows of shared memory aligned, and adjacent ones out of the same banks.
template <typename T>
constexpr int kPad = 16 / sizeof(T);

// Where the u-th of a lane's columns is in its warp's tile, and back.
template <int V>
__device__ int column_of(int q, int u) {
  return u / V * (4 * V) + q * V + u % V;
}
template <int V>
__device__ int column_as_multiplied(int column) {
  const int q = column / V % 4, u = column / (4 * V) * V + column % V;
  return u / 2 * 8 + 2 * q + u % 2;
}

// An element of what may be float32 beside maps of T.
template <typename T>
__device__ float load(const void* from, int64_t i, bool wide) {
  return wide ? static_cast<const float*>(from)[i] : float(static_cast<const T*>(from)[i]);
}

template <typename T>
__device__ T narrowed(float value) {
  if constexpr (std::is_same_v<T, torch::headeronly::Half>) {  // infinity would make NaN of a zero
    value = value < -65504.f ? -65504.f : value > 65504.f ? 65504.f : value;
  }
  return T(value);
}

template <typename T>
__device__ uint32_t pair_at(const T* at) {
  return *reinterpret_cast<const uint32_t*>(at);
}

template <typename T>
__device__ uint32_t pair_of(T low, T high) {
  const T both[2] = {low, high};
  return uint32_t(reinterpret_cast<const uint16_t*>(both)[1]) << 16 |
         reinterpret_cast<const uint16_t*>(both)[0];
}

// Part of a matrix: elements x < size and l < length of it, at from[x * stride_x + l * stride_l].
struct Part {
  const void* from;
  int64_t first;
  int stride_x, stride_l;
  int size, length;
  bool wide;
};

// Calls put(x, l, value) for the first `xs` and `ls` elements of the part, zeros where it has none.
template <typename T, typename F>
__device__ void each_element(const Part& part, int xs, int ls, F put) {
  const bool along_l = part.stride_l == 1;  // the adjacent ones
  const int step_x = along_l ? kThreads / kDepth : kWarp, step_l = kThreads / step_x;
  const int x0 = along_l ? threadIdx.x / kDepth : threadIdx.x % kWarp;
  const int l0 = along_l ? threadIdx.x % kDepth : threadIdx.x / kWarp;
  for (int l = l0; l < ls; l += step_l) {
#pragma unroll 4
    for (int x = x0; x < xs; x += step_x) {
      const bool inside = x < part.size && l < part.length;
      const int64_t at = part.first + (x * part.stride_x + l * part.stride_l);
      put(x, l, inside ? load<T>(part.from, at, part.wide) : 0.f);
    }
  }
}

// What a lane has of a warp's tile of a matrix [rows, columns].
template <typename T, int V>
struct Tile {
  int64_t first;  // element
  int columns, rows_left, columns_left;

  __device__ Tile(int64_t matrix, int rows, int columns, int row, int column, int q)
      : first((matrix * rows + row) * columns + column + q * V),
        columns(columns),
        rows_left(rows - row),
        columns_left(columns - column - q * V) {}
  __device__ bool has(int i, int j) const { return 8 * i < rows_left && j * 4 * V < columns_left; }
  __device__ int64_t at(int i, int j) const { return first + int64_t(8 * i) * columns + j * 4 * V; }
  __device__ void load(const void* from, Vec<T, V> (&to)[kRows][kColumns / V]) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / V; ++j)
        to[i][j] = from && has(i, j)
                       ? *reinterpret_cast<const Vec<T, V>*>(static_cast<const T*>(from) + at(i, j))
                       : Vec<T, V>{};
  }
  __device__ void store(void* to, int i, int j, const Vec<T, V>& values) const {
    if (has(i, j)) *reinterpret_cast<Vec<T, V>*>(static_cast<T*>(to) + at(i, j)) = values;
  }
};

// Latent channels that are in shared memory at once.
template <typename T>
constexpr int kChunk = kBy16<T> ? 32 : 16;

// Rows, or columns, of a matrix: for the tensor cores [x][l], else [l][x].
template <typename T, int most>
struct Operand {
  static constexpr int kOuter = kBy16<T> ? most : kChunk<T>;
  static constexpr int kInner = (kBy16<T> ? kChunk<T> : most) + kPad<T>;
  alignas(16) T values[kOuter][kInner];

  __device__ void put(int x, int l, float value) {
    if constexpr (kBy16<T>) {
      values[x][l] = narrowed<T>(value);
    } else {
      values[l][x] = value;
    }
  }
};

// Adds to `sums` the product of `count` latent channels of 32 rows and 32 columns.
template <int V, typename T>
__device__ void multiply(float (&sums)[kRows][kColumns], const Operand<T, kMostRows>& rows, int row,
                         const Operand<T, kMostColumns>& columns, int column, int count) {
  const int g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
  if constexpr (kBy16<T>) {
    for (int l = 2 * q; l < count + 2 * q; l += kDepth) {
#pragma unroll
      for (int m = 0; m < kRows / 2; ++m) {
        const T(*const at)[Operand<T, kMostRows>::kInner] = &rows.values[row + 16 * m + g];
        const uint32_t a[4] = {pair_at(at[0] + l), pair_at(at[8] + l), pair_at(at[0] + l + 8),
                               pair_at(at[8] + l + 8)};
#pragma unroll
        for (int n = 0; n < kColumns / 2; ++n) {
          const T* const from = columns.values[column + 8 * n + g] + l;
          const uint32_t b[2] = {pair_at(from), pair_at(from + 8)};
          float c[4] = {sums[2 * m][2 * n], sums[2 * m][2 * n + 1], sums[2 * m + 1][2 * n],
                        sums[2 * m + 1][2 * n + 1]};
          multiply_add<T>(c, a, b);
          sums[2 * m][2 * n] = c[0], sums[2 * m][2 * n + 1] = c[1];
          sums[2 * m + 1][2 * n] = c[2], sums[2 * m + 1][2 * n + 1] = c[3];
        }
      }
    }
  } else {
    for (int l = 0; l < count; ++l) {
      Vec<T, V> b[kColumns / V];
#pragma unroll
      for (int j = 0; j < kColumns / V; ++j)
        b[j] = *reinterpret_cast<const Vec<T, V>*>(
            &columns.values[l][column + column_of<V>(q, j * V)]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float a = rows.values[l][row + g + 8 * i];
#pragma unroll
        for (int u = 0; u < kColumns; ++u) sums[i][u] = fmaf(a, b[u / V].at[u % V], sums[i][u]);
      }
    }
  }
}

// How blocks cut a sample's matrix.
struct Cut {
  int across;  // warps of a block that are side by side
  int rows, columns;

  DDF_HOST_DEVICE int block_rows() const { return kSide * (kWarps / across); }
  DDF_HOST_DEVICE int block_columns() const { return kSide * across; }
};

template <typename T, int V, bool channels_last>
__global__ void __launch_bounds__(kThreads, 4) scaled_sum(const ScaledSum op, const Cut cut) {
  __shared__ Operand<T, kMostRows> rows;
  __shared__ Operand<T, kMostColumns> columns;

  const ScaledSumShape& s = op.s;
  const int M = channels_last ? s.positions : s.O, N = channels_last ? s.O : s.positions;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
  const int b = blockIdx.x / (cut.rows * cut.columns);
  const int within = blockIdx.x % (cut.rows * cut.columns);
  const int row = within / cut.columns * cut.block_rows();
  const int column = within % cut.columns * cut.block_columns();
  const int own_row = warp / cut.across * kSide, own_column = warp % cut.across * kSide;
  const Tile<T, V> tile(b, M, N, row + own_row + g, column + own_column, q);
  Vec<T, V> in[kRows][kColumns / V];
  tile.load(op.y, in);

  float sums[kRows][kColumns];
  for (int l = 0; l < s.L; l += kChunk<T>) {
    const int count = min(s.L - l, kChunk<T>);
    const int filled = (count + kDepth - 1) / kDepth * kDepth;
    const int channel = channels_last ? column : row, position = channels_last ? row : column;
    const Part of_p{op.p,          int64_t(channel) * s.p_channel + int64_t(l) * s.p_latent,
                    s.p_channel,   s.p_latent,
                    s.O - channel, count,
                    s.wide};
    const Part of_v{op.v,
                    b * op.v_sample + int64_t(position) * op.v_position + int64_t(l) * op.v_channel,
                    op.v_position,
                    op.v_channel,
                    s.positions - position,
                    count,
                    s.wide};
    __syncthreads();
    each_element<T>(channels_last ? of_v : of_p, cut.block_rows(), filled,
                    [&](int x, int k, float value) { rows.put(x, k, value); });
    each_element<T>(channels_last ? of_p : of_v, cut.block_columns(), filled,
                    [&](int x, int k, float value) {
                      if constexpr (kBy16<T>) {
                        x = x / kSide * kSide + column_as_multiplied<V>(x % kSide);
                      }
                      columns.put(x, k, value);
                    });
    if (l == 0) {  // late, so that these loads and those above are under way together
#pragma unroll
      for (int u = 0; u < kColumns; ++u) {
        const int c = column + own_column + column_of<V>(q, u);
        const float by_column =
            channels_last && c < N ? load<T>(op.scale, int64_t(b) * N + c, s.wide) : 0.f;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int r = row + own_row + g + 8 * i;
          const float by_row =
              !channels_last && r < M ? load<T>(op.scale, int64_t(b) * M + r, s.wide) : 0.f;
          const float own = op.y ? float(in[i][u / V].at[u % V]) : 1.f;
          sums[i][u] = (channels_last ? by_column : by_row) * own;
        }
      }
    }
    __syncthreads();
    multiply<V>(sums, rows, own_row, columns, own_column, count);
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / V; ++j) {
      Vec<T, V> result;
#pragma unroll
      for (int k = 0; k < V; ++k) result.at[k] = T(sums[i][j * V + k]);
      tile.store(op.out, i, j, result);
    }
}

// Shared memory going back: the gradient as it lies in its matrix, and P as it is multiplied.
template <typename T>
struct GradientTile {
  static constexpr int kSide = kTileChannels + kPad<T>;
  static constexpr int kOuter = kBy16<T> ? kTileLatent : kTileChannels;
  static constexpr int kInner = (kBy16<T> ? kTileChannels : kTileLatent) + kPad<T>;
  alignas(16) T grad[kTilePositions][kSide];
  alignas(16) T p[kOuter][kInner];  // for the tensor cores [latent][channel], else the other way
  float scale_sums[2][kTileChannels];
};
static_assert(kTilePositions == 2 * kSide && kTileChannels == 2 * kSide);

// Adds to a thread's `sums` of the latent maps: P's transpose times the gradient. Tensor cores: a
// warp has 16 positions, a lane the elements of the 16 x 8 products of `multiply_add`. Else: a
// thread has one position, and every other four latent channels.
template <bool channels_last, typename T>
__device__ void multiply_back(float (&sums)[kTileLatent / 8][4], const GradientTile<T>& tile,
                              int count) {
  if constexpr (kBy16<T>) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    const int position = threadIdx.x / kWarp * 16 + g;
#pragma unroll
    for (int c = 2 * q; c < kTileChannels; c += kDepth) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int x = position + i % 2 * 8, k = c + i / 2 * 8;
        a[i] = channels_last ? pair_at(&tile.grad[x][k])
                             : pair_of(tile.grad[k][x], tile.grad[k + 1][x]);
      }
#pragma unroll
      for (int n = 0; n < kTileLatent / 8; ++n) {
        if (n * 8 >= count) break;
        const T* const from = tile.p[n * 8 + g] + c;
        const uint32_t b[2] = {pair_at(from), pair_at(from + 8)};
        multiply_add<T>(sums[n], a, b);
      }
    }
  } else {
    const int position = threadIdx.x % kTilePositions, half = threadIdx.x / kTilePositions;
    for (int c = 0; c < kTileChannels; c += 4) {
      Vec<float, 4> grads;
      if constexpr (channels_last) {
        grads = *reinterpret_cast<const Vec<float, 4>*>(&tile.grad[position][c]);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) grads.at[k] = tile.grad[c + k][position];
      }
#pragma unroll
      for (int n = 0; n < kTileLatent / 8; ++n) {
        if ((2 * n + half) * 4 >= count) break;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const auto p =
              *reinterpret_cast<const Vec<float, 4>*>(&tile.p[c + k][(2 * n + half) * 4]);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[n][i] = fmaf(grads.at[k], p.at[i], sums[n][i]);
        }
      }
    }
  }
}

template <typename T, int V, bool channels_last>
__global__ void __launch_bounds__(kThreads, V == 1 ? 2 : 3)
    scaled_sum_backward(const ScaledSumBackward op) {
  __shared__ GradientTile<T> shared;

  const ScaledSumShape& s = op.s;
  const int M = channels_last ? s.positions : s.O, N = channels_last ? s.O : s.positions;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // Rows and columns of a lane, such that lane_sums adds over adjacent lanes.
  const int g = channels_last ? lane % 8 : lane / 4, q = channels_last ? lane / 8 : lane % 4;
  int id = blockIdx.x;
  const int position = id % op.tiles() * kTilePositions;
  id /= op.tiles();
  const int part = id % op.parts;
  id /= op.parts;
  const int latent = id % op.latent_tiles() * kTileLatent, b = id / op.latent_tiles();
  const int count = min(s.L - latent, kTileLatent);
  const int filled = (count + 7) / 8 * 8;
  const int own_row = warp / 2 * kSide, own_column = warp % 2 * kSide;
  const int walks = ceil_div(ceil_div(s.O, kTileChannels), op.parts) * kTileChannels;
  const int end = min((part + 1) * walks, s.O);

  float v_sums[kTileLatent / 8][4] = {};
  for (int channel = part * walks; channel < end; channel += kTileChannels) {
    const int row = (channels_last ? position : channel) + own_row;
    const int column = (channels_last ? channel : position) + own_column;
    const Tile<T, V> tile(b, M, N, row + g, column, q);
    Vec<T, V> grad[kRows][kColumns / V];
    tile.load(op.grad, grad);
    float scale_sum = 0;
    if (latent == 0) {  // others only add to their latent channels
      Vec<T, V> in[kRows][kColumns / V];
      tile.load(op.y, in);
      float partial[channels_last ? kColumns : kRows] = {};
#pragma unroll
      for (int j = 0; j < kColumns / V; ++j) {
        float scales[V];
        if constexpr (channels_last) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const int c = column + column_of<V>(q, j * V + k);
            scales[k] = op.scale && c < N ? load<T>(op.scale, int64_t(b) * N + c, s.wide) : 0.f;
          }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (!tile.has(i, j)) continue;
          const float by_row = op.scale && !channels_last
                                   ? load<T>(op.scale, int64_t(b) * M + row + g + 8 * i, s.wide)
                                   : 0.f;
          Vec<T, V> result;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const float own = float(grad[i][j].at[k]);
            result.at[k] = T((channels_last ? scales[k] : by_row) * own);
            float& sum = partial[channels_last ? j * V + k : i];
            sum = fmaf(own, op.y ? float(in[i][j].at[k]) : 1.f, sum);
          }
          if (op.dy) tile.store(op.dy, i, j, result);
        }
      }
      scale_sum = lane_sums(partial, channels_last ? 8 : 4);
    }

    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / V; ++j)
        *reinterpret_cast<Vec<T, V>*>(
            &shared.grad[own_row + g + 8 * i][own_column + column_of<V>(q, j * V)]) = grad[i][j];
    if constexpr (channels_last) {
      shared.scale_sums[warp / 2][own_column + column_of<V>(q, g)] = scale_sum;
    } else {
      shared.scale_sums[warp % 2][own_row + g + 8 * q] = scale_sum;
    }
    const Part of_p{op.p,          int64_t(channel) * s.p_channel + int64_t(latent) * s.p_latent,
                    s.p_channel,   s.p_latent,
                    s.O - channel, count,
                    s.wide};
    each_element<T>(of_p, kTileChannels, filled, [&](int x, int l, float value) {
      if constexpr (kBy16<T>) {
        shared.p[l][x] = narrowed<T>(value);
      } else {
        shared.p[x][l] = value;
      }
    });
    __syncthreads();
    multiply_back<channels_last>(v_sums, shared, count);
    const int c = channel + threadIdx.x;
    if (latent == 0 && threadIdx.x < kTileChannels && c < s.O) {
      op.scale_sums[(int64_t(position / kTilePositions) * s.B + b) * s.O + c] =
          shared.scale_sums[0][threadIdx.x] + shared.scale_sums[1][threadIdx.x];
    }
  }

  float* const to = op.v_sums + ((int64_t(part) * s.B + b) * s.L + latent) * s.positions;
#pragma unroll
  for (int n = 0; n < kTileLatent / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int p, l;
      if constexpr (kBy16<T>) {
        p = position + warp * 16 + lane / 4 + i / 2 * 8, l = n * 8 + lane % 4 * 2 + i % 2;
      } else {
        p = position + threadIdx.x % kTilePositions;
        l = (2 * n + threadIdx.x / kTilePositions) * 4 + i;
      }
      if (l < count && p < s.positions) to[int64_t(l) * s.positions + p] = v_sums[n][i];
    }
  }
}

Cut cut_of(const ScaledSumShape& s) {
  const int M = s.channels_last ? s.positions : s.O, N = s.channels_last ? s.O : s.positions;
  Cut cut{N <= kSide ? 1 : 2, 0, 0};
  cut.rows = ceil_div(M, cut.block_rows()), cut.columns = ceil_div(N, cut.block_columns());
  return cut;
}

// Calls f.operator()<T, V, channels_last>().
template <typename F>
void dispatch(const ScaledSumShape& s, Dtype dtype, F f) {
  const auto by_layout = [&]<typename T, int V>() {
    s.channels_last ? f.template operator()<T, V, true>() : f.template operator()<T, V, false>();
  };
  const auto by_vector = [&]<typename T>() {
    s.vectorize ? by_layout.template operator()<T, kWide<T>>()
                : by_layout.template operator()<T, 1>();
  };
  dispatch(dtype, by_vector);
}

}  // namespace

int64_t blocks_of(const ScaledSum& op) {
  const Cut cut = cut_of(op.s);
  return int64_t(op.s.B) * cut.rows * cut.columns;
}

void launch(const ScaledSum& op, Dtype dtype, cudaStream_t stream) {
  const unsigned blocks = blocks_of(op);
  dispatch(op.s, dtype, [&]<typename T, int V, bool channels_last>() {
    run_kernel(scaled_sum<T, V, channels_last>, blocks, kThreads, 0, stream, op, cut_of(op.s));
  });
}

void launch(const ScaledSumBackward& op, Dtype dtype, cudaStream_t stream) {
  const unsigned blocks = op.blocks();
  dispatch(op.s, dtype, [&]<typename T, int V, bool channels_last>() {
    run_kernel(scaled_sum_backward<T, V, channels_last>, blocks, kThreads, 0, stream, op);
  });
}

}  // namespace timm_dynamic
