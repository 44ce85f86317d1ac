// CUDA kernels of DDF that write the gradients of the filters. See cuda_windows.h.
#include "dynamic_filter/cuda_windows.h"

namespace timm_dynamic {
namespace {

// Sums values[0..N) over groups of `lanes` >= N adjacent lanes: lane l of a group returns sum
// l / (lanes / N). Each exchange halves the values a lane carries, so that the sums together cost
// N - 1 + log2(lanes / N) shuffles.
template <int N>
__device__ float lane_sums(float (&values)[N], int lanes) {
  int offset = lanes / 2;
#pragma unroll
  for (int n = N / 2; n >= 1; n /= 2, offset /= 2) {
    const bool upper = threadIdx.x & offset;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float keep = upper ? values[i + n] : values[i];
      const float give = upper ? values[i] : values[i + n];
      values[i] = keep + __shfl_xor_sync(kAllLanes, give, offset);
    }
  }
  for (; offset >= 1; offset /= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
  return values[0];
}

// A row of K taps is padded to a power of two for lane_sums.
template <int K>
constexpr int kPadded = K <= 4 ? 4 : 8;

// The tap of a row whose sum this thread is to store, K if none.
template <int K>
__device__ int summed_tap(int lanes) {
  const int lane = threadIdx.x % lanes, share = lanes / kPadded<K>;
  return lane % share == 0 ? lane / share : K;
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
    float held[kTaps][V], sums[kTaps][V] = {};
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        held[k][v] = 1.f;
        if (active && multiply) {
          held[k][v] = spatial_weight(call, spatial_filter, block.b, r0 * K + k, y, x + v);
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
              taps[j] = fmaf(product, held[k][v], taps[j]);
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
    float held[kTaps][V], sums[kTaps][V] = {};
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) held[k][v] = multiply ? channels[k][lane].at[v] : 1.f;
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
              taps[j] = fmaf(product, held[k][v], taps[j]);
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
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (lane == 0) sums[i] = sum;
  }
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

}  // namespace

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
