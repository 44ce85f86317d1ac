// CUDA kernels of DDF that write features: the output, and the gradient of the features. See
// cuda_windows.h.
#include "dynamic_filter/cuda_windows.h"

namespace timm_dynamic {
namespace {

// Steps whose inputs are loaded before the first is used, to have enough bytes in flight.
template <int K>
constexpr int kAhead = K == 3 ? 2 : 1;

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

// The filter that a thread keeps: in registers for K = 3, else in a column of shared memory.
template <int K, int V, int Stride>
struct Held {
  static_assert(K == 3 || V == 1);
  float values[K == 3 ? K * K : 1][V];
  float* column;

  __device__ explicit Held(float* column) : column(column) {}
  __device__ float& operator()(int k, int v) {
    if constexpr (K == 3) return values[k][v];
    return column[k * Stride];
  }
};

// NCHW, either direction.
template <typename T, int K, int V>
__global__ void __launch_bounds__(gather_threads(K), kResident<K>)
    gather_nchw(const Call call, const Grid grid, const T* __restrict__ from,
                const T* __restrict__ channel_filter, const T* __restrict__ spatial_filter,
                T* __restrict__ to) {
  constexpr int kTaps = K * K, kBatch = kChannelBatch<K>, kSteps = kAhead<K>;
  __shared__ float2 walked[kBatch * kTaps];
  __shared__ float held_columns[K == 3 ? 1 : kTaps][gather_threads(K)];

  __shared__ Block block;
  locate(call, grid, false, block);
  const int vectors = call.to_w() / V, id = block.x * blockDim.x + threadIdx.x;
  const int y = id / vectors, x = id % vectors * V;
  const bool active = y < call.to_h();
  const Window<T, K, V, K> window(call, y, x, 0, active);
  Held<K, V, gather_threads(K)> held(&held_columns[0][threadIdx.x]);
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
      held(k, v) =
          active && at_y >= 0 && at_x >= 0 ? float(filter[at_y * st.y + at_x * st.x]) : 0.f;
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
            const float weight = fmaf(held(k, v), pair.x, pair.y);
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
  Held<K, V, kWarp> held(channels[0][lane].at);
  if constexpr (K == 3) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) held(k, v) = channels[k][lane].at[v];
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
            const float weight = fmaf(held(k, v), pair.x, pair.y);
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

}  // namespace timm_dynamic
