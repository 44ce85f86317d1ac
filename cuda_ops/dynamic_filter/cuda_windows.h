// What the CUDA kernels of timm_dynamic::dynamic_filter and its backward form share, those of
// cuda_gather.cu and cuda_filter_grads.cu; timm_dynamic/ops/dynamic_filter defines the operators.
//
// The operator moves few bytes per operation, so everything here serves the memory: each feature is
// read from DRAM once, by threads that keep one of the two filters in registers (`held`) and walk
// along the dimension over which that filter does not change:
//
//   NCHW           a thread owns V adjacent pixels and walks over channels;
//   channels_last  a thread owns V adjacent channels and walks over pixels along x.
//
// The other filter is `walked`: shared memory holds it a batch at a time, as pairs (a, b) with
// which the filter is held * a + b, (f, 0) for "mul" and (1, f) for "add". So "add" costs no
// instruction more and no kernel of its own.
//
// The gradient of the features gathers the gradient of the output with the taps reversed, so one
// kernel a layout serves both directions (`Call::transposed`). The gradients of the filters share
// one kernel a layout as well; each block leaves partial sums, which are added up in a fixed order.
//
// These kernels take K = 3, 5, 7 and 32-bit indices within a plane. `*_any`, one thread an element,
// take whatever is left: other K, float64, planes of 2^30 elements and more.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "dynamic_filter/cuda_calls.h"

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
}  // namespace timm_dynamic
