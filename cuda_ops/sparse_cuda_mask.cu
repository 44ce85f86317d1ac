// CUDA kernels of DynConv's mask unit; timm_dynamic/ops/learned_mask.py defines what they compute.

#include <algorithm>

#include "sparse_cuda_device.h"

namespace timm_dynamic {
namespace {

constexpr int kMaskVector = 4;  // elements of x at once; with more, a thread has too few registers
constexpr int kSumsAtOnce = 8;  // for lane_sums: no more than there are lanes
static_assert(kRows * kDots % kSumsAtOnce == 0);

// Positions of a block: those of one sample.
DDF_HOST_DEVICE constexpr int block_positions(int lanes) { return kThreads / lanes * kRows; }

// The dot products of positions with the weights.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) mask_dots(const LearnedMask op, int lanes, int blocks) {
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
    mask_windows(const LearnedMask op, int blocks, int own_blocks) {
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
  static_cast<T*>(op.out)[int64_t(b) * outputs + i] = T(sum >= 0 ? 1.f : 0.f);
}

}  // namespace

int LearnedMask::lanes() const { return lanes_for(C / (aligned ? kMaskVector : 1), kSumsAtOnce); }

int LearnedMask::blocks() const { return ceil_div(map(), block_positions(lanes())); }

void launch(const LearnedMask& op, Dtype dtype, cudaStream_t stream) {
  const int lanes = op.lanes(), blocks = op.blocks();
  const int own_blocks = blocks_for(op.window.Ho * op.window.Wo);
  dispatch(dtype, [&]<typename T>() {
    const auto dots = op.aligned ? mask_dots<T, kMaskVector> : mask_dots<T, 1>;
    run_kernel(dots, op.B * blocks, kThreads, 0, stream, op, lanes, blocks);
    run_kernel(mask_windows<T>, op.B * own_blocks, kThreads, 0, stream, op, blocks, own_blocks);
  });
}

}  // namespace timm_dynamic
