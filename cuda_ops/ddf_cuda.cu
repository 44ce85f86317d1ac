// CUDA kernels of timm_dynamic::ddf and ::ddf_backward; timm_dynamic/ops/ddf.py defines both.
//
// The operator moves few bytes per operation, so everything here serves the memory: each feature is
// read from DRAM once, by threads that keep one of the two filters in registers (`own`) and walk
// along the dimension over which that filter does not change:
//
//   NCHW           a thread owns V adjacent pixels and walks over channels;
//   channels_last  a thread owns V adjacent channels and walks over pixels along x.
//
// The other filter is `walked`: shared memory holds it a batch at a time, as pairs (a, b) with
// which the filter is own * a + b, (f, 0) for "mul" and (1, f) for "add". So "add" costs no
// instruction more and no kernel of its own.
//
// The gradient of the features gathers the gradient of the output with the taps reversed, so one
// kernel a layout serves both directions (`Call::transposed`). The gradients of the filters share
// one kernel a layout as well; each block leaves partial sums, which are added up in a fixed order.
//
// These kernels take K = 3, 5, 7 and 32-bit indices within a plane. `*_any`, one thread an element,
// take whatever is left: other K, float64, planes of 2^30 elements and more.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "ddf_cuda.h"

namespace timm_dynamic {
namespace {

constexpr int kOutside = -kMaxOffset;  // offset of what lies outside: negative plus any other

// Steps of the walk whose filters lie in shared memory at once.
template <int K>
constexpr int kChannelBatch = channel_batch(K);
template <int K>
constexpr int kPixelBatch = K < 7 ? 128 : 64;  // of all rows of a block together

// Blocks to hold on a multiprocessor at least: a bound on the registers of a thread.
template <int K>
constexpr int kResident = K == 5 ? 4 : 2;

// Steps whose inputs are loaded before the first is used, to have enough bytes in flight.
template <int K>
constexpr int kAhead = K == 3 ? 2 : 1;

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Where a block is in the grid and on its walk from `begin` to `end`. Shared memory keeps it:
// registers are dear, and it is seldom read.
struct Block {
  int x, y, z, b, begin, end;
};

__device__ void locate(const Call& call, const Grid& grid, bool channels_last, Block& block) {
  if (threadIdx.x == 0) {
    unsigned id = blockIdx.x;  // one dimension: the others end at 65535
    block.x = id % grid.x, id /= grid.x;
    block.y = id % grid.y, id /= grid.y;
    block.z = id % grid.z, block.b = id / grid.z;
    block.begin = (channels_last ? block.x : block.y) * grid.span;
    block.end = min(block.begin + grid.span, int(channels_last ? call.to_w() : call.s.C));
  }
  __syncthreads();
}

// The row (or column) of features that tap j of output i reads, or -1.
template <typename Int>
__device__ Int input_of(const Call& call, Int K, Int i, Int j, Int size) {
  const Int at = i * Int(call.s.stride) + (j - K / 2) * Int(call.s.dilation);
  return at >= 0 && at < size ? at : -1;
}

// The row (or column) of `from` that window position j reads for row (or column) i of `to`, or -1.
// When transposed, window position j is tap K - 1 - j.
template <typename Int>
__device__ Int source(const Call& call, Int K, Int i, Int j, Int size) {
  if (!call.transposed) return input_of(call, K, i, j, size);
  const Int stride = call.s.stride, at = i + (j - K / 2) * Int(call.s.dilation);
  if (at < 0 || (stride > 1 && at % stride != 0)) return -1;
  return at / stride < size ? at / stride : -1;
}

template <typename T>
__device__ T channel_weight(const Call& call, const T* filter, int K, int64_t b, int64_t c, int k) {
  if (call.transposed) k = K * K - 1 - k;
  const ChannelFilterStrides& st = call.channel;
  return filter[b * st.b + c * st.c + k / K * st.ky + k % K * st.kx];
}

// (y, x) is an output.
template <typename T>
__device__ T spatial_weight(const Call& call, const T* filter, int64_t b, int k, int64_t y,
                            int64_t x) {
  const SpatialFilterStrides& st = call.spatial;
  return filter[b * st.b + k * st.k + y * st.y + x * st.x];
}

// Of window position k of pixel (y, x) of `to`. 0 where it reads a zero anyway.
template <typename Int, typename T>
__device__ T window_weight(const Call& call, const T* filter, int K, int64_t b, int k, Int y,
                           Int x) {
  if (call.transposed) {
    y = source<Int>(call, K, y, k / K, call.s.Ho), x = source<Int>(call, K, x, k % K, call.s.Wo);
    if (y < 0 || x < 0) return T(0);
    k = K * K - 1 - k;
  }
  return spatial_weight(call, filter, b, k, y, x);
}

__device__ inline float2 walked_pair(bool multiply, float filter) {
  return multiply ? float2{filter, 0.f} : float2{1.f, filter};
}

// R rows, from r0 on, of the K x (K + V - 1) inputs that V adjacent outputs of one channel read.
// V > 1 asks for stride and dilation 1, V >= K / 2, rows of a multiple of V, and alignment.
template <typename T, int K, int V, int R>
struct Window {
  static constexpr int kColumns = K + V - 1;
  int y[R], x[kColumns];         // positions in `from`, -1 outside
  int row[R], column[kColumns];  // their offsets, kOutside outside

  __device__ Window(const Call& call, int to_y, int to_x, int r0, bool active) {
    const int height = call.from_h(), width = call.from_w();
#pragma unroll
    for (int r = 0; r < R; ++r) {
      y[r] = active ? source<int>(call, K, to_y, r0 + r, height) : -1;
      row[r] = y[r] < 0 ? kOutside : y[r] * int(call.from.y);
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if constexpr (V == 1) {
        x[j] = source<int>(call, K, to_x, j, width);
      } else {
        x[j] = to_x + j - K / 2 < width ? to_x + j - K / 2 : -1;
      }
      column[j] = x[j] < 0 ? kOutside : x[j] * int(call.from.x);
    }
  }

  __device__ void load_row(const T* __restrict__ plane, int r, T (&in)[kColumns]) const {
    if constexpr (V == 1) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        const int offset = row[r] + column[j];
        in[j] = offset < 0 ? T(0) : plane[offset];
      }
    } else {
      constexpr int kHalo = K / 2;
      const T* const at = plane + (row[r] + column[kHalo]);
      Vec<T, V> middle{};
      if (row[r] >= 0) middle = *reinterpret_cast<const Vec<T, V>*>(at);
#pragma unroll
      for (int v = 0; v < V; ++v) in[kHalo + v] = middle.at[v];
#pragma unroll
      for (int h = 0; h < kHalo; ++h) {
        const int right = kHalo + V + h;
        in[h] = row[r] >= 0 && column[h] >= 0 ? at[h - kHalo] : T(0);
        in[right] = row[r] >= 0 && column[right] >= 0 ? at[V + h] : T(0);
      }
    }
  }
};

// The filter that a thread keeps: in registers for K = 3, else in a column of shared memory.
template <int K, int V, int Stride>
struct Own {
  static_assert(K == 3 || V == 1);
  float values[K == 3 ? K * K : 1][V];
  float* column;

  __device__ explicit Own(float* column) : column(column) {}
  __device__ float& operator()(int k, int v) {
    if constexpr (K == 3) return values[k][v];
    return column[k * Stride];
  }
};

// A row of K taps is padded to a power of two for lane_sums.
template <int K>
constexpr int kPadded = K <= 4 ? 4 : 8;

// The tap of a row whose sum this thread is to store, K if none.
template <int K>
__device__ int summed_tap(int lanes) {
  const int lane = threadIdx.x % lanes, share = lanes / kPadded<K>;
  return lane % share == 0 ? lane / share : K;
}

// NCHW, either direction.
template <typename T, int K, int V>
__global__ void __launch_bounds__(gather_threads(K), kResident<K>)
    gather_nchw(const Call call, const Grid grid, const T* __restrict__ from,
                const T* __restrict__ channel_filter, const T* __restrict__ spatial_filter,
                T* __restrict__ to) {
  constexpr int kTaps = K * K, kBatch = kChannelBatch<K>, kSteps = kAhead<K>;
  __shared__ float2 walked[kBatch * kTaps];
  __shared__ float own_columns[K == 3 ? 1 : kTaps][gather_threads(K)];

  __shared__ Block block;
  locate(call, grid, false, block);
  const int vectors = call.to_w() / V, id = block.x * blockDim.x + threadIdx.x;
  const int y = id / vectors, x = id % vectors * V;
  const bool active = y < call.to_h();
  const Window<T, K, V, K> window(call, y, x, 0, active);
  Own<K, V, gather_threads(K)> own(&own_columns[0][threadIdx.x]);
  const SpatialFilterStrides& st = call.spatial;
  const bool transposed = call.transposed;
  const T* filter = spatial_filter + block.b * st.b + (transposed ? (kTaps - 1) * st.k : 0);
#pragma unroll
  for (int k = 0; k < kTaps; ++k, filter += transposed ? -st.k : st.k) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // When transposed, the filter is that of the output which the tap reads.
      const int at_y = transposed ? window.y[k / K] : y;
      const int at_x = transposed ? window.x[k % K + v] : x + v;
      own(k, v) = active && at_y >= 0 && at_x >= 0 ? float(filter[at_y * st.y + at_x * st.x]) : 0.f;
    }
  }

  from += block.b * call.from.b;
  to += block.b * call.to.b + y * call.to.y + x * call.to.x;
  for (int c0 = block.begin; c0 < block.end; c0 += kBatch) {
    const int count = min(kBatch, block.end - c0);
    __syncthreads();
    for (int i = threadIdx.x; i < count * kTaps; i += blockDim.x) {
      const float f = channel_weight(call, channel_filter, K, block.b, c0 + i / kTaps, i % kTaps);
      walked[i] = walked_pair(call.s.multiply, f);
    }
    __syncthreads();
    const int end = active ? c0 + count : c0;
    for (int c = c0; c < end; c += kSteps) {
      T in[kSteps][K][K + V - 1];
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
        const T* const plane = from + min(c + u, end - 1) * call.from.c;
#pragma unroll
        for (int r = 0; r < K; ++r) window.load_row(plane, r, in[u][r]);
      }
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
        if (c + u >= end) break;
        float sum[V] = {};
#pragma unroll
        for (int k = 0; k < kTaps; ++k) {
          const float2 pair = walked[(c - c0 + u) * kTaps + k];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float weight = fmaf(own(k, v), pair.x, pair.y);
            sum[v] = fmaf(weight, float(in[u][k / K][k % K + v]), sum[v]);
          }
        }
        Vec<T, V> result;
#pragma unroll
        for (int v = 0; v < V; ++v) result.at[v] = T(sum[v]);
        *reinterpret_cast<Vec<T, V>*>(to + (c + u) * call.to.c) = result;
      }
    }
  }
}

// Taps [k0, k0 + taps) of the filters of channels [c, c + count) into shared memory, read in the
// order of the memory.
template <int K, int taps, typename T, int V>
__device__ void load_channel_filters(const Call& call, const T* filter, int b, int c, int count,
                                     int k0, Vec<float, V> (*channels)[kWarp]) {
  for (int i = threadIdx.x; i < count * taps; i += blockDim.x) {
    const int j = i / taps, k = i % taps;
    channels[k][j / V].at[j % V] =
        c + j < call.s.C ? float(channel_weight(call, filter, K, b, c + j, k0 + k)) : 0.f;
  }
}

// channels_last, either direction. A thread computes P pixels at a time from inputs that it loads
// once; P > 1 asks for stride and dilation 1.
template <typename T, int K, int V, int P>
__global__ void __launch_bounds__(gather_threads(K), kResident<K>)
    gather_nhwc(const Call call, const Grid grid, const T* __restrict__ from,
                const T* __restrict__ channel_filter, const T* __restrict__ spatial_filter,
                T* __restrict__ to) {
  constexpr int kTaps = K * K, kColumns = K + P - 1;
  __shared__ float2 walked[kPixelBatch<K> * kTaps];
  __shared__ Vec<float, V> channels[kTaps][kWarp];

  __shared__ Block block;
  locate(call, grid, true, block);
  const int lane = threadIdx.x % grid.lanes, row = threadIdx.x / grid.lanes;
  const int rows = blockDim.x / grid.lanes, batch = kPixelBatch<K> / rows;
  const int y0 = block.y * rows, y = y0 + row;
  const int c0 = block.z * grid.lanes * V, c = c0 + lane * V;
  const bool active = y < call.to_h() && c < call.s.C;
  load_channel_filters<K, kTaps>(call, channel_filter, block.b, c0, grid.lanes * V, 0, channels);
  __syncthreads();
  Own<K, V, kWarp> own(channels[0][lane].at);
  if constexpr (K == 3) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) own(k, v) = channels[k][lane].at[v];
    }
  }

  const int width = call.from_w();
  const T* rows_from[K];
#pragma unroll
  for (int r = 0; r < K; ++r) {
    const int at = active ? source<int>(call, K, y, r, call.from_h()) : -1;
    rows_from[r] =
        at < 0 ? nullptr : from + block.b * call.from.b + at * call.from.y + c * call.from.c;
  }
  to += block.b * call.to.b + y * call.to.y + c * call.to.c;
  for (int x0 = block.begin; x0 < block.end; x0 += batch) {
    const int count = min(batch, block.end - x0);
    __syncthreads();
    for (int i = threadIdx.x; i < rows * kTaps * count; i += blockDim.x) {
      const int x = i % count, k = i / count % kTaps, r = i / count / kTaps;
      if (y0 + r >= call.to_h()) break;
      const float f = window_weight(call, spatial_filter, K, block.b, k, y0 + r, x0 + x);
      walked[(r * batch + x) * kTaps + k] = walked_pair(call.s.multiply, f);
    }
    __syncthreads();
    if (!active) continue;
    for (int x = 0; x < count; x += P) {
      Vec<T, V> in[K][kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        int at = x0 + x + j - K / 2;
        if constexpr (P == 1) at = source<int>(call, K, x0 + x, j, width);
#pragma unroll
        for (int r = 0; r < K; ++r) {
          in[r][j] = Vec<T, V>{};
          if (rows_from[r] && at >= 0 && at < width) {
            in[r][j] = *reinterpret_cast<const Vec<T, V>*>(rows_from[r] + at * call.from.x);
          }
        }
      }
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (x + p >= count) break;
        float sum[V] = {};
#pragma unroll
        for (int k = 0; k < kTaps; ++k) {
          const float2 pair = walked[(row * batch + x + p) * kTaps + k];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float weight = fmaf(own(k, v), pair.x, pair.y);
            sum[v] = fmaf(weight, float(in[k / K][k % K + p].at[v]), sum[v]);
          }
        }
        Vec<T, V> result;
#pragma unroll
        for (int v = 0; v < V; ++v) result.at[v] = T(sum[v]);
        *reinterpret_cast<Vec<T, V>*>(to + (x0 + x + p) * call.to.x) = result;
      }
    }
  }
}

// The gradients of the filters keep sums for every tap, too many registers for K > 3: rows of taps
// that are computed together, before the next pass over the block's part.
template <int K>
constexpr int kRows = K == 3 ? 3 : 1;

// NCHW. Partial sums: channel [pixel block, B, C, taps], spatial [channel part, B, taps, Ho, Wo].
template <typename T, int K, int V>
__global__ void __launch_bounds__(filter_grad_threads(K), kResident<K>)
    filter_grads_nchw(const Call call, const Grid grid, const T* __restrict__ grad,
                      const T* __restrict__ features, const T* __restrict__ channel_filter,
                      const T* __restrict__ spatial_filter, float* __restrict__ channel_sums,
                      float* __restrict__ spatial_sums) {
  constexpr int R = kRows<K>, kTaps = R * K, kBatch = kChannelBatch<K>;
  __shared__ float walked[kBatch * kTaps];
  __shared__ float warp_sums[filter_grad_threads(K) / kWarp][kBatch * kTaps];

  __shared__ Block block;
  locate(call, grid, false, block);
  const bool multiply = call.s.multiply;
  const int tap = summed_tap<K>(kWarp);
#pragma unroll 1
  for (int r0 = 0; r0 < K; r0 += R) {
    const int id = block.x * blockDim.x + threadIdx.x, vectors = call.to_w() / V;
    const int y = id / vectors, x = id % vectors * V;
    const bool active = y < call.to_h();
    const Window<T, K, V, R> window(call, y, x, r0, active);
    float own[kTaps][V], sums[kTaps][V] = {};
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        own[k][v] = 1.f;
        if (active && multiply) {
          own[k][v] = spatial_weight(call, spatial_filter, block.b, r0 * K + k, y, x + v);
        }
      }
    }
    const T* const in_image = features + block.b * call.from.b;
    const T* const grad_pixel = grad + block.b * call.to.b + y * call.to.y + x * call.to.x;
    for (int c0 = block.begin; c0 < block.end; c0 += kBatch) {
      const int count = min(kBatch, block.end - c0);
      for (int i = threadIdx.x; i < count * kTaps; i += blockDim.x) {
        const int c = c0 + i / kTaps, k = r0 * K + i % kTaps;
        walked[i] = multiply ? float(channel_weight(call, channel_filter, K, block.b, c, k)) : 1.f;
      }
      __syncthreads();
      for (int c = 0; c < count; ++c) {
        Vec<T, V> g{};
        if (active) g = *reinterpret_cast<const Vec<T, V>*>(grad_pixel + (c0 + c) * call.to.c);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          T in[K + V - 1];
          window.load_row(in_image + (c0 + c) * call.from.c, r, in);
          float taps[kPadded<K>] = {};
#pragma unroll
          for (int j = 0; j < K; ++j) {
            const int k = r * K + j;
            const float w = walked[c * kTaps + k];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const float product = float(g.at[v]) * float(in[j + v]);
              sums[k][v] = fmaf(product, w, sums[k][v]);
              taps[j] = fmaf(product, own[k][v], taps[j]);
            }
          }
          const float sum = lane_sums(taps, kWarp);
          if (tap < K) warp_sums[threadIdx.x / kWarp][c * kTaps + r * K + tap] = sum;
        }
      }
      __syncthreads();
      const int64_t first = ((block.x * call.s.B + block.b) * call.s.C + c0) * K * K + r0 * K;
      for (int i = threadIdx.x; channel_sums && i < count * kTaps; i += blockDim.x) {
        float sum = 0.f;
        for (int w = 0; w < int(blockDim.x) / kWarp; ++w) sum += warp_sums[w][i];
        channel_sums[first + i / kTaps * K * K + i % kTaps] = sum;
      }
    }
    if (!active || !spatial_sums) continue;
    const int64_t plane = call.s.Ho * call.s.Wo;
    const int pixel = (block.x * blockDim.x + threadIdx.x) * V;  // anew: no register meanwhile
    float* const to = spatial_sums + ((block.y * call.s.B + block.b) * K * K + r0 * K) * plane;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      Vec<float, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) result.at[v] = sums[k][v];
      *reinterpret_cast<Vec<float, V>*>(to + k * plane + pixel) = result;
    }
  }
}

// channels_last. Partial sums: channel [row block, column part, B, C, taps], spatial [channel
// block, B, Ho, Wo, taps].
template <typename T, int K, int V>
__global__ void __launch_bounds__(filter_grad_threads(K), kResident<K>)
    filter_grads_nhwc(const Call call, const Grid grid, const T* __restrict__ grad,
                      const T* __restrict__ features, const T* __restrict__ channel_filter,
                      const T* __restrict__ spatial_filter, float* __restrict__ channel_sums,
                      float* __restrict__ spatial_sums) {
  constexpr int R = kRows<K>, kTaps = R * K;
  __shared__ float walked[kPixelBatch<K> * kTaps];
  __shared__ Vec<float, V> channels[kTaps][kWarp];
  __shared__ Vec<float, V> thread_sums[filter_grad_threads(K)];

  __shared__ Block block;
  locate(call, grid, true, block);
  const int lane = threadIdx.x % grid.lanes, row = threadIdx.x / grid.lanes;
  const int rows = blockDim.x / grid.lanes, batch = kPixelBatch<K> / rows;
  const int y0 = block.y * rows, y = y0 + row;
  const bool multiply = call.s.multiply;
  const int tap = y < call.s.Ho && spatial_sums ? summed_tap<K>(grid.lanes) : K;
#pragma unroll 1
  for (int r0 = 0; r0 < K; r0 += R) {
    const int c0 = block.z * grid.lanes * V, c = c0 + lane * V;
    const bool active = y < call.s.Ho && c < call.s.C;
    load_channel_filters<K, kTaps>(call, channel_filter, block.b, c0, grid.lanes * V, r0 * K,
                                   channels);
    __syncthreads();
    float own[kTaps][V], sums[kTaps][V] = {};
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) own[k][v] = multiply ? channels[k][lane].at[v] : 1.f;
    }

    const T* rows_from[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int at = active ? input_of<int>(call, K, y, r0 + r, call.s.H) : -1;
      rows_from[r] =
          at < 0 ? nullptr : features + block.b * call.from.b + at * call.from.y + c * call.from.c;
    }
    const T* const grad_row = grad + block.b * call.to.b + y * call.to.y + c * call.to.c;
    const int64_t row_id = (block.z * call.s.B + block.b) * call.s.Ho + y;
    for (int x0 = block.begin; x0 < block.end; x0 += batch) {
      const int count = min(batch, block.end - x0);
      __syncthreads();
      for (int i = threadIdx.x; i < rows * kTaps * count; i += blockDim.x) {
        const int x = i % count, k = i / count % kTaps, r = i / count / kTaps;
        if (y0 + r >= call.s.Ho) break;
        walked[(r * batch + x) * kTaps + k] =
            multiply
                ? float(spatial_weight(call, spatial_filter, block.b, r0 * K + k, y0 + r, x0 + x))
                : 1.f;
      }
      __syncthreads();
      for (int x = 0; x < count; ++x) {  // by every thread: lane_sums needs whole warps
        Vec<T, V> g{};
        if (active) g = *reinterpret_cast<const Vec<T, V>*>(grad_row + (x0 + x) * call.to.x);
        int columns[K];
#pragma unroll
        for (int j = 0; j < K; ++j) columns[j] = input_of<int>(call, K, x0 + x, j, call.s.W);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          float taps[kPadded<K>] = {};
#pragma unroll
          for (int j = 0; j < K; ++j) {
            const int k = r * K + j;
            Vec<T, V> in{};
            if (rows_from[r] && columns[j] >= 0) {
              in = *reinterpret_cast<const Vec<T, V>*>(rows_from[r] + columns[j] * call.from.x);
            }
            const float w = active ? walked[(row * batch + x) * kTaps + k] : 0.f;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const float product = float(g.at[v]) * float(in.at[v]);
              sums[k][v] = fmaf(product, w, sums[k][v]);
              taps[j] = fmaf(product, own[k][v], taps[j]);
            }
          }
          const float sum = lane_sums(taps, grid.lanes);
          if (tap < K) {
            spatial_sums[(row_id * call.s.Wo + x0 + x) * K * K + (r0 + r) * K + tap] = sum;
          }
        }
      }
    }

    if (!channel_sums) continue;
    const int64_t tile = int64_t(block.y) * grid.x + block.x;
    const int first = (block.z * grid.lanes + lane) * V;  // c anew: no register meanwhile
    float* const to =
        channel_sums + ((tile * call.s.B + block.b) * call.s.C + first) * K * K + r0 * K;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      __syncthreads();
#pragma unroll
      for (int v = 0; v < V; ++v) thread_sums[threadIdx.x].at[v] = sums[k][v];
      __syncthreads();
      if (row > 0 || !active) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float sum = 0.f;
#pragma unroll 1
        for (int r = 0; r < rows; ++r) sum += thread_sums[r * grid.lanes + lane].at[v];
        to[v * K * K + k] = sum;
      }
    }
  }
}

template <typename T>
__global__ void gather_any(const Call call, bool channels_last, const T* __restrict__ from,
                           const T* __restrict__ channel_filter,
                           const T* __restrict__ spatial_filter, T* __restrict__ to) {
  const int64_t C = call.s.C, H = call.to_h(), W = call.to_w(), size = call.s.B * C * H * W;
  const int K = call.s.K;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    const int64_t c = channels_last ? i % C : i / (H * W) % C;
    const int64_t pixel = channels_last ? i / C : i, x = pixel % W, y = pixel / W % H;
    const int64_t b = i / (C * H * W);
    Acc<T> sum = 0;
    for (int k = 0; k < call.s.taps(); ++k) {
      const int64_t from_y = source<int64_t>(call, K, y, k / K, call.from_h());
      const int64_t from_x = source<int64_t>(call, K, x, k % K, call.from_w());
      if (from_y < 0 || from_x < 0) continue;
      const Acc<T> f = channel_weight(call, channel_filter, call.s.K, b, c, k);
      const Acc<T> g = window_weight(call, spatial_filter, K, b, k, y, x);
      const MapStrides& st = call.from;
      const T in = from[b * st.b + c * st.c + from_y * st.y + from_x * st.x];
      sum += (call.s.multiply ? f * g : f + g) * Acc<T>(in);
    }
    to[b * call.to.b + c * call.to.c + y * call.to.y + x * call.to.x] = T(sum);
  }
}

// grad times the feature that tap k of output (y, x) reads.
template <typename T>
__device__ Acc<T> grad_product(const Call& call, const T* grad, const T* features, int64_t b,
                               int64_t c, int k, int64_t y, int64_t x) {
  const int K = call.s.K;
  const int64_t from_y = input_of<int64_t>(call, K, y, k / K, call.s.H);
  const int64_t from_x = input_of<int64_t>(call, K, x, k % K, call.s.W);
  if (from_y < 0 || from_x < 0) return 0;
  const MapStrides &to = call.to, &from = call.from;
  return Acc<T>(grad[b * to.b + c * to.c + y * to.y + x * to.x]) *
         Acc<T>(features[b * from.b + c * from.c + from_y * from.y + from_x * from.x]);
}

// A thread an element of sums [B, taps, Ho, Wo].
template <typename T>
__global__ void spatial_grad_any(const Call call, const T* __restrict__ grad,
                                 const T* __restrict__ features,
                                 const T* __restrict__ channel_filter, Acc<T>* __restrict__ sums) {
  const int64_t H = call.s.Ho, W = call.s.Wo, taps = call.s.taps(), size = call.s.B * taps * H * W;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    const int64_t x = i % W, y = i / W % H, b = i / (W * H * taps);
    const int k = i / (W * H) % taps;
    Acc<T> sum = 0;
    for (int64_t c = 0; c < call.s.C; ++c) {
      const Acc<T> product = grad_product(call, grad, features, b, c, k, y, x);
      const T f = call.s.multiply ? channel_weight(call, channel_filter, call.s.K, b, c, k) : T(1);
      sum += product * Acc<T>(f);
    }
    sums[i] = sum;
  }
}

// A warp an element of sums [B, C, taps].
template <typename T>
__global__ void channel_grad_any(const Call call, const T* __restrict__ grad,
                                 const T* __restrict__ features,
                                 const T* __restrict__ spatial_filter, Acc<T>* __restrict__ sums) {
  const int64_t taps = call.s.taps(), size = call.s.B * call.s.C * taps;
  const int64_t pixels = call.s.Ho * call.s.Wo, step = int64_t(gridDim.x) * blockDim.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  for (int64_t i = first; i < size; i += step) {
    const int64_t c = i / taps % call.s.C, b = i / taps / call.s.C;
    const int k = i % taps;
    Acc<T> sum = 0;
    for (int64_t pixel = lane; pixel < pixels; pixel += kWarp) {
      const int64_t y = pixel / call.s.Wo, x = pixel % call.s.Wo;
      const Acc<T> product = grad_product(call, grad, features, b, c, k, y, x);
      const T f = call.s.multiply ? spatial_weight(call, spatial_filter, b, k, y, x) : T(1);
      sum += product * Acc<T>(f);
    }
    for (int offset = kWarp / 2; offset >= 1; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (lane == 0) sums[i] = sum;
  }
}

template <typename T, int K>
void gather_specialised(const Call& call, const Plan& plan, const T* from, const T* channel_filter,
                        const T* spatial_filter, T* to, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    const int64_t blocks = call.s.B * plan.grid.x * plan.grid.y * plan.grid.z;
    run_kernel(kernel, unsigned(blocks), plan.threads, 0, stream, call, plan.grid, from,
               channel_filter, spatial_filter, to);
  };
  const bool channels_last = plan.layout == Layout::kChannelsLast;
  if constexpr (K == 3) {
    const bool dense = call.s.stride == 1 && call.s.dilation == 1;
    if (plan.vector > 1 && !channels_last) return launch(gather_nchw<T, K, kVector>);
    if (plan.vector > 1 && dense) return launch(gather_nhwc<T, K, kVector, kAhead<K>>);
    if (plan.vector > 1) return launch(gather_nhwc<T, K, kVector, 1>);
  }
  channels_last ? launch(gather_nhwc<T, K, 1, 1>) : launch(gather_nchw<T, K, 1>);
}

template <typename T, int K>
void filter_grads_specialised(const Call& call, const Plan& plan, const T* grad, const T* features,
                              const T* channel_filter, const T* spatial_filter, float* channel_sums,
                              float* spatial_sums, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    const int64_t blocks = call.s.B * plan.grid.x * plan.grid.y * plan.grid.z;
    run_kernel(kernel, unsigned(blocks), plan.threads, 0, stream, call, plan.grid, grad, features,
               channel_filter, spatial_filter, channel_sums, spatial_sums);
  };
  const bool channels_last = plan.layout == Layout::kChannelsLast;
  if constexpr (K == 3) {
    if (plan.vector > 1 && !channels_last) return launch(filter_grads_nchw<T, K, kVector>);
    if (plan.vector > 1) return launch(filter_grads_nhwc<T, K, kVector>);
  }
  channels_last ? launch(filter_grads_nhwc<T, K, 1>) : launch(filter_grads_nchw<T, K, 1>);
}

// Blocks for the kernels whose threads go on to the next element by themselves.
unsigned loop_blocks(int64_t threads) { return std::min<int64_t>((threads + 127) / 128, 1 << 16); }

// Calls f.operator()<T, K>(), with K = 0 where no specialised kernel serves.
template <typename F>
void dispatch(const Call& call, const Plan& plan, Dtype dtype, F f) {
  const auto by_size = [&]<typename T>() {
    const int64_t K = plan.specialised ? call.s.K : 0;
    if (K == 3) return f.template operator()<T, 3>();
    if (K == 5) return f.template operator()<T, 5>();
    if (K == 7) return f.template operator()<T, 7>();
    f.template operator()<T, 0>();
  };
  switch (dtype) {
    case Dtype::kFloat64:
      return f.template operator()<double, 0>();
    case Dtype::kFloat32:
      return by_size.template operator()<float>();
    case Dtype::kBFloat16:
      return by_size.template operator()<torch::headeronly::BFloat16>();
    case Dtype::kFloat16:
      return by_size.template operator()<torch::headeronly::Half>();
  }
}

}  // namespace

void gather(const Call& call, const Plan& plan, Dtype dtype, const void* from,
            const void* channel_filter, const void* spatial_filter, void* to, cudaStream_t stream) {
  dispatch(call, plan, dtype, [&]<typename T, int K>() {
    const auto *in = static_cast<const T*>(from), *channel = static_cast<const T*>(channel_filter),
               *spatial = static_cast<const T*>(spatial_filter);
    if constexpr (K == 0) {
      const int64_t size = call.s.B * call.s.C * call.to_h() * call.to_w();
      run_kernel(gather_any<T>, loop_blocks(size), 128, 0, stream, call,
                 plan.layout == Layout::kChannelsLast, in, channel, spatial, static_cast<T*>(to));
    } else {
      gather_specialised<T, K>(call, plan, in, channel, spatial, static_cast<T*>(to), stream);
    }
  });
}

void filter_grads(const Call& call, const Plan& plan, Dtype dtype, const void* grad,
                  const void* features, const void* channel_filter, const void* spatial_filter,
                  void* channel_sums, void* spatial_sums, cudaStream_t stream) {
  dispatch(call, plan, dtype, [&]<typename T, int K>() {
    const auto *g = static_cast<const T*>(grad), *in = static_cast<const T*>(features),
               *channel = static_cast<const T*>(channel_filter),
               *spatial = static_cast<const T*>(spatial_filter);
    auto *of_channel = static_cast<Acc<T>*>(channel_sums),
         *of_spatial = static_cast<Acc<T>*>(spatial_sums);
    if constexpr (K == 0) {
      const DdfShape& s = call.s;
      const int64_t channels = s.B * s.C * s.taps(), pixels = s.B * s.taps() * s.Ho * s.Wo;
      if (of_channel) {
        run_kernel(channel_grad_any<T>, loop_blocks(channels * kWarp), 128, 0, stream, call, g, in,
                   spatial, of_channel);
      }
      if (of_spatial) {
        run_kernel(spatial_grad_any<T>, loop_blocks(pixels), 128, 0, stream, call, g, in, channel,
                   of_spatial);
      }
    } else {
      filter_grads_specialised<T, K>(call, plan, g, in, channel, spatial, of_channel, of_spatial,
                                     stream);
    }
  });
}

}  // namespace timm_dynamic
