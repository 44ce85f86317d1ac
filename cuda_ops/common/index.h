// Index arithmetic for the CPU and the CUDA kernels. Plain C++, no torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#  define HOST_DEVICE __host__ __device__
#else
#  define HOST_DEVICE
#endif

namespace timm_dynamic {

struct Range {
  int64_t begin, end;

  HOST_DEVICE bool empty() const { return begin >= end; }
};

HOST_DEVICE inline int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// Outputs along an input dimension of `size`: those of a convolution with padding K/2*dilation.
HOST_DEVICE inline int64_t output_size(int64_t size, int64_t stride) {
  return (size - 1) / stride + 1;
}

// The outputs y in [0, outputs) whose input y*stride + shift lies in [0, size).
HOST_DEVICE inline Range valid_outputs(int64_t shift, int64_t stride, int64_t size,
                                       int64_t outputs) {
  int64_t begin = shift < 0 ? (-shift + stride - 1) / stride : 0;
  int64_t end = size - shift > 0 ? (size - shift - 1) / stride + 1 : 0;
  return {begin < outputs ? begin : outputs, end < outputs ? end : outputs};
}

}  // namespace timm_dynamic
