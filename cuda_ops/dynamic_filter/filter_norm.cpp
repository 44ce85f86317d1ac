// The CPU kernel of timm_dynamic::filter_norm, which timm_dynamic/ops/dynamic_filter defines.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/arguments.h"
#include "common/parallel.h"

namespace timm_dynamic {

constexpr int64_t kBlock = 64;  // filters of a work unit

template <typename T>
struct FilterNorm {
  const T* from;
  T* to;
  int64_t taps;
  double scale;
  // The taps of a filter lie side by side, or `row` elements apart: the filters of a row's
  // positions.
  bool adjacent;
  int64_t row;

  int64_t blocks() const { return (row + kBlock - 1) / kBlock; }
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "dynamic_filter/filter_norm_kernels.h"
#include "common/dispatch.h"

namespace timm_dynamic {
namespace {

Tensor filter_norm(const Tensor& x, int64_t taps, double scale) {
  STD_TORCH_CHECK(x.dim() == 4 && taps >= 2 && x.size(1) % taps == 0,
                  "x must be [B, filters*taps, H, W] with at least 2 taps, got ", shape_text(x),
                  " for ", taps, " taps");
  const bool channels_last = is_channels_last(x);
  const Tensor out = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last);
  if (x.numel() == 0) return out;
  const Tensor dense = torch::stable::contiguous(
      x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const int64_t filters = x.numel() / taps, positions = x.size(2) * x.size(3);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const bool adjacent = positions == 1 || channels_last;
    const FilterNorm<T> op{static_cast<const T*>(dense.const_data_ptr()),
                           static_cast<T*>(out.mutable_data_ptr()),
                           taps,
                           scale,
                           adjacent,
                           adjacent ? filters : positions};
    const auto kernel = CHOOSE_KERNELS(filter_norm<T>);
    parallel(filters / op.row * op.blocks(), 4 * kBlock * taps,
             [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) { m.impl("filter_norm", TORCH_BOX(&filter_norm)); }

}  // namespace timm_dynamic
