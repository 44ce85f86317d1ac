// How DDF's filters are made, for one instruction set; see cpu_vectors.h for what the includer
// defines, and ddf_filters.cpp for the operators.

#include "cpu_pointwise.h"

namespace timm_dynamic::ISA {

// Standardises `count` <= kBlock filters: tap k of filter i is at from[k*stride + i*step].
template <typename T>
INLINE void normalise(const T* from, T* to, int64_t count, int64_t taps, int64_t stride,
                      int64_t step, double scale) {
  using A = Accumulator<T>;
  A mean[kBlock] = {}, factor[kBlock] = {};
  for (int64_t k = 0; k < taps; ++k)
    for (int64_t i = 0; i < count; ++i) mean[i] += static_cast<A>(from[k * stride + i * step]);
  for (int64_t i = 0; i < count; ++i) mean[i] /= static_cast<A>(taps);
  for (int64_t k = 0; k < taps; ++k)
    for (int64_t i = 0; i < count; ++i) {
      const A deviation = static_cast<A>(from[k * stride + i * step]) - mean[i];
      factor[i] += deviation * deviation;  // the squared norm: (taps - 1) * variance
    }
  const A root = std::sqrt(static_cast<A>(taps - 1)), scaled = static_cast<A>(scale) * root;
  for (int64_t i = 0; i < count; ++i)
    factor[i] = scaled / (std::sqrt(factor[i]) + static_cast<A>(1e-10) * root);
  for (int64_t k = 0; k < taps; ++k)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = k * stride + i * step;
      to[at] = static_cast<T>((static_cast<A>(from[at]) - mean[i]) * factor[i]);
    }
}

template <typename T>
void filter_norm(const FilterNorm<T>& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i % op.blocks() * kBlock;
    const int64_t count = std::min(kBlock, op.row - first);
    const int64_t at = i / op.blocks() * op.row * op.taps + first * (op.adjacent ? op.taps : 1);
    if (op.adjacent)
      normalise(op.from + at, op.to + at, count, op.taps, 1, op.taps, op.scale);
    else
      normalise(op.from + at, op.to + at, count, op.taps, op.row, 1, op.scale);
  }
}

// The mean of every map; units are maps.
inline void pool(const DdfFilters& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    op.pooled[i] = sum_of(op.x + i * op.spatial.H * op.spatial.W, op.spatial.H * op.spatial.W) /
                   (op.spatial.H * op.spatial.W);
}

// The filters of positions; units are (b, block of positions).
inline void spatial_filters(const DdfFilters& op, int64_t begin, int64_t end) {
  const Pointwise& conv = op.spatial;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / conv.blocks(), first = i % conv.blocks() * kBlock;
    const int64_t last = std::min(first + kBlock, conv.outputs());
    float* const out = op.spatial_filter + b * conv.rows * conv.outputs() + first;
    for (int64_t row = 0; row < conv.rows; row += kRows)
      convolve(conv, op.x + b * conv.C * conv.H * conv.W, out, conv.outputs(), row, first, last);
    for (int64_t row = 0; row < conv.rows; row += op.taps) {
      float* const filters = out + row * conv.outputs();
      normalise(filters, filters, last - first, op.taps, conv.outputs(), 1, op.scale);
    }
  }
}

// The channel branch's hidden layer; units are its channels.
inline void hidden_layer(const DdfFilters& op, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h)
    for (int64_t b = 0; b < op.B; ++b) {
      const float sum =
          dot(op.hidden_weight + h * op.spatial.C, op.pooled + b * op.spatial.C, op.spatial.C);
      op.hidden[b * op.hidden_size + h] = std::max(sum + op.hidden_bias[h], 0.0f);
    }
}

// The filters of channels; units are channels.
inline void channel_filters(const DdfFilters& op, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c)
    for (int64_t b = 0; b < op.B; ++b) {
      float* const filter = op.channel_filter + (b * op.spatial.C + c) * op.taps;
      const float* const hidden = op.hidden + b * op.hidden_size;
      for (int64_t k = 0; k < op.taps; ++k) {
        const int64_t row = c * op.taps + k;
        filter[k] = dot(op.channel_weight + row * op.hidden_size, hidden, op.hidden_size) +
                    op.channel_bias[row];
      }
      normalise(filter, filter, 1, op.taps, 1, op.taps, 1.0);
      for (int64_t k = 0; k < op.taps; ++k) filter[k] *= op.channel_scale[c * op.taps + k];
    }
}

inline DdfFiltersKernels ddf_filters_kernels() {
  return {pool, spatial_filters, hidden_layer, channel_filters};
}

}  // namespace timm_dynamic::ISA
