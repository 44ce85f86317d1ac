// What the CUDA kernels of DDF (cuda_*.cu, no torch) and the operators (cuda_operators.cpp, no
// kernels) share. Torch's headers are kept from the kernels, which are compiled once a GPU model.
#pragma once

#include <cstdint>

#include "common/cuda_kernels.h"
#include "dynamic_filter/shape.h"

namespace timm_dynamic {

// One pass over `from`, K * K times an element of `to`. A gather writes `to`; for the gradients of
// the filters `to` is the incoming gradient.
struct Call {
  DdfShape s;
  bool transposed;  // false: `from` features, `to` [B, C, Ho, Wo]; true: the other way round
  MapStrides from, to;
  ChannelFilterStrides channel;
  SpatialFilterStrides spatial;

  HOST_DEVICE int64_t from_h() const { return transposed ? s.Ho : s.H; }
  HOST_DEVICE int64_t from_w() const { return transposed ? s.Wo : s.W; }
  HOST_DEVICE int64_t to_h() const { return transposed ? s.H : s.Ho; }
  HOST_DEVICE int64_t to_w() const { return transposed ? s.W : s.Wo; }
};

// How blocks share the work. NCHW: x pixels, y channels; channels_last: x columns, y rows, z
// channels.
struct Grid {
  int x, y, z;
  int span;   // channels (NCHW) or columns (channels_last) that a block walks over
  int lanes;  // channels_last: adjacent threads that own channels of one row
};

enum class Layout { kNchw, kChannelsLast };

struct Plan {
  Layout layout;
  bool specialised;  // else the kernels without limits, which need nothing of what follows
  int vector;        // elements that a thread loads and stores at once: 1, or kVector for K = 3
  Grid grid;
  int threads;
};

constexpr int kVector = 4;
constexpr int64_t kMaxOffset = 1 << 30;  // of the specialised kernels, within a plane

// The most threads of a block. The gather of K = 3: 7 warps are 7 rows of channels, which suits
// maps of 7, 14, 28, ... Where a thread needs more registers or shared memory, fewer.
HOST_DEVICE constexpr int gather_threads(int64_t K) { return (K == 3 ? 7 : 4) * kWarp; }
HOST_DEVICE constexpr int filter_grad_threads(int64_t K) { return (K == 3 ? 6 : 4) * kWarp; }

// Channels whose filters lie in shared memory at once (NCHW).
HOST_DEVICE constexpr int channel_batch(int64_t K) { return K == 3 ? 32 : K == 5 ? 16 : 8; }

void gather(const Call& call, const Plan& plan, Dtype dtype, const void* from,
            const void* channel_filter, const void* spatial_filter, void* to, cudaStream_t stream);

// Writes partial sums, float (double for float64); null where not wanted.
//   channel_sums [n, B, C, taps]                n = grid.x (NCHW), grid.x * grid.y (channels_last)
//   spatial_sums [n, B, taps, Ho, Wo] (NCHW)    n = grid.y
//                [n, B, Ho, Wo, taps]           n = grid.z (channels_last)
// Kernels not specialised: n = 1, spatial_sums as for NCHW.
void filter_grads(const Call& call, const Plan& plan, Dtype dtype, const void* grad,
                  const void* features, const void* channel_filter, const void* spatial_filter,
                  void* channel_sums, void* spatial_sums, cudaStream_t stream);

}  // namespace timm_dynamic
