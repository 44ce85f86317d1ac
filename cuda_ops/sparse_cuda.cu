// CUDA kernels of sparse execution; timm_dynamic/ops/sparse.py and mask_logits.py define what they
// compute. The matrix products between them are left to cuBLAS.
//
// Most walk over rows, lists of which say where to read or write. A group of adjacent threads, the
// lanes, works on kRows rows at a time, such that so many loads are under way; along a row each
// lane loads 16 bytes at a time where C allows.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "sparse_cuda.h"

namespace timm_dynamic {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// How many elements are 16 bytes.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

__device__ float limit(float v, float low, float high) {
  v = v < low ? low : v;  // NaN stays
  return v > high ? high : v;
}

// Which rows a thread works on, and its part of them.
struct Rows {
  int lane, step;  // from one of its kRows rows to the next
  int64_t first;

  __device__ explicit Rows(int lanes)
      : lane(threadIdx.x % lanes),
        step(kThreads / lanes),
        first(int64_t(blockIdx.x) * step * kRows + threadIdx.x / lanes) {}
  __device__ int64_t operator[](int r) const { return first + r * step; }
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    gather_units(int64_t M, int units, int lanes, const Unit* __restrict__ source,
                 const int* __restrict__ table, Unit* __restrict__ out) {
  const Rows rows(lanes);
  int64_t from[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) from[r] = rows[r] < M ? table[rows[r]] : -1;
  for (int u = rows.lane; u < units; u += lanes) {
    Unit values[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) values[r] = from[r] < 0 ? Unit{} : source[from[r] * units + u];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (rows[r] < M) out[rows[r] * units + u] = values[r];
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) add_rows(const ScatterRows op, int lanes) {
  const auto from = static_cast<const Vec<T, V>*>(op.rows);
  const auto out = static_cast<Vec<T, V>*>(op.out);
  const Rows rows(lanes);
  const int vectors = op.C / V;
  int64_t to[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) to[r] = rows[r] < op.M ? op.positions[rows[r]] : -1;
  for (int c = rows.lane; c < vectors; c += lanes) {
    Vec<T, V> sums[kRows], values[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (to[r] < 0) continue;
      sums[r] = out[to[r] * vectors + c];
      values[r] = from[rows[r] * vectors + c];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (to[r] < 0) continue;
#pragma unroll
      for (int v = 0; v < V; ++v)
        sums[r].at[v] = T(limit(float(sums[r].at[v]) + float(values[r].at[v]), op.low, op.high));
      out[to[r] * vectors + c] = sums[r];
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) depthwise_rows(const GatherDepthwise op, int lanes) {
  const auto source = static_cast<const Vec<T, V>*>(op.source);
  const auto weight = static_cast<const Vec<T, V>*>(op.weight);
  const auto bias = static_cast<const Vec<T, V>*>(op.bias);
  const auto out = static_cast<Vec<T, V>*>(op.out);
  const Rows rows(lanes);
  const int vectors = op.C / V;
  for (int c = rows.lane; c < vectors; c += lanes) {
    float sums[kRows][V];
    const Vec<T, V> start = bias[c];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v) sums[r][v] = float(start.at[v]);
    for (int t = 0; t < op.T; ++t) {
      const Vec<T, V> weights = weight[int64_t(t) * vectors + c];
      Vec<T, V> in[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = rows[r] < op.M ? op.table[rows[r] * op.T + t] : -1;
        in[r] = at < 0 ? Vec<T, V>{} : source[at * vectors + c];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < V; ++v)
          sums[r][v] = fmaf(float(weights.at[v]), float(in[r].at[v]), sums[r][v]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (rows[r] >= op.M) continue;
      Vec<T, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) result.at[v] = T(limit(sums[r][v], op.low, op.high));
      out[rows[r] * vectors + c] = result;
    }
  }
}

// What this tap of output i of the batch reads, -1 outside.
__device__ int input_of(const Window<int>& w, int i, int tap) {
  const int map = w.Ho * w.Wo, b = i / map, at = i % map;
  const int input = w.input(at / w.Wo, at % w.Wo, tap);
  return input < 0 ? -1 : b * (w.H * w.W) + input;
}

__global__ void __launch_bounds__(kThreads) window_entries(const WindowTable op) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int taps = op.window.taps();
  if (i >= int64_t(op.M) * taps) return;
  op.table[i] = input_of(op.window, op.positions[int(i) / taps], int(i) % taps);
}

// Of a mask of any dtype: neither 0 nor, in floating point, -0.
__device__ bool is_active(const NeighbourTable& op, int i) {
  if (op.mask_bytes == 1) return static_cast<const uint8_t*>(op.mask)[i];
  if (op.mask_bytes == 2) return static_cast<const uint16_t*>(op.mask)[i] & 0x7fff;
  return static_cast<const uint32_t*>(op.mask)[i] & 0x7fffffff;
}

__device__ bool is_needed(const NeighbourTable& op, int i) {
  const Window<int>& w = op.window;
  const int map = w.H * w.W, first = i / map * (w.Ho * w.Wo), y = i % map / w.W, x = i % w.W;
  for (int tap = 0; tap < w.taps(); ++tap) {
    const int output = w.output(y, x, tap);
    if (output >= 0 && is_active(op, first + output)) return true;
  }
  return false;
}

// A thread a bit.
__global__ void __launch_bounds__(kThreads) mark_positions(const NeighbourTable op) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first_needed = words_of(op.outputs) * 32, j = i - first_needed;
  bool bit = false;
  if (i < op.outputs) bit = is_active(op, i);
  if (j >= 0 && j < op.inputs) bit = is_needed(op, j);
  const unsigned word = __ballot_sync(kAllLanes, bit);
  if (i % 32 == 0 && i / 32 < words_of(op.outputs) + words_of(op.inputs)) op.words[i / 32] = word;
}

// The sum of `value` over the threads of this warp up to this one.
__device__ int sum_up_to(int value) {
  const int lane = threadIdx.x % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}

// Two blocks: one for the active positions and one for the needed ones.
__global__ void __launch_bounds__(kWarp* kWarp) count_positions(const NeighbourTable op) {
  __shared__ int sums[kWarp];  // of the warps
  const int skip = blockIdx.x == 0 ? 0 : words_of(op.outputs);
  const int count = words_of(blockIdx.x == 0 ? op.outputs : op.inputs);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int done = 0;
  for (int first = 0; first < count; first += kWarp * kWarp) {
    const int i = first + threadIdx.x;
    const int own = i < count ? __popc(op.words[skip + i]) : 0, sum = sum_up_to(own);
    if (lane == kWarp - 1) sums[warp] = sum;
    __syncthreads();
    const int warps = sum_up_to(sums[lane]);
    const int up_to_own = __shfl_sync(kAllLanes, warps, warp);
    if (i < count) op.before[skip + i] = done + up_to_own - sums[warp] + sum - own;
    done += __shfl_sync(kAllLanes, warps, kWarp - 1);
    __syncthreads();
  }
  if (threadIdx.x == 0) op.sizes[blockIdx.x] = done;
}

// The place of position i among those of its set, -1 if it is not one of them.
__device__ int place_of(const NeighbourTable& op, int skip, int i) {
  const unsigned word = op.words[skip + i / 32], bit = 1u << (i % 32);
  return word & bit ? op.before[skip + i / 32] + __popc(word & (bit - 1)) : -1;
}

// A thread an output and tap, then a thread an input.
__global__ void __launch_bounds__(kThreads) list_positions(const NeighbourTable op) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int taps = op.window.taps(), skip = words_of(op.outputs);
  const int64_t j = i - int64_t(op.outputs) * taps;
  if (j < 0) {
    const int output = int(i) / taps, tap = int(i) % taps, m = place_of(op, 0, output);
    if (m < 0) return;
    const int input = input_of(op.window, output, tap);
    op.table[m * taps + tap] = input < 0 ? -1 : place_of(op, skip, input);
    if (tap == 0) op.positions[m] = output;
  } else if (j < op.inputs) {
    const int place = place_of(op, skip, j);
    if (place >= 0) op.needed[place] = j;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pack_weights(const MaskWeights op) {
  const int i = blockIdx.x * kThreads + threadIdx.x, k = i / op.C, c = i % op.C;
  const auto conv = static_cast<const T*>(op.conv_weight), fc = static_cast<const T*>(op.fc_weight);
  if (k < kDots - 1) {
    op.out[i] = float(conv[c * op.stride_c + k / 3 * op.stride_y + k % 3 * op.stride_x]);
  } else if (k == kDots - 1) {
    op.out[i] = float(fc[c]);
  } else if (i == kDots * op.C) {
    op.out[i] =
        float(*static_cast<const T*>(op.conv_bias)) + float(*static_cast<const T*>(op.fc_bias));
  }
}

constexpr int kMaskVector = 4;  // elements of x at once; with more, a thread has too few registers
constexpr int kSumsAtOnce = 8;  // for lane_sums: no more than there are lanes
static_assert(kRows * kDots % kSumsAtOnce == 0);

// Positions of a block: those of one sample.
DDF_HOST_DEVICE constexpr int block_positions(int lanes) { return kThreads / lanes * kRows; }

// The dot products of positions with the weights.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) mask_dots(const MaskLogits op, int lanes, int blocks) {
  __shared__ float last_dots[block_positions(kSumsAtOnce)];
  const auto weights = reinterpret_cast<const Vec<float, V>*>(op.weights);
  const int vectors = op.C / V, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int b = blockIdx.x / blocks, block = blockIdx.x % blocks, map = op.map();
  const int first = block * block_positions(lanes) + group * kRows;
  const auto x = static_cast<const Vec<T, V>*>(op.x) + int64_t(b) * map * vectors;
  float sums[kRows * kDots] = {};
  for (int c = lane; c < vectors; c += lanes) {
    Vec<T, V> in[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) in[r] = x[int64_t(min(first + r, map - 1)) * vectors + c];
#pragma unroll
    for (int k = 0; k < kDots; ++k) {
      const Vec<float, V> w = weights[k * vectors + c];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < V; ++v)
          sums[r * kDots + k] = fmaf(float(in[r].at[v]), w.at[v], sums[r * kDots + k]);
    }
  }
  const int share = lanes / kSumsAtOnce;
  float* const dots = op.dots + int64_t(b) * map * kDots;
#pragma unroll
  for (int s = 0; s < kRows * kDots; s += kSumsAtOnce) {
    float some[kSumsAtOnce];
#pragma unroll
    for (int i = 0; i < kSumsAtOnce; ++i) some[i] = sums[s + i];
    const float sum = lane_sums(some, lanes);
    const int mine = s + lane / share, r = mine / kDots, k = mine % kDots;
    const bool inside = first + r < map, keeps = lane % share == 0;
    if (keeps && inside) dots[(first + r) * kDots + k] = sum;
    if (keeps && k == kDots - 1) last_dots[group * kRows + r] = inside ? sum : 0.f;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  float sum = 0;
  for (int i = threadIdx.x; i < block_positions(lanes); i += kWarp) sum += last_dots[i];
  for (int offset = kWarp / 2; offset >= 1; offset /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (threadIdx.x == 0) op.sums[blockIdx.x] = sum;
}

// The sums of the dot products of windows; `blocks` of the kernel before, `own_blocks` of this one,
// for a sample.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mask_windows(const MaskLogits op, int blocks, int own_blocks) {
  __shared__ float warp_sums[kThreads / kWarp];
  const int b = blockIdx.x / own_blocks, block = blockIdx.x % own_blocks;
  float total = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) total += op.sums[int64_t(b) * blocks + i];
  for (int offset = kWarp / 2; offset >= 1; offset /= 2)
    total += __shfl_xor_sync(kAllLanes, total, offset);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = total;
  __syncthreads();
  const Window<int>& w = op.window;
  const int i = block * kThreads + threadIdx.x, outputs = w.Ho * w.Wo;
  if (i >= outputs) return;
  total = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += warp_sums[warp];
  float sum = total / op.map() + op.weights[kDots * op.C];
  const float* const dots = op.dots + int64_t(b) * op.map() * kDots;
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
    const int at = w.input(i / w.Wo, i % w.Wo, tap);
    if (at >= 0) sum += dots[at * kDots + tap];
  }
  static_cast<T*>(op.out)[int64_t(b) * outputs + i] = T(sum);
}

// The fewest lanes that load a row of `loads` at once, all of a warp if none do.
int lanes_for(int loads, int least = 1) {
  int lanes = kWarp;
  while (lanes > least && lanes / 2 >= loads) lanes /= 2;
  return lanes;
}

unsigned blocks_for(int64_t items, int of_block = kThreads) { return ceil_div(items, of_block); }

unsigned row_blocks(int64_t rows, int lanes) { return blocks_for(rows, kThreads / lanes * kRows); }

template <typename F>
void dispatch(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) return f.template operator()<float>();
  if (dtype == Dtype::kBFloat16) return f.template operator()<torch::headeronly::BFloat16>();
  f.template operator()<torch::headeronly::Half>();
}

// Calls f.operator()<T, V>(vectors) for rows of C elements.
template <typename F>
void dispatch_rows(Dtype dtype, int C, bool aligned, F f) {
  dispatch(dtype, [&]<typename T>() {
    if (aligned) return f.template operator()<T, kWide<T>>(C / kWide<T>);
    f.template operator()<T, 1>(C);
  });
}

}  // namespace

void launch(const GatherRows& op, cudaStream_t stream) {
  const int lanes = lanes_for(op.units);
  const auto copy = [&]<typename Unit>(Unit) {
    run_kernel(gather_units<Unit>, row_blocks(op.M, lanes), kThreads, 0, stream, op.M, op.units,
               lanes, static_cast<const Unit*>(op.source), op.table, static_cast<Unit*>(op.out));
  };
  if (op.unit == 16) return copy(uint4{});
  if (op.unit == 8) return copy(uint2{});
  if (op.unit == 4) return copy(uint32_t{});
  copy(uint16_t{});
}

void launch(const ScatterRows& op, Dtype dtype, cudaStream_t stream) {
  dispatch_rows(dtype, op.C, op.aligned, [&]<typename T, int V>(int vectors) {
    const int lanes = lanes_for(vectors);
    run_kernel(add_rows<T, V>, row_blocks(op.M, lanes), kThreads, 0, stream, op, lanes);
  });
}

void launch(const GatherDepthwise& op, Dtype dtype, cudaStream_t stream) {
  dispatch_rows(dtype, op.C, op.aligned, [&]<typename T, int V>(int vectors) {
    const int lanes = lanes_for(vectors);
    run_kernel(depthwise_rows<T, V>, row_blocks(op.M, lanes), kThreads, 0, stream, op, lanes);
  });
}

void launch(const WindowTable& op, cudaStream_t stream) {
  run_kernel(window_entries, blocks_for(int64_t(op.M) * op.window.taps()), kThreads, 0, stream, op);
}

void launch(const NeighbourTable& op, cudaStream_t stream) {
  const int64_t bits = (words_of(op.outputs) + words_of(op.inputs)) * 32;
  const int64_t entries = int64_t(op.outputs) * op.window.taps();
  run_kernel(mark_positions, blocks_for(bits), kThreads, 0, stream, op);
  run_kernel(count_positions, 2, kWarp * kWarp, 0, stream, op);
  run_kernel(list_positions, blocks_for(entries + op.inputs), kThreads, 0, stream, op);
}

void launch(const MaskWeights& op, Dtype dtype, cudaStream_t stream) {
  dispatch(dtype, [&]<typename T>() {
    run_kernel(pack_weights<T>, blocks_for(kDots * int64_t(op.C) + 1), kThreads, 0, stream, op);
  });
}

int MaskLogits::lanes() const { return lanes_for(C / (aligned ? kMaskVector : 1), kSumsAtOnce); }

int MaskLogits::blocks() const { return ceil_div(map(), block_positions(lanes())); }

void launch(const MaskLogits& op, Dtype dtype, cudaStream_t stream) {
  const int lanes = op.lanes(), blocks = op.blocks();
  const int own_blocks = blocks_for(op.window.Ho * op.window.Wo);
  dispatch(dtype, [&]<typename T>() {
    const auto dots = op.aligned ? mask_dots<T, kMaskVector> : mask_dots<T, 1>;
    run_kernel(dots, op.B * blocks, kThreads, 0, stream, op, lanes, blocks);
    run_kernel(mask_windows<T>, op.B * own_blocks, kThreads, 0, stream, op, blocks, own_blocks);
  });
}

}  // namespace timm_dynamic
