// Filters made standard, for one instruction set; see common/vectors.h for what the includer
// defines, and filter_norm.cpp for the operator.

#include "common/vectors.h"

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

}  // namespace timm_dynamic::ISA
