// CUDA kernels that make the tables of sparse execution: which positions are active, which are
// read, and where; timm_dynamic/ops/sparse defines what they compute.

#include "sparse/cuda_rows.h"

namespace timm_dynamic {
namespace {

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
  const int position = op.positions[int(i) / taps];
  op.table[i] = position < 0 ? -1 : input_of(op.window, position, int(i) % taps);
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
    const int bits = i < count ? __popc(op.words[skip + i]) : 0, sum = sum_up_to(bits);
    if (lane == kWarp - 1) sums[warp] = sum;
    __syncthreads();
    const int warps = sum_up_to(sums[lane]);
    const int up_to_warp = __shfl_sync(kAllLanes, warps, warp);
    if (i < count) op.before[skip + i] = done + up_to_warp - sums[warp] + sum - bits;
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

// The row of input i in `needed`, -1 if it has none.
__device__ int needed_place(const NeighbourTable& op, int i) {
  const int place = op.all_listed ? i : place_of(op, words_of(op.outputs), i);
  return place < op.needed_capacity ? place : -1;
}

// A thread an output and tap, then a thread an input. Each also empties one entry that is left
// over.
__global__ void __launch_bounds__(kThreads) list_positions(const NeighbourTable op) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int taps = op.window.taps();
  const int64_t j = i - int64_t(op.outputs) * taps;
  if (j < 0) {
    const int output = int(i) / taps, tap = int(i) % taps, m = place_of(op, 0, output);
    if (output >= op.sizes[0] && output < op.active_capacity) {
      op.table[i] = -1;
      if (tap == 0) op.positions[output] = -1;
    }
    if (m < 0 || m >= op.active_capacity) return;
    const int input = input_of(op.window, output, tap);
    op.table[m * taps + tap] = input < 0 ? -1 : needed_place(op, input);
    if (tap == 0) op.positions[m] = output;
  } else if (j < op.inputs) {
    const int place = needed_place(op, j);
    if (place >= 0) op.needed[place] = j;
    if (!op.all_listed && j >= op.sizes[1] && j < op.needed_capacity) op.needed[j] = -1;
  }
}

}  // namespace

void launch(const WindowTable& op, cudaStream_t stream) {
  run_kernel(window_entries, blocks_for(int64_t(op.M) * op.window.taps()), kThreads, 0, stream, op);
}

void launch(const NeighbourTable& op, cudaStream_t stream) {
  const int64_t bits = (words_of(op.outputs) + words_of(op.inputs)) * 32;
  const int64_t entries = int64_t(op.outputs) * op.window.taps();
  if (bits > 0) run_kernel(mark_positions, blocks_for(bits), kThreads, 0, stream, op);
  run_kernel(count_positions, 2, kWarp * kWarp, 0, stream, op);
  if (entries + op.inputs > 0)
    run_kernel(list_positions, blocks_for(entries + op.inputs), kThreads, 0, stream, op);
}

}  // namespace timm_dynamic
