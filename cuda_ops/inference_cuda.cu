// CUDA kernels that fuse a layer's small operations for inference: timm_dynamic/ops/affine.py,
// kernel_attention.py, factored_gates.py and dcd_branch.py define what they compute. Where samples
// are few, launching those operations one by one takes most of their time.

#include "cuda_dtypes.h"
#include "inference_cuda.h"

namespace timm_dynamic {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) affine_map(const AffineMap op) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (first >= op.size) return;
  auto& at = *reinterpret_cast<Vec<T, V>*>(static_cast<T*>(op.y) + first);
  Vec<T, V> values = at;
  const auto parameter = [&](const void* from, int c) {
    return op.narrow ? float(static_cast<const T*>(from)[c]) : static_cast<const float*>(from)[c];
  };
  const int c = op.channels_last ? first % op.C : first / op.positions % op.C;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int own = op.channels_last ? c + v : c;
    float value = fmaf(parameter(op.scale, own), float(values.at[v]), parameter(op.shift, own));
    value = value < op.low ? op.low : value;  // NaN stays
    values.at[v] = T(value > op.high ? op.high : value);
  }
  at = values;
}

__device__ float sum_of_warp(float value) {
  for (int offset = kWarp / 2; offset >= 1; offset /= 2)
    value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// `lanes` adjacent threads, a warp or a block, a map.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) pool_nchw(const Pool op, int lanes) {
  __shared__ float sums[kWarps];
  const int64_t map = int64_t(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  const bool inside = map < int64_t(op.B) * op.C;
  const auto from =
      reinterpret_cast<const Vec<T, V>*>(static_cast<const T*>(op.x) + map * op.positions);
  float sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x % lanes; inside && i < op.positions / V; i += lanes) {
    const Vec<T, V> values = from[i];
#pragma unroll
    for (int v = 0; v < V; ++v) sum += float(values.at[v]);
  }
  sum = sum_of_warp(sum);
  if (lanes > kWarp) {
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int i = 1; i < kWarps; ++i) sum += sums[i];
  }
  if (inside && threadIdx.x % lanes == 0) op.sums[map] = sum;
}

// A thread has V channels of some positions of a part; `lanes` adjacent ones have adjacent
// channels.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) pool_nhwc(const Pool op, int lanes, int across) {
  __shared__ float sums[kThreads * V];
  const int lane = threadIdx.x % lanes, row = threadIdx.x / lanes, rows = kThreads / lanes;
  const int c0 = blockIdx.x % across * lanes * V, part = blockIdx.x / across % op.parts;
  const int64_t b = blockIdx.x / across / op.parts;
  const int length = ceil_div(op.positions, op.parts), first = part * length;
  const int end = min(first + length, op.positions), c = c0 + lane * V;
  float own[V] = {};
  if (c < op.C) {
#pragma unroll 4
    for (int i = first + row; i < end; i += rows) {
      const auto values = *reinterpret_cast<const Vec<T, V>*>(static_cast<const T*>(op.x) +
                                                              (b * op.positions + i) * op.C + c);
#pragma unroll
      for (int v = 0; v < V; ++v) own[v] += float(values.at[v]);
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) sums[(row * V + v) * lanes + lane] = own[v];
  __syncthreads();
  for (int i = threadIdx.x; i < lanes * V && c0 + i < op.C; i += kThreads) {
    float sum = 0;
    for (int r = 0; r < rows; ++r) sum += sums[(r * V + i % V) * lanes + i / V];
    op.sums[(int64_t(part) * op.B + b) * op.C + c0 + i] = sum;
  }
}

__device__ float twice_hard_sigmoid(float x) {
  const float low = x < -3 ? -3.f : x;  // NaN stays
  return ((low > 3 ? 3.f : low) + 3) / 3;
}

__device__ float activated(Activation activation, float x) {
  if (activation == Activation::kRelu) return x < 0 ? 0.f : x;
  if (activation == Activation::kSigmoid) return 1 / (1 + expf(-x));
  return activation == Activation::kNone ? x : twice_hard_sigmoid(x);
}

constexpr int kRows = 4;             // outputs that a warp computes together
constexpr int kInputsAtOnce = 1024;  // in shared memory

// `blocks` of a sample.
template <typename T>
__global__ void __launch_bounds__(kThreads) linear_heads(const Heads op, int blocks) {
  __shared__ float in[kInputsAtOnce];
  const int64_t b = blockIdx.x / blocks;
  const int lane = threadIdx.x % kWarp;
  const int first = (blockIdx.x % blocks * kWarps + threadIdx.x / kWarp) * kRows;
  const T* weights[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    int o = first + r;
#pragma unroll  // else the parameters would be copied to the stack
    for (int h = 0; h < kMaxHeads; ++h) {
      if (h < op.count && o >= 0 && o < op.heads[h].outputs)
        weights[r] = static_cast<const T*>(op.heads[h].weight) + int64_t(o) * op.inputs;
      o -= op.heads[h].outputs;
    }
  }
  float sums[kRows] = {};
  for (int start = 0; start < op.inputs; start += kInputsAtOnce) {
    const int count = min(kInputsAtOnce, op.inputs - start);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      float sum = 0;
      for (int part = 0; part < op.parts; ++part)
        sum += op.in[(int64_t(part) * op.B + b) * op.inputs + start + i];
      in[i] = sum * op.factor;
    }
    __syncthreads();
#pragma unroll 4
    for (int i = lane; i < count; i += kWarp) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (weights[r]) sums[r] = fmaf(float(weights[r][start + i]), in[i], sums[r]);
    }
  }
  const float sum = lane_sums(sums, kWarp);
  if (lane % (kWarp / kRows) != 0) return;
  int o = first + lane / (kWarp / kRows);
#pragma unroll
  for (int h = 0; h < kMaxHeads; ++h, o -= op.heads[h - 1].outputs) {
    const Head& head = op.heads[h];
    if (h >= op.count || o < 0 || o >= head.outputs) continue;
    float value = sum + (head.bias ? float(static_cast<const T*>(head.bias)[o]) : 0.f);
    value = activated(head.activation, value);
    if (head.activation == Activation::kGate) value *= op.in[b * op.inputs + o];
    const int64_t at = b * head.outputs + o;
    if (op.narrow_out) {
      static_cast<T*>(head.out)[at] = T(value);
    } else {
      static_cast<float*>(head.out)[at] = value;
    }
  }
}

// A warp a sample.
template <typename T>
__global__ void __launch_bounds__(kThreads) kernel_scores(const KernelScores op) {
  const int lane = threadIdx.x % kWarp;
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (b >= op.B) return;
  const auto weight = static_cast<const T*>(op.weight), bias = static_cast<const T*>(op.bias);
  float* const out = op.out + b * op.kernels;
  for (int n = 0; n < op.kernels; ++n) {
    float sum = 0;
    for (int i = lane; i < op.inputs; i += kWarp)
      sum = fmaf(float(weight[int64_t(n) * op.inputs + i]), op.in[b * op.inputs + i], sum);
    sum = sum_of_warp(sum);
    if (lane == 0) out[n] = (sum + float(bias[n])) / op.temperature;
  }
  __syncwarp();
  float most = -INFINITY;
  for (int n = lane; n < op.kernels; n += kWarp) most = fmaxf(most, out[n]);
  for (int offset = kWarp / 2; offset >= 1; offset /= 2)
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
  float total = 0;
  for (int n = lane; n < op.kernels; n += kWarp) total += out[n] = expf(out[n] - most);
  total = sum_of_warp(total);
  for (int n = lane; n < op.kernels; n += kWarp) out[n] /= total;
}

// Calls f.operator()<T, V>().
template <typename F>
void dispatch(Dtype dtype, bool vectorize, F f) {
  dispatch(dtype, [&]<typename T>() {
    if (vectorize) return f.template operator()<T, kWide<T>>();
    f.template operator()<T, 1>();
  });
}

}  // namespace

void launch(const AffineMap& op, Dtype dtype, cudaStream_t stream) {
  dispatch(dtype, op.vector > 1, [&]<typename T, int V>() {
    run_kernel(affine_map<T, V>, unsigned(ceil_div(op.size, kThreads * V)), kThreads, 0, stream,
               op);
  });
}

int Pool::lanes() const {
  if (!channels_last) return positions / vector > 16 * kWarp ? kThreads : kWarp;
  int lanes = kWarp;
  while (lanes > 1 && lanes / 2 * vector >= C) lanes /= 2;
  return lanes;
}

int Pool::blocks() const {
  if (channels_last) return B * ceil_div(C, lanes() * vector);
  return ceil_div(int64_t(B) * C, kThreads / lanes());
}

void launch(const Pool& op, Dtype dtype, cudaStream_t stream) {
  dispatch(dtype, op.vector > 1, [&]<typename T, int V>() {
    const int blocks = op.blocks(), lanes = op.lanes();
    if (!op.channels_last) {
      return run_kernel(pool_nchw<T, V>, blocks, kThreads, 0, stream, op, lanes);
    }
    run_kernel(pool_nhwc<T, V>, blocks * op.parts, kThreads, 0, stream, op, lanes, blocks / op.B);
  });
}

void launch(const Heads& op, Dtype dtype, cudaStream_t stream) {
  const int blocks = ceil_div(op.outputs(), kWarps * kRows);
  dispatch(dtype, [&]<typename T>() {
    run_kernel(linear_heads<T>, op.B * blocks, kThreads, 0, stream, op, blocks);
  });
}

void launch(const KernelScores& op, Dtype dtype, cudaStream_t stream) {
  dispatch(dtype, [&]<typename T>() {
    run_kernel(kernel_scores<T>, unsigned(ceil_div(op.B, kWarps)), kThreads, 0, stream, op);
  });
}

}  // namespace timm_dynamic
