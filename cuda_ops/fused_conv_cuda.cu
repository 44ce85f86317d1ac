// CUDA kernel of a convolution with a weight of its own for every sample, and of its gradient by
// the input: an implicit matrix product on tensor cores. timm_dynamic/ops/fused_conv.py defines it.
//
// A block computes kRows positions times kColumns output channels. Its rows are S groups; all rows
// of a group are positions of one sample, such that small maps need not fill the block. For every
// tap it walks over the channels, kDepth at a time: the inputs of the rows are copied to shared
// memory (zeros outside of the map), and what the weights are formed from is loaded into registers,
// both while the tensor cores work on the tiles before. Then the S weights are formed.
//
// What limits it, by reckoning alone: with S = 4, forming the weights, S * N operations for each
// that is loaded from L2; with S = 1, tensor cores that are fed through shared memory.

#include "fused_conv_tiles.h"

namespace timm_dynamic {
namespace {

constexpr int kRows = 256, kColumns = 64, kDepth = 16;
constexpr int kPitch = kDepth + kSkew;
constexpr int kWarpRows = 64, kWarpColumns = 32;
static_assert(kRows / kWarpRows * (kColumns / kWarpColumns) == kThreads / kWarp);

// The part of a weight's tile that a thread forms, along the channels.
using Floats = Vec<float, 4>;

[[maybe_unused]] __device__ Floats floats_at(const float* from) {
  return *reinterpret_cast<const Floats*>(from);
}

template <typename T, int S>
struct alignas(kTileAlign) Stage {
  T inputs[kRows][kPitch], weights[S][kColumns][kPitch];

  // Between the rows, where tiles do not reach.
  __device__ Floats& spare(int row) { return *reinterpret_cast<Floats*>(&inputs[row][kDepth]); }
};

// The tile of a weight is mixed from those of at most N kernels, or is that of one kernel, gated. A
// thread forms `Floats` of each group's.
template <int N, int S>
struct Mixed {
  static constexpr int kBlocks = N <= 4 ? 2 : 1;  // that fit into a processor's registers
  Floats kernels[N];

  // Some threads put the attention where all find it after the next barrier.
  template <typename Groups, typename Spare>
  __device__ Mixed(const OwnWeights& own, const Groups& sample_of, const Spare& spare) {
    const int s = threadIdx.x / (N / 4), first = threadIdx.x % (N / 4) * 4;
    if (s >= S) return;
    Floats some;
#pragma unroll
    for (int v = 0; v < 4; ++v)
      some.at[v] = first + v < own.N ? own.attention[sample_of(s) * own.N + first + v] : 0.f;
    spare(threadIdx.x) = some;
  }

  template <typename Spare>
  __device__ void load(const OwnWeights& own, const Spare&, int taps, int tap, int column,
                       int channel) {
    const bool inside = column < own.columns && channel < own.channels;
    const float* from = own.kernels + (tap * own.columns + column) * own.channels + channel;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      kernels[n] = inside && n < own.N ? floats_at(from) : Floats{};
      from += taps * own.columns * own.channels;
    }
  }

  template <typename Spare>
  __device__ Floats form(int s, const Spare& spare) const {
    Floats sums{};
#pragma unroll
    for (int n = 0; n < N; n += 4) {
      const Floats attention = spare((s * N + n) / 4);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int v = 0; v < 4; ++v)
          sums.at[v] = fmaf(attention.at[i], kernels[n + i].at[v], sums.at[v]);
    }
    return sums;
  }

  __device__ static float gate(const OwnWeights&, int, int) { return 1; }
};

template <int S>
struct Gated {
  static constexpr int kBlocks = 2;
  Floats kernel, pairs[S];

  // Some threads put the samples of the groups where all find them after the next barrier.
  template <typename Groups, typename Spare>
  __device__ Gated(const OwnWeights&, const Groups& sample_of, const Spare& spare) {
    if (threadIdx.x < S) spare(0).at[threadIdx.x] = __int_as_float(sample_of(threadIdx.x));
  }

  template <typename Spare>
  __device__ void load(const OwnWeights& own, const Spare& spare, int taps, int tap, int column,
                       int channel) {
    const bool inside = column < own.columns && channel < own.channels;
    const int at = (tap * own.columns + column) * own.channels + channel;
    kernel = inside ? floats_at(own.kernels + at) : Floats{};
    const Floats samples = spare(0);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      const int pair = (__float_as_int(samples.at[s]) * taps + tap) * own.channels + channel;
      pairs[s] = inside ? floats_at(own.pairs + pair) : Floats{};
    }
  }

  template <typename Spare>
  __device__ Floats form(int s, const Spare&) const {
    Floats products;
#pragma unroll
    for (int v = 0; v < 4; ++v) products.at[v] = kernel.at[v] * pairs[s].at[v];
    return products;
  }

  // What an output of a sample is multiplied by.
  __device__ static float gate(const OwnWeights& own, int sample, int column) {
    return own.gates[sample * own.columns + column];
  }
};

// A row of the block: a position of a sample, which is -1 where there is none.
struct Row {
  int sample;
  int16_t y, x;
};

// Outputs that are read by the same taps come together, such that whole blocks can leave out the
// others: with a transposed window, the positions of one residue of the strides after another.
template <int S>
__device__ Row row_of(const WindowProduct& op, int row) {
  constexpr int R = kRows / S;
  const int groups = tiles_of(op.map(), R), group = blockIdx.x * S + row / R;
  const int sample = group / groups;
  int p = group % groups * R + row % R;
  if (sample >= op.B || p >= op.map()) return {-1, 0, 0};
  if (!op.transposed) return {sample, int16_t(p / op.width()), int16_t(p % op.width())};
  const Window<int>& w = op.window;
  for (int y = 0; y < w.stride_y; ++y)
    for (int x = 0; x < w.stride_x; ++x) {
      const int height = tiles_of(w.H - y, w.stride_y), width = tiles_of(w.W - x, w.stride_x);
      if (y < w.H && x < w.W && p < height * width)
        return {sample, int16_t(y + p / width * w.stride_y), int16_t(x + p % width * w.stride_x)};
      if (y < w.H && x < w.W) p -= height * width;
    }
  return {-1, 0, 0};
}

constexpr int kPiecePitch = kWarpColumns + 4;

struct Results {
  float pieces[kThreads / kWarp][kTile][kPiecePitch];
  int positions[kRows];  // within the batch, -1 if none
};

template <typename T, typename Own, int S>
__global__ void __launch_bounds__(kThreads, Own::kBlocks) window_product(const WindowProduct op) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  __shared__ Stage<T, S> stages[2];
  constexpr int R = kRows / S;
  const OwnWeights& own = op.own;
  const int taps = op.window.taps();
  const int first_column = blockIdx.y * kColumns;

  // The rows whose inputs this thread copies, and where they are.
  constexpr int kCopies = kRows * kDepth / kChunk / kThreads;
  constexpr int kCopyRows = kRows / kCopies, kRowChunks = kDepth / kChunk;
  const int copy_row = threadIdx.x / kRowChunks, copy_channel = threadIdx.x % kRowChunks * kChunk;
  const auto source = static_cast<const T*>(op.source);
  Row rows[kCopies];
  int from[kCopies];  // position within the batch, -1 if none
#  pragma unroll
  for (int i = 0; i < kCopies; ++i) rows[i] = row_of<S>(op, copy_row + i * kCopyRows);

  // The part of a weight that this thread forms.
  const int form_column = threadIdx.x / (kDepth / 4), form_channel = threadIdx.x % (kDepth / 4) * 4;
  const auto spare = [&](int row) -> Floats& { return stages[0].spare(row); };
  const auto sample_of = [&](int s) {
    return min(int(blockIdx.x * S + s) / tiles_of(op.map(), R), op.B - 1);
  };
  Own formed(own, sample_of, spare);

  // To the next channels, or to the next tap by which any of the rows reads anything.
  int tap = -1, channel = own.channels;
  const auto advance = [&] {
    channel += kDepth;
    if (channel < own.channels) return true;
    channel = 0;
    while (++tap < taps) {
      bool any = false;
#  pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const Row& row = rows[i];
        const int at = row.sample < 0  ? -1
                       : op.transposed ? op.window.output(row.y, row.x, tap)
                                       : op.window.input(row.y, row.x, tap);
        from[i] = at < 0 ? -1 : row.sample * op.source_map() + at;
        any = any || at >= 0;
      }
      if (__syncthreads_or(any)) return true;
    }
    return false;
  };
  const auto load = [&](int stage) {
    const int c = channel + copy_channel;
#  pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool inside = from[i] >= 0 && c < own.channels;
      copy_chunk(&stages[stage].inputs[copy_row + i * kCopyRows][copy_channel],
                 source + (inside ? int64_t(from[i]) * own.channels + c : 0), inside);
    }
    __pipeline_commit();
    formed.load(own, spare, taps, tap, first_column + form_column, channel + form_channel);
  };

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_row = warp / (kColumns / kWarpColumns) * kWarpRows;
  const int warp_column = warp % (kColumns / kWarpColumns) * kWarpColumns;
  Sums sums[kWarpRows / kTile][kWarpColumns / kTile];
#  pragma unroll
  for (auto& some : sums)
#  pragma unroll
    for (auto& sum : some) wmma::fill_fragment(sum, 0.f);

  // One barrier a step: what is written after it was last read before it.
  bool more = advance();
  if (more) load(0);
  for (int stage = 0; more; stage ^= 1) {
#  pragma unroll
    for (int s = 0; s < S; ++s) {
      const Floats exact = formed.form(s, spare);
      Vec<T, 4> own_weights;
#  pragma unroll
      for (int v = 0; v < 4; ++v) own_weights.at[v] = rounded<T>(exact.at[v]);
      *reinterpret_cast<Vec<T, 4>*>(&stages[stage].weights[s][form_column][form_channel]) =
          own_weights;
    }
    __pipeline_wait_prior(0);
    __syncthreads();
    more = advance();
    if (more) load(stage ^ 1);

    const Stage<T, S>& now = stages[stage];
    wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, T, wmma::col_major> b[kWarpColumns / kTile];
#  pragma unroll
    for (int j = 0; j < kWarpColumns / kTile; ++j)
      wmma::load_matrix_sync(b[j], now.weights[warp_row / R][warp_column + j * kTile], kPitch);
#  pragma unroll
    for (int i = 0; i < kWarpRows / kTile; ++i) {
      wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, T, wmma::row_major> a;
      wmma::load_matrix_sync(a, now.inputs[warp_row + i * kTile], kPitch);
#  pragma unroll
      for (int j = 0; j < kWarpColumns / kTile; ++j)
        wmma::mma_sync(sums[i][j], a, b[j], sums[i][j]);
    }
  }

  // Each warp by way of a piece of shared memory: kTile rows at a time.
  __syncthreads();
  Results& results = reinterpret_cast<Results&>(stages);
  static_assert(sizeof results <= sizeof stages && kRows == kThreads);
  const Row own_row = row_of<S>(op, threadIdx.x);
  results.positions[threadIdx.x] =
      own_row.sample < 0 ? -1 : own_row.sample * op.map() + own_row.y * op.width() + own_row.x;
  __syncthreads();
  float* const piece = results.pieces[warp][0];
  const auto out = static_cast<T*>(op.out);
#  pragma unroll
  for (int i = 0; i < kWarpRows / kTile; ++i) {
#  pragma unroll
    for (int j = 0; j < kWarpColumns / kTile; ++j)
      wmma::store_matrix_sync(piece + j * kTile, sums[i][j], kPiecePitch, wmma::mem_row_major);
    __syncwarp();
    for (int at = lane * kChunk; at < kTile * kWarpColumns; at += kWarp * kChunk) {
      const int row = at / kWarpColumns, column = first_column + warp_column + at % kWarpColumns;
      const int position = results.positions[warp_row + i * kTile + row];
      if (position < 0 || column >= own.columns) continue;
      const float* const values = piece + row * kPiecePitch + at % kWarpColumns;
      Vec<T, kChunk> result;
#  pragma unroll
      for (int v = 0; v < kChunk; ++v)
        result.at[v] = rounded<T>(Own::gate(own, position / op.map(), column + v) * values[v]);
      *reinterpret_cast<Vec<T, kChunk>*>(out + int64_t(position) * own.columns + column) = result;
    }
    __syncwarp();
  }
#else
  __trap();  // not to leave `out` as it is
#endif
}

// Groups of as many rows as possible, for fewer weights to form, without much more rows in all.
int groups_for(int map) {
  const auto rows = [&](int S) { return int64_t(tiles_of(map, kRows / S)) * (kRows / S); };
  for (const int S : {1, 2})
    if (8 * rows(S) <= 9 * rows(4)) return S;
  return 4;
}

template <typename T, typename Own, int S>
void run(const WindowProduct& op, cudaStream_t stream) {
  const int groups = op.B * tiles_of(op.map(), kRows / S);
  const dim3 grid(tiles_of(groups, S), tiles_of(op.own.columns, kColumns));
  run_kernel(window_product<T, Own, S>, grid, dim3(kThreads), 0, stream, op);
}

template <typename T, int S>
void run_by_weights(const WindowProduct& op, cudaStream_t stream) {
  if (!op.own.mixed()) return run<T, Gated<S>, S>(op, stream);
  if (op.own.N <= 4) return run<T, Mixed<4, S>, S>(op, stream);
  run<T, Mixed<kMostKernels, S>, S>(op, stream);
}

}  // namespace

void launch(const WindowProduct& op, Dtype dtype, cudaStream_t stream) {
  dispatch_half(dtype, [&]<typename T>() {
    const int S = groups_for(op.map());
    if (S == 1) return run_by_weights<T, 1>(op, stream);
    if (S == 2) return run_by_weights<T, 2>(op, stream);
    run_by_weights<T, 4>(op, stream);
  });
}

}  // namespace timm_dynamic
