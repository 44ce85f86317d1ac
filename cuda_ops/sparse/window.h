// Which inputs the outputs of a convolution read, for the CPU and the CUDA kernels. Plain C++, no
// torch.
#pragma once

#include "common/index.h"

namespace timm_dynamic {

template <typename Int>
struct Window {
  Int H, W, Ho, Wo, Ky, Kx, stride_y, stride_x, dilation_y, dilation_x, padding_y, padding_x;

  HOST_DEVICE Int taps() const { return Ky * Kx; }

  // The position within the input's map that a tap of output (y, x) reads, -1 outside.
  HOST_DEVICE Int input(Int y, Int x, Int tap) const {
    const Int row = y * stride_y - padding_y + tap / Kx * dilation_y;
    const Int column = x * stride_x - padding_x + tap % Kx * dilation_x;
    return row >= 0 && row < H && column >= 0 && column < W ? row * W + column : -1;
  }

  // The position within the output's map whose tap reads input (y, x), -1 if there is none.
  HOST_DEVICE Int output(Int y, Int x, Int tap) const {
    const Int row = y + padding_y - tap / Kx * dilation_y;
    const Int column = x + padding_x - tap % Kx * dilation_x;
    if (row < 0 || column < 0 || row % stride_y != 0 || column % stride_x != 0) return -1;
    const Int to_y = row / stride_y, to_x = column / stride_x;
    return to_y < Ho && to_x < Wo ? to_y * Wo + to_x : -1;
  }

  // Calls f(tap, position within the input's map) for the taps of output (y, x) within the map.
  template <typename F>
  void each_tap(Int y, Int x, const F& f) const {
    const Int top = y * stride_y - padding_y, left = x * stride_x - padding_x;
    for (Int ky = 0; ky < Ky; ++ky) {
      const Int row = top + ky * dilation_y;
      if (row < 0 || row >= H) continue;
      for (Int kx = 0; kx < Kx; ++kx) {
        const Int column = left + kx * dilation_x;
        if (column >= 0 && column < W) f(ky * Kx + kx, row * W + column);
      }
    }
  }
};

}  // namespace timm_dynamic
