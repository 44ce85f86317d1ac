// How DDF's filters are made, for one instruction set; see cpu_vectors.h for what the includer
// defines, and ddf_filters.cpp for the operators.

#include "cpu_vectors.h"

namespace timm_dynamic::ISA {

// Standardises `count` <= kFilterBlock filters: tap k of filter i is at from[k*stride + i*step].
template <typename T>
INLINE void normalise(const T* from, T* to, int64_t count, int64_t taps, int64_t stride,
                      int64_t step, double scale) {
  using A = Accumulator<T>;
  A mean[kFilterBlock] = {}, factor[kFilterBlock] = {};
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
    const int64_t first = i % op.blocks() * kFilterBlock;
    const int64_t count = std::min(kFilterBlock, op.row - first);
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
    op.pooled[i] = sum_of(op.x + i * op.H * op.W, op.H * op.W) / (op.H * op.W);
}

#if ISA_LEVEL == 4
constexpr int kVectors = 2;  // accumulators: 9 of each, within the registers
#else
constexpr int kVectors = 1;
#endif
constexpr int64_t kRows = 9;
constexpr int64_t kStep = kVectors * kLanes<float>;

// Rows [row, row + kRows) of the 1x1 convolution at the `count` outputs from `first` on.
template <bool kWhole>
INLINE void convolve(const DdfFilters& op, const float* x, float* out, int64_t row, int64_t first,
                     int64_t count) {
  const float* weights[kRows];
  Vec<float> sums[kRows][kVectors];
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t at = std::min(row + r, op.rows - 1);
    weights[r] = op.spatial_weight + at * op.C;
    for (int v = 0; v < kVectors; ++v) sums[r][v] = broadcast(op.spatial_bias[at]);
  }
  int64_t offsets[kStep] = {};
  if (!kWhole)
    for (int64_t i = 0; i < count; ++i)
      offsets[i] = ((first + i) / op.Wo * op.W + (first + i) % op.Wo) * op.stride;
  for (int64_t c = 0; c < op.C; ++c, x += op.H * op.W) {
    float gathered[kStep];
    if (!kWhole)
      for (int64_t i = 0; i < kStep; ++i) gathered[i] = x[offsets[i]];
    for (int v = 0; v < kVectors; ++v) {
      const Vec<float> values = load<float>((kWhole ? x + first : gathered) + v * kLanes<float>);
      for (int64_t r = 0; r < kRows; ++r) sums[r][v] += broadcast(weights[r][c]) * values;
    }
  }
  for (int64_t r = 0; r < std::min(kRows, op.rows - row); ++r)
    for (int v = 0; v < kVectors; ++v)
      store<float>(out + (row + r) * op.outputs() + first + v * kLanes<float>, sums[r][v],
                   count - v * kLanes<float>);
}

// The filters of positions; units are (b, block of positions).
inline void spatial_filters(const DdfFilters& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / op.blocks(), first = i % op.blocks() * kFilterBlock;
    const int64_t last = std::min(first + kFilterBlock, op.outputs());
    const float* const x = op.x + b * op.C * op.H * op.W;
    float* const out = op.spatial_filter + b * op.rows * op.outputs();
    for (int64_t row = 0; row < op.rows; row += kRows)
      for (int64_t at = first; at < last; at += kStep) {
        if (op.stride == 1 && last - at >= kStep)
          convolve<true>(op, x, out, row, at, kStep);
        else
          convolve<false>(op, x, out, row, at, std::min(kStep, last - at));
      }
    for (int64_t row = 0; row < op.rows; row += op.taps) {
      float* const filters = out + row * op.outputs() + first;
      normalise(filters, filters, last - first, op.taps, op.outputs(), 1, op.scale);
    }
  }
}

// The channel branch's hidden layer; units are its channels.
inline void hidden_layer(const DdfFilters& op, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h)
    for (int64_t b = 0; b < op.B; ++b) {
      const float sum = dot(op.hidden_weight + h * op.C, op.pooled + b * op.C, op.C);
      op.hidden[b * op.hidden_size + h] = std::max(sum + op.hidden_bias[h], 0.0f);
    }
}

// The filters of channels; units are channels.
inline void channel_filters(const DdfFilters& op, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c)
    for (int64_t b = 0; b < op.B; ++b) {
      float* const filter = op.channel_filter + (b * op.C + c) * op.taps;
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
