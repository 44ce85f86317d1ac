// Index arithmetic of the DDF operator, for the CPU and the CUDA kernels. Plain C++, no torch.
//
//   out[b,c,y,x] = sum_k (channel_filter[b,c,k] o spatial_filter[b,k,y,x])
//                        * features[b, c, y*stride + dy(k), x*stride + dx(k)]
//
// with k = ky*K + kx, dy(k) = (ky - K/2)*dilation, dx(k) = (kx - K/2)*dilation, zeros outside.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#  define DDF_HOST_DEVICE __host__ __device__
#else
#  define DDF_HOST_DEVICE
#endif

namespace timm_dynamic {

// What a call computes, apart from its tensors.
struct DdfShape {
  int64_t B, C, H, W, Ho, Wo;  // features [B, C, H, W], output [B, C, Ho, Wo]
  int64_t K, dilation, stride;
  bool multiply;  // combine the two filters by product, else by sum

  DDF_HOST_DEVICE int64_t taps() const { return K * K; }
  DDF_HOST_DEVICE int64_t dy(int64_t k) const { return (k / K - K / 2) * dilation; }
  DDF_HOST_DEVICE int64_t dx(int64_t k) const { return (k % K - K / 2) * dilation; }
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

struct Range {
  int64_t begin, end;

  DDF_HOST_DEVICE bool empty() const { return begin >= end; }
};

DDF_HOST_DEVICE inline int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

DDF_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// Outputs along an input dimension of `size`: those of a convolution with padding K/2*dilation.
DDF_HOST_DEVICE inline int64_t output_size(int64_t size, int64_t stride) {
  return (size - 1) / stride + 1;
}

// The outputs y in [0, outputs) whose input y*stride + shift lies in [0, size).
DDF_HOST_DEVICE inline Range valid_outputs(int64_t shift, int64_t stride, int64_t size,
                                           int64_t outputs) {
  int64_t begin = shift < 0 ? (-shift + stride - 1) / stride : 0;
  int64_t end = size - shift > 0 ? (size - shift - 1) / stride + 1 : 0;
  return {begin < outputs ? begin : outputs, end < outputs ? end : outputs};
}

}  // namespace timm_dynamic
