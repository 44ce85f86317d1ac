// Convolutions of every sample with a mixture of kernels: what channel_fusion.cpp asks for.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/arguments.h"

namespace timm_dynamic {

// out[b] = clamp(a_out[b] * conv2d(x[b], pairs[b] * sum_n attention[b,n] kernels[n]) + p v[b]
//                + base_scale[b] * base[b] + shift[b])
// Maps are float32, NCHW or channels_last; pairs is [B, C * Kh * Kw], the elements of a kernel but
// for its outputs. Pointers may be null: an attention of 1 (N is 1 then), gates of 1, no second
// product (L is 0 then), no base, no shift. Strides between samples may be 0. Only in channels_last
// can a sample have a kernel of its own, or one of cells, and are there a base and the second
// product, with v of [B, positions, L].
//
// With cells a kernel is made of blocks, [taps, O / cell_outputs, C / cell_inputs] of them, each a
// mixture of all cells: `kernels` is [N, cell_outputs, cell_inputs], and `attention` [B, blocks,
// N].
//
// In a depthwise convolution C is 1, each of the O channels has its own taps, and pairs is [B, Kh *
// Kw]; there is no base, and no kernel of a sample's own.
struct Mixtures {
  int64_t B, N, C, O, H, W, Ho, Wo, Kh, Kw;
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  const float *x, *attention, *kernels, *pairs, *a_out, *shift;
  int64_t kernel_stride, a_out_stride, shift_stride;
  int64_t cell_outputs, cell_inputs;  // 0: no cells
  int64_t L;
  const float *p, *v, *base, *base_scale;
  bool channels_last, depthwise;
  float low, high;
  float* out;
  // Of a unit of work: the samples, or the rows of one's output, and the parts of the outputs; and
  // how many of a kernel's C * Kh * Kw elements are computed before the next ones; or whether all
  // of them are transformed.
  int64_t samples, rows, row_blocks, parts, depth;
  bool winograd;

  int64_t taps() const { return Kh * Kw; }
  int64_t whole_depth() const { return C * taps(); }
  int64_t positions() const { return Ho * Wo; }
};

using Pair = std::vector<int64_t>;

// The sizes of units are set here.
void run_mixtures(Mixtures op);

// With a mixture of kernels, [N, O, C, Kh, Kw], for every sample, in a depthwise convolution [N, O,
// 1, Kh, Kw]; or of cells, [N, cell_outputs, cell_inputs], with an attention [B, Kh, Kw, outputs,
// inputs, N].
Tensor mixed_convolution(const Tensor& x, const Tensor& kernels,
                         const std::optional<Tensor>& attention, const std::optional<Tensor>& pairs,
                         const std::optional<Tensor>& a_out, const std::optional<Tensor>& shift,
                         double low, double high, const Pair& stride, const Pair& padding,
                         const Pair& dilation);

}  // namespace timm_dynamic
