// Index arithmetic of the DDF operator, for the CPU and the CUDA kernels. Plain C++, no torch.
//
//   out[b,c,y,x] = sum_k (channel_filter[b,c,k] o spatial_filter[b,k,y,x])
//                        * features[b, c, y*stride + dy(k), x*stride + dx(k)]
//
// with k = ky*K + kx, dy(k) = (ky - K/2)*dilation, dx(k) = (kx - K/2)*dilation, zeros outside.
#pragma once

#include <cstdint>

#include "common/index.h"
namespace timm_dynamic {

// What a call computes, apart from its tensors.
struct DdfShape {
  int64_t B, C, H, W, Ho, Wo;  // features [B, C, H, W], output [B, C, Ho, Wo]
  int64_t K, dilation, stride;
  bool multiply;  // combine the two filters by product, else by sum

  HOST_DEVICE int64_t taps() const { return K * K; }
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
  int64_t b, k, y, x;
};

}  // namespace timm_dynamic
