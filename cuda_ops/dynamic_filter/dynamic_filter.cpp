// CPU kernels of timm_dynamic::dynamic_filter and its backward form: how the work is divided, what
// the gradients of the filters sum up to, and the registration. timm_dynamic/ops/dynamic_filter
// defines the operators.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "dynamic_filter/arguments.h"
#include "dynamic_filter/operands.h"
#include "dynamic_filter/shape.h"

#define KERNELS_HEADER "dynamic_filter/kernels.h"
#include "common/dispatch.h"

namespace timm_dynamic {
namespace {

// Bands of `total` rows, a multiple of `step`, whose scratch of `row_bytes` a row stays in the
// cache, not much smaller than the `halo` of rows that neighbours share, and at least `count` of
// them where there are rows.
Bands make_bands(int64_t total, int64_t row_bytes, int64_t halo, int64_t count, int64_t step = 1,
                 int64_t scratch_bytes = 192 << 10) {
  const int64_t rows = std::max<int64_t>({scratch_bytes / row_bytes, halo, 1});
  count = std::min(std::max(ceil_div(total, rows), count), total);
  const int64_t band_rows = ceil_div(ceil_div(total, count), step) * step;
  return {band_rows, ceil_div(total, band_rows)};
}

// The least number of units to cut the work into. Not the number of threads: sums over units must
// not depend on that.
constexpr int64_t kMinUnits = 16;

template <typename T>
DdfOperands<T> make_operands(const DdfShape& s, const Tensor& x, const Tensor& filters,
                             const std::optional<Tensor>& channel_filter) {
  return {s,
          Axis(s.H * s.upsample, s.K, s.dilation * s.upsample, s.stride),
          Axis(s.W * s.upsample, s.K, s.dilation * s.upsample, s.stride),
          {},
          static_cast<const T*>(x.const_data_ptr()),
          channel_filter ? static_cast<const T*>(channel_filter->const_data_ptr()) : nullptr,
          static_cast<const T*>(filters.const_data_ptr()),
          map_strides(x),
          channel_strides(channel_filter, s.K),
          spatial_strides(filters)};
}

// Channels whose planes are in scratch together where there are no channel filters.
constexpr int64_t kSharing = 8;

template <typename T>
void forward(const DdfShape& s, const Tensor& x, const Tensor& filters,
             const std::optional<Tensor>& channel_filter, const Tensor& out) {
  const DdfKernels<T> kernels = CHOOSE_KERNELS(ddf_kernels<T>(s.alone, s.multiply));
  DdfForward<T> op{make_operands<T>(s, x, filters, channel_filter),
                   static_cast<T*>(out.mutable_data_ptr()), map_strides(out)};
  const int64_t taps = op.live_taps();
  if (is_channels_last(x)) {
    const auto kernel = s.inner > 1 ? kernels.forward_lanes : kernels.forward_pixels;
    const int64_t units = s.B * s.Ho * (s.inner > 1 ? 1 : s.groups);
    return parallel(units, s.B * s.Ho * s.Wo * s.C * taps / units,
                    [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
  }
  const int64_t phases = op.rows.phases.size() * op.columns.phases.size();
  const int64_t planes = s.alone ? kSharing * phases : taps + phases + 1;
  const int64_t row_bytes = (s.Wo + op.columns.reach) * planes * sizeof(Accumulator<T>);
  op.bands = make_bands(s.Ho, row_bytes, op.rows.reach, ceil_div(kMinUnits, s.B * s.C), s.upsample);
  parallel(s.B * op.bands.count * s.C, op.bands.rows * s.Wo * taps,
           [&](int64_t begin, int64_t end) { kernels.forward_planes(op, begin, end); });
}

// A buffer for partial sums, or the gradient itself if it has their form already.
template <typename A>
Tensor partial_buffer(const Tensor& grad, const std::vector<int64_t>& sizes, bool same_order) {
  constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  if (same_order && grad.scalar_type() == dtype && grad.numel() == count) return grad;
  return torch::stable::empty(sizes, dtype, std::nullopt, grad.device());
}

template <typename T>
void backward(const DdfShape& s, const Tensor& grad, const Tensor& x, const Tensor& filters,
              const std::optional<Tensor>& channel_filter, const Tensor* grad_x,
              Tensor* grad_filters, Tensor* grad_channel) {
  using A = Accumulator<T>;
  const DdfKernels<T> kernels = CHOOSE_KERNELS(ddf_kernels<T>(s.alone, s.multiply));
  const bool channels_last = is_channels_last(x), lanes = channels_last && s.inner > 1;
  DdfBackward<T> op{make_operands<T>(s, x, filters, channel_filter)};  // others null
  op.grad = static_cast<const T*>(grad.const_data_ptr());
  op.grad_strides = map_strides(grad);
  if (grad_x) {
    op.grad_features = static_cast<T*>(grad_x->mutable_data_ptr());
    op.grad_features_strides = map_strides(*grad_x);
  }
  op.broadcast_rows = filters.size(3) == 1;
  op.broadcast_columns = filters.size(4) == 1;

  const int64_t taps = op.live_taps(), phases = op.rows.phases.size() * op.columns.phases.size();
  const int64_t groups_at_once = lanes ? s.groups : 1, units = s.B * s.groups / groups_at_once;
  const int64_t planes = lanes           ? 2 * s.groups * taps
                         : channels_last ? 2 * taps
                         : s.alone       ? 2 * taps + kSharing * (2 * phases + 1)
                                         : 3 * taps + 2 * phases + 1;
  const int64_t row_bytes = (s.Wo + op.columns.reach) * planes * sizeof(A);
  const int64_t min_bands =
      channels_last || s.members() < kMinUnits ? ceil_div(kMinUnits, units) : 1;
  op.bands =
      make_bands(s.Ho, row_bytes, op.rows.reach, min_bands, s.upsample, (lanes ? 384 : 192) << 10);
  op.channel_blocks = 1;
  if (!channels_last) {
    constexpr int64_t kMinChannels = 32;  // a block has a spatial gradient of its own to add up
    const int64_t wanted = ceil_div(kMinUnits, units * op.bands.count);
    op.channel_blocks = std::max<int64_t>(1, std::min(wanted, s.members() / kMinChannels));
  }

  Tensor channel_sums, spatial_sums;
  if (grad_channel) {
    const int64_t outer = channels_last ? s.taps() : s.C;
    channel_sums = partial_buffer<A>(
        *grad_channel, {op.bands.count, s.B, outer, s.C * s.taps() / outer}, !channels_last);
    op.partial_channel = static_cast<A*>(channel_sums.mutable_data_ptr());
  }
  if (grad_filters) {
    spatial_sums = partial_buffer<A>(
        *grad_filters,
        {op.channel_blocks, s.B, s.groups, s.taps(), op.partial_rows(), op.partial_columns()},
        true);
    op.partial_spatial = static_cast<A*>(spatial_sums.mutable_data_ptr());
  }
  const auto kernel = lanes           ? kernels.backward_lanes
                      : channels_last ? kernels.backward_pixels
                                      : kernels.backward_planes;
  const int64_t all = units * op.bands.count * op.channel_blocks;
  parallel(all, s.B * s.C * s.Ho * s.Wo * taps / all,
           [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
  if (grad_channel && channel_sums.get() != grad_channel->get())
    *grad_channel =
        finish(channels_last ? torch::stable::transpose(channel_sums, 2, 3) : channel_sums,
               {channel_filter->size(0), channel_filter->size(1), s.taps()}, *channel_filter);
  if (grad_filters && spatial_sums.get() != grad_filters->get())
    *grad_filters =
        finish(spatial_sums,
               {filters.size(0), s.groups, s.taps(), filters.size(3), filters.size(4)}, filters);
}

Tensor in_layout(const Tensor& t, bool channels_last) {
  return torch::stable::contiguous(
      t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor dynamic_filter(const Tensor& x_in, const Tensor& filters,
                      const std::optional<Tensor>& channel_filter, int64_t kernel_size,
                      const std::string& kernel_combine, int64_t parts, int64_t dilation,
                      int64_t stride, int64_t upsample) {
  const DdfShape s = check_arguments(x_in, filters, channel_filter, kernel_size, kernel_combine,
                                     parts, dilation, stride, upsample);
  const bool copies = is_channels_last(x_in) && upsample > 1;  // only kernels for NCHW upsample
  const Tensor x = copies ? in_layout(x_in, false) : x_in;
  const Tensor out = empty(x, {s.B, s.C, s.Ho, s.Wo}, is_channels_last(x));
  if (out.numel() > 0)
    dispatch(x.scalar_type(),
             [&](auto zero) { forward<decltype(zero)>(s, x, filters, channel_filter, out); });
  return copies ? in_layout(out, true) : out;
}

// The kernels read rows (NCHW) or pixels (channels_last) of the gradient: give them such.
Tensor readable_grad(const Tensor& grad, bool channels_last) {
  return (channels_last ? grad.stride(1) == 1 : !is_channels_last(grad))
             ? grad
             : in_layout(grad, channels_last);
}

std::tuple<Tensor, Tensor, Tensor> dynamic_filter_backward(
    const Tensor& grad, const Tensor& x_in, const Tensor& filters,
    const std::optional<Tensor>& channel_filter, int64_t kernel_size,
    const std::string& kernel_combine, int64_t parts, int64_t dilation, int64_t stride,
    int64_t upsample, const std::vector<bool>& needs) {
  const DdfShape s = check_arguments(x_in, filters, channel_filter, kernel_size, kernel_combine,
                                     parts, dilation, stride, upsample);
  check_grad(grad, x_in, s);
  STD_TORCH_CHECK(needs.size() == 3, "needs must have 3 entries, got ", needs.size());
  // Where neighbouring channels share a filter alone, the kernels for NCHW are faster by far more
  // than the copies cost.
  const bool copies = is_channels_last(x_in) && (upsample > 1 || (s.alone && s.inner == 1));
  const Tensor x = copies ? in_layout(x_in, false) : x_in;
  const bool channels_last = is_channels_last(x);
  Tensor grads[] = {empty_gradient(x, needs[0], channels_last), empty_gradient(filters, needs[1]),
                    channel_filter ? empty_gradient(*channel_filter, needs[2]) : empty(x, {0})};
  if (x.numel() == 0) {
    for (Tensor& t : grads) torch::stable::zero_(t);
  } else if (needs[0] || needs[1] || (needs[2] && channel_filter)) {
    const Tensor g = readable_grad(grad, channels_last);
    dispatch(x.scalar_type(), [&](auto zero) {
      backward<decltype(zero)>(s, g, x, filters, channel_filter, needs[0] ? &grads[0] : nullptr,
                               needs[1] ? &grads[1] : nullptr,
                               needs[2] && channel_filter ? &grads[2] : nullptr);
    });
  }
  return {copies && needs[0] ? in_layout(grads[0], true) : grads[0], grads[1], grads[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("dynamic_filter", TORCH_BOX(&dynamic_filter));
  m.impl("dynamic_filter_backward", TORCH_BOX(&dynamic_filter_backward));
}

}  // namespace timm_dynamic
