// CUDA kernel of the gradients of what the weights of every sample are formed from;
// timm_dynamic/ops/fused_conv.py defines them.
//
// A block takes one tap, a tile of columns and a tile of channels, and goes through its samples. It
// makes the sample's weight gradient for this tile on tensor cores, from kDepth positions at a
// time, passes it on by way of shared memory, and at once adds what it means for the shared
// kernels, in registers, and for the sample's attention or gates.
//
// What limits it, by reckoning alone: on small maps those sums, a few operations for each of 2N
// numbers that stay in registers, which leave room for one block a processor; on large ones reading
// both maps once for every tile.

#include "fused_conv_tiles.h"

namespace timm_dynamic {
namespace {

constexpr int kChannels = 64;  // of a tile
[[maybe_unused]] constexpr int kDepth = 32, kStages = 3;
constexpr int kWarps = kThreads / kWarp;

// Lanes of a warp share kWarpChannels channels of a tile and every fourth column.
constexpr int kWarpChannels = kChannels / kWarps, kWarpRows = kWarp / kWarpChannels;
constexpr int kProductsPitch = kChannels + kWarpChannels;  // they read 32 different banks

// Where a thread's numbers are. Those outside of the weight are zeros, and are not written.
template <int Columns>
struct Place {
  static constexpr int kNumbers = Columns / kWarpRows;  // of a thread
  int tap, column, channel, row, lane_channel;          // the last two within the tile

  __device__ int row_of(int j) const { return row + j * kWarpRows; }
  __device__ bool inside(const OwnWeights& own, int j) const {
    return column + row_of(j) < own.columns && channel < own.channels;
  }
  __device__ int64_t weight(const OwnWeights& own, int64_t taps, int64_t n, int j) const {
    return ((n * taps + tap) * own.columns + column + row_of(j)) * own.channels + channel;
  }
};

// With a tile's numbers of at most N kernels and of their gradients.
template <int N>
struct MixedSums {
  static constexpr int kColumns = N > 4 ? 32 : 64;
  using At = Place<kColumns>;
  struct Shared {
    float attention[N], dots[kWarps][N];
  };
  float kernels[N][At::kNumbers], sums[N][At::kNumbers];

  __device__ MixedSums(const WindowGradients& op, const At& at) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < At::kNumbers; ++j) {
        const bool inside = n < op.own.N && at.inside(op.own, j);
        kernels[n][j] = inside ? op.own.kernels[at.weight(op.own, op.window.taps(), n, j)] : 0.f;
        sums[n][j] = 0;
      }
  }

  // What some threads load of sample b for all.
  __device__ static void load(const WindowGradients& op, const At&, int b, Shared& shared) {
    const int n = threadIdx.x;
    if (n < N) shared.attention[n] = n < op.own.N ? op.own.attention[b * op.own.N + n] : 0.f;
  }

  __device__ void add(const WindowGradients& op, const At& at, int b, const float* products,
                      Shared& shared) {
    float attention[N], dots[N] = {};
#pragma unroll
    for (int n = 0; n < N; ++n) attention[n] = shared.attention[n];
#pragma unroll
    for (int j = 0; j < At::kNumbers; ++j) {
      const float product = products[at.row_of(j) * kProductsPitch + at.lane_channel];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        sums[n][j] = fmaf(attention[n], product, sums[n][j]);
        dots[n] = fmaf(kernels[n][j], product, dots[n]);
      }
    }
    const int lane = threadIdx.x % kWarp, share = kWarp / N;
    const float dot = lane_sums(dots, kWarp);
    if (lane % share == 0) shared.dots[threadIdx.x / kWarp][lane / share] = dot;
    __syncthreads();
    const int n = threadIdx.x;
    if (n >= op.own.N) return;
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared.dots[warp][n];
    op.attention[(int64_t(blockIdx.x) * op.B + b) * op.own.N + n] = sum;
  }

  __device__ void write(const WindowGradients& op, const At& at) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < At::kNumbers; ++j)
        if (n < op.own.N && at.inside(op.own, j))
          op.kernels[at.weight(op.own, op.window.taps(), int64_t(blockIdx.y) * op.own.N + n, j)] =
              sums[n][j];
  }
};

struct GatedSums {
  static constexpr int kColumns = 64;
  using At = Place<kColumns>;
  struct Shared {
    float gates[kColumns], columns[kWarps][kColumns];
  };
  float kernel[At::kNumbers], sums[At::kNumbers];

  __device__ GatedSums(const WindowGradients& op, const At& at) {
#pragma unroll
    for (int j = 0; j < At::kNumbers; ++j) {
      const bool inside = at.inside(op.own, j);
      kernel[j] = inside ? op.own.kernels[at.weight(op.own, op.window.taps(), 0, j)] : 0.f;
      sums[j] = 0;
    }
  }

  __device__ static void load(const WindowGradients& op, const At& at, int b, Shared& shared) {
    const OwnWeights& own = op.own;
    const int i = threadIdx.x, column = at.column + i;
    if (i < kColumns)
      shared.gates[i] = column < own.columns ? own.gates[b * own.columns + column] : 0.f;
  }

  __device__ void add(const WindowGradients& op, const At& at, int b, const float* products,
                      Shared& shared) {
    const OwnWeights& own = op.own;
    const int64_t pair_at = (int64_t(b) * op.window.taps() + at.tap) * own.channels + at.channel;
    const float pair = at.channel < own.channels ? own.pairs[pair_at] : 0.f;
    float of_pair = 0;
    static_assert(At::kNumbers % kWarpChannels == 0);
#pragma unroll
    for (int first = 0; first < At::kNumbers; first += kWarpChannels) {
      float of_gates[kWarpChannels];
#pragma unroll
      for (int i = 0; i < kWarpChannels; ++i) {
        const int j = first + i;
        const float gate = shared.gates[at.row_of(j)];
        const float product = products[at.row_of(j) * kProductsPitch + at.lane_channel];
        const float of_weight = kernel[j] * product;
        sums[j] = fmaf(gate * pair, product, sums[j]);
        of_pair = fmaf(gate, of_weight, of_pair);
        of_gates[i] = pair * of_weight;
      }
      // Over the channels: by the lanes of a column, then by the warps.
      const float sum = lane_sums(of_gates, kWarpChannels);
      const int j = first + threadIdx.x % kWarpChannels;
      shared.columns[threadIdx.x / kWarp][at.row_of(j)] = sum;
    }
    // Over the columns: by the lanes of a channel.
#pragma unroll
    for (int offset = kWarpChannels; offset < kWarp; offset *= 2)
      of_pair += __shfl_xor_sync(kAllLanes, of_pair, offset);
    if (at.row == 0 && at.channel < own.channels)
      op.pairs[blockIdx.x / op.channel_tiles() % op.column_tiles() *
                   (int64_t(op.B) * op.window.taps() * own.channels) +
               pair_at] = of_pair;
    __syncthreads();
    const int column = at.column + threadIdx.x;
    if (threadIdx.x >= kColumns || column >= own.columns) return;
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared.columns[warp][threadIdx.x];
    const int64_t part = at.tap * op.channel_tiles() + blockIdx.x % op.channel_tiles();
    op.gates[(part * op.B + b) * own.columns + column] = sum;
  }

  __device__ void write(const WindowGradients& op, const At& at) const {
#pragma unroll
    for (int j = 0; j < At::kNumbers; ++j)
      if (at.inside(op.own, j))
        op.kernels[at.weight(op.own, op.window.taps(), blockIdx.y, j)] = sums[j];
  }
};

template <typename T, typename OwnSums>
__global__ void __launch_bounds__(kThreads) window_gradients(const WindowGradients op) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kColumns = OwnSums::kColumns;
  struct alignas(kTileAlign) Stage {
    T grads[kDepth][kColumns + kSkew], inputs[kDepth][kChannels + kSkew];
  };
  __shared__ Stage stages[kStages];
  alignas(kTileAlign) __shared__ float products[kColumns][kProductsPitch];
  __shared__ typename OwnSums::Shared shared;
  const Window<int>& window = op.window;
  const int channels = op.own.channels, columns = op.own.columns, map = window.Ho * window.Wo;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  const int column_tile = blockIdx.x / op.channel_tiles();
  Place<kColumns> at;
  at.tap = column_tile / op.column_tiles();
  at.column = column_tile % op.column_tiles() * kColumns;
  at.row = lane / kWarpChannels;
  at.lane_channel = warp * kWarpChannels + lane % kWarpChannels;
  const int first_channel = blockIdx.x % op.channel_tiles() * kChannels;
  at.channel = first_channel + at.lane_channel;
  OwnSums own(op, at);

  // Copies a position's columns and channels, kChunk of each; beside the map zeros.
  static_assert(kDepth * kChannels / kChunk == kThreads && kColumns <= kChannels);
  constexpr int kRowChunks = kChannels / kChunk;
  const int copy_row = threadIdx.x / kRowChunks, copy_at = threadIdx.x % kRowChunks * kChunk;
  const auto grad = static_cast<const T*>(op.grad), source = static_cast<const T*>(op.source);
  const int last = int64_t(blockIdx.y + 1) * op.B / op.parts;
  int next_b = int64_t(blockIdx.y) * op.B / op.parts, next_p = 0;  // to be loaded
  const auto load = [&](int stage) {
    if (next_b < last) {
      const int p = next_p + copy_row;
      if (copy_at < kColumns) {
        const bool inside = p < map && at.column + copy_at < columns;
        const int64_t from = int64_t(next_b * map + p) * columns + at.column + copy_at;
        copy_chunk(&stages[stage].grads[copy_row][copy_at], grad + (inside ? from : 0), inside);
      }
      const int q = p < map ? window.input(p / window.Wo, p % window.Wo, at.tap) : -1;
      const bool inside = q >= 0 && first_channel + copy_at < channels;
      const int position = next_b * (window.H * window.W) + q;
      const int64_t from = int64_t(position) * channels + first_channel + copy_at;
      copy_chunk(&stages[stage].inputs[copy_row][copy_at], source + (inside ? from : 0), inside);
      next_p += kDepth;
      if (next_p >= map) next_p = 0, ++next_b;
    }
    __pipeline_commit();
  };

  // The warps are 2 by 4 over the tile.
  constexpr int kTiles = kColumns / 2 / kTile;
  const int warp_column = warp / 4 * (kColumns / 2), warp_channel = warp % 4 * kTile;
  Sums sums[kTiles];
#  pragma unroll
  for (auto& sum : sums) wmma::fill_fragment(sum, 0.f);

  int b = next_b, stage = 0, free = kStages - 1;
#  pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);
  for (int p = 0; b < last;) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // after which the stage before is free
    load(free);
    const Stage& now = stages[stage];
    free = stage, stage = stage + 1 < kStages ? stage + 1 : 0;
#  pragma unroll
    for (int k = 0; k < kDepth; k += kTile) {
      wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, T, wmma::row_major> input;
      wmma::load_matrix_sync(input, &now.inputs[k][warp_channel], kChannels + kSkew);
#  pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, T, wmma::col_major> grads;
        wmma::load_matrix_sync(grads, &now.grads[k][warp_column + i * kTile], kColumns + kSkew);
        wmma::mma_sync(sums[i], grads, input, sums[i]);
      }
    }
    p += kDepth;
    if (p < map) continue;
#  pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      wmma::store_matrix_sync(&products[warp_column + i * kTile][warp_channel], sums[i],
                              kProductsPitch, wmma::mem_row_major);
      wmma::fill_fragment(sums[i], 0.f);
    }
    OwnSums::load(op, at, b, shared);
    __syncthreads();
    own.add(op, at, b, products[0], shared);
    p = 0, ++b;
  }
  own.write(op, at);
#else
  __trap();
#endif
}

template <typename T, typename OwnSums>
void run(const WindowGradients& op, cudaStream_t stream) {
  run_kernel(window_gradients<T, OwnSums>, dim3(op.tiles(), op.parts), dim3(kThreads), 0, stream,
             op);
}

}  // namespace

void launch(const WindowGradients& op, Dtype dtype, cudaStream_t stream) {
  dispatch_half(dtype, [&]<typename T>() {
    if (!op.own.mixed()) return run<T, GatedSums>(op, stream);
    if (op.own.N <= 4) return run<T, MixedSums<4>>(op, stream);
    run<T, MixedSums<kMostKernels>>(op, stream);
  });
}

}  // namespace timm_dynamic
