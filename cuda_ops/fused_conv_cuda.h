// What the CUDA kernels of convolutions with a weight of its own for every sample
// (fused_conv_cuda.cu, fused_conv_cuda_grad.cu; no torch) and their operators
// (fused_conv_cuda_ops.cpp, no kernels) share.
//
// Maps are [B, positions, channels] in memory (channels_last), in float16 or bfloat16. The weight
// of a sample is never in memory: tiles of it are formed in float32 from what the samples share,
// and rounded once.
#pragma once

#include <cstdint>

#include "cuda_kernels.h"
#include "window.h"

namespace timm_dynamic {

// weight[b, tap, column, channel], either mixed or gated:
//   sum_n attention[b, n] * kernels[n, tap, column, channel]
//   kernels[0, tap, column, channel] * pairs[b, tap, channel] * gates[b, column]
struct OwnWeights {
  int N, columns, channels;
  const float *kernels, *attention, *pairs, *gates;

  DDF_HOST_DEVICE bool mixed() const { return attention != nullptr; }
};

constexpr int kMostKernels = 8;  // that can be mixed

// How many tiles of `size` hold n.
DDF_HOST_DEVICE constexpr int tiles_of(int n, int size) { return (n + size - 1) / size; }

// out[b, p, column] = sum_{tap, channel} weight[b, tap, column, channel] * source[b, q, channel]
// where the window's output p reads input q by that tap; or, transposed, output q reads input p:
// the gradient of such a convolution, with columns and channels exchanged.
struct WindowProduct {
  Window<int> window;
  bool transposed;
  int B;
  OwnWeights own;
  const void* source;
  void* out;

  DDF_HOST_DEVICE int height() const { return transposed ? window.H : window.Ho; }  // of out
  DDF_HOST_DEVICE int width() const { return transposed ? window.W : window.Wo; }
  DDF_HOST_DEVICE int map() const { return height() * width(); }
  DDF_HOST_DEVICE int source_map() const {
    return transposed ? window.Ho * window.Wo : window.H * window.W;
  }
};

// The gradients of what the weights are formed from, by way of those of the weights,
//   G[b, tap, column, channel] = sum_p grad[b, p, column] * source[b, q, channel],
// which are not in memory either. Results are sums of parts: each is written by one block.
struct WindowGradients {
  Window<int> window;
  int B, parts;  // the samples are divided into so many parts
  OwnWeights own;
  const void *grad, *source;
  float* kernels;    // [parts, N, taps, columns, channels]
  float* attention;  // [tiles(), B, N]
  float* pairs;      // [column_tiles(), B, taps, channels]
  float* gates;      // [taps * channel_tiles(), B, columns]

  DDF_HOST_DEVICE int tile_columns() const { return own.N > 4 ? 32 : 64; }
  DDF_HOST_DEVICE int column_tiles() const { return tiles_of(own.columns, tile_columns()); }
  DDF_HOST_DEVICE int channel_tiles() const { return tiles_of(own.channels, 64); }
  DDF_HOST_DEVICE int tiles() const { return window.taps() * column_tiles() * channel_tiles(); }
};

void launch(const WindowProduct& op, Dtype dtype, cudaStream_t stream);
void launch(const WindowGradients& op, Dtype dtype, cudaStream_t stream);

}  // namespace timm_dynamic
