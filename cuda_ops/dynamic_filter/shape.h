// Index arithmetic of the dynamic_filter operator, for the CPU and the CUDA kernels. Plain C++, no
// torch.
//
//   out[b,c,y,x] = sum_k (channel_filter[b,c,k] o spatial_filter[b,g(c),k,y,x])
//                        * features[b, c, s(y) + dy(k), s(x) + dx(k)]
//
// with k = ky*K + kx, dy(k) = (ky - K/2)*dilation, dx(k) = (kx - K/2)*dilation, zeros outside,
// s(y) = y*stride or y/upsample, and channel (i*members + m)*inner + j in group i*inner + j. The
// CUDA kernels know one group and no upsampling.
#pragma once

#include <cstdint>

#include "common/index.h"
namespace timm_dynamic {

// What a call computes, apart from its tensors.
struct DdfShape {
  int64_t B, C, H, W, Ho, Wo;  // features [B, C, H, W], output [B, C, Ho, Wo]
  int64_t K, dilation, stride;
  bool multiply;       // combine the two filters by product, else by sum
  bool alone = false;  // there is no channel filter
  int64_t groups = 1, inner = 1, upsample = 1;

  HOST_DEVICE int64_t taps() const { return K * K; }
  HOST_DEVICE int64_t members() const { return C / groups; }
  // Whether taps can be so far away that a window is much larger than the map.
  HOST_DEVICE bool is_sparse() const { return (K - 1) * dilation > 2 * (H + W) || stride > H + W; }
  // The first channel of a group; its other ones follow `inner` apart.
  HOST_DEVICE int64_t channel(int64_t g) const { return g / inner * inner * members() + g % inner; }
  HOST_DEVICE int64_t dy(int64_t k) const { return (k / K - K / 2) * dilation; }
  HOST_DEVICE int64_t dx(int64_t k) const { return (k % K - K / 2) * dilation; }
};

// Element strides of features, of the output and of their gradients.
struct MapStrides {
  int64_t b, c, y, x;
};

// Element strides of the filters; 0 along a dimension of size 1, which broadcasts it.
struct ChannelFilterStrides {
  int64_t b, c, ky, kx;
};
struct SpatialFilterStrides {
  int64_t b, k, y, x, g = 0;
};

}  // namespace timm_dynamic
