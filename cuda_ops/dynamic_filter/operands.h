// What dynamic_filter.cpp hands to the CPU kernels of kernels.h, the same for every instruction
// set.
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "dynamic_filter/shape.h"

namespace timm_dynamic {

// The weight of a tap: the value of the filter alone, or with that of the channel filter.
enum class Combine { kAlone, kMultiply, kAdd };

// One of the K row or column shifts of the taps, as seen by output positions: the input position
// of output y is y*stride + shift = (y + offset)*stride + phase. Splitting the input into `stride`
// phases makes every tap of a strided operator read consecutive positions.
struct Shift {
  int64_t tap;  // ky or kx
  int64_t shift, offset, phase;
  Range outputs;  // that find an input there
};

// The taps along one dimension that any output can use; those wholly in the padding are left out.
struct Axis {
  int64_t size, outputs, stride;
  std::vector<Shift> shifts;
  std::vector<int64_t> phases;  // those used, ascending
  int64_t reach = 0;            // largest |offset|

  Axis(int64_t size, int64_t K, int64_t dilation, int64_t stride)
      : size(size), outputs(output_size(size, stride)), stride(stride) {
    std::vector<bool> used(stride < size ? stride : size);
    for (int64_t tap = 0; tap < K; ++tap) {
      const int64_t shift = (tap - K / 2) * dilation, offset = floor_div(shift, stride);
      const Range valid = valid_outputs(shift, stride, size, outputs);
      if (valid.empty()) continue;
      shifts.push_back({tap, shift, offset, shift - offset * stride, valid});
      used[shifts.back().phase] = true;
      const int64_t distance = offset < 0 ? -offset : offset;
      if (distance > reach) reach = distance;
    }
    for (size_t phase = 0; phase < used.size(); ++phase)
      if (used[phase]) phases.push_back(phase);
  }

  int64_t phase_slot(int64_t phase) const {
    int64_t slot = 0;
    while (phases[slot] != phase) ++slot;
    return slot;
  }
  // Input positions of a phase.
  int64_t phase_size(int64_t phase) const { return (size - phase - 1) / stride + 1; }
};

// Output rows are worked on in bands, whose scratch stays in the cache.
struct Bands {
  int64_t rows, count;  // rows per band

  Range of(int64_t band, int64_t outputs) const {
    const int64_t end = (band + 1) * rows;
    return {band * rows, end < outputs ? end : outputs};
  }
};

template <typename T>
struct DdfOperands {
  DdfShape shape;
  Axis rows, columns;
  Bands bands;
  const T *features, *channel_filter, *spatial_filter;
  MapStrides features_strides;
  ChannelFilterStrides channel_strides;
  SpatialFilterStrides spatial_strides;

  int64_t live_taps() const { return rows.shifts.size() * columns.shifts.size(); }
};

template <typename T>
struct DdfForward : DdfOperands<T> {
  T* out;
  MapStrides out_strides;
};

// Null pointers mark gradients that are not needed. The filters' gradients leave the kernels as
// partial sums, whose order of summation does not depend on the number of threads:
//   partial_channel [bands, B, C, K*K], or [bands, B, K*K, C] from the kernels for channels_last
//   partial_spatial [channel_blocks, B, G, K*K, rows, columns], where `rows` is Ho, or the number
//   of bands if the filter is broadcast along y, and `columns` Wo, or 1 if it is broadcast along x.
template <typename T>
struct DdfBackward : DdfOperands<T> {
  const T* grad;
  MapStrides grad_strides;
  T* grad_features;
  MapStrides grad_features_strides;
  Accumulator<T>*partial_channel, *partial_spatial;
  int64_t channel_blocks;
  bool broadcast_rows, broadcast_columns;

  Accumulator<T>* channel_sums(int64_t b, int64_t band) const {
    return partial_channel + (band * this->shape.B + b) * this->shape.C * this->shape.taps();
  }
  Accumulator<T>* spatial_sums(int64_t b, int64_t block, int64_t g) const {
    const int64_t filter = (block * this->shape.B + b) * this->shape.groups + g;
    return partial_spatial + filter * this->shape.taps() * partial_rows() * partial_columns();
  }
  int64_t partial_rows() const { return broadcast_rows ? this->bands.count : this->shape.Ho; }
  int64_t partial_columns() const { return broadcast_columns ? 1 : this->shape.Wo; }
};

// The kernels of one instruction set. Each does the units [begin, end) of
//   forward_planes: (b, band, g, member)  backward_planes: (b, band, g, block of members)
//   forward_pixels: (b, g, y)             backward_pixels: (b, g, band)
//   forward_lanes: (b, y)                 backward_lanes: (b, band)
// "planes" for NCHW, "pixels" and "lanes" for channels_last; in "lanes" the channels of a vector
// read different filters, in "pixels" the same one.
template <typename T>
struct DdfKernels {
  void (*forward_planes)(const DdfForward<T>&, int64_t begin, int64_t end);
  void (*forward_pixels)(const DdfForward<T>&, int64_t begin, int64_t end);
  void (*forward_lanes)(const DdfForward<T>&, int64_t begin, int64_t end);
  void (*backward_planes)(const DdfBackward<T>&, int64_t begin, int64_t end);
  void (*backward_pixels)(const DdfBackward<T>&, int64_t begin, int64_t end);
  void (*backward_lanes)(const DdfBackward<T>&, int64_t begin, int64_t end);
};

}  // namespace timm_dynamic
