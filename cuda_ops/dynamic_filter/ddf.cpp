// CPU kernels of timm_dynamic::ddf and ::ddf_backward: how the work is divided, what the gradients
// of the filters sum up to, and the registration. timm_dynamic/ops/dynamic_filter defines the
// operators.

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

// Bands of `total` rows whose scratch of `row_bytes` a row stays in the cache, not much smaller
// than the `halo` of rows that neighbours share, and at least `count` of them where there are rows.
Bands make_bands(int64_t total, int64_t row_bytes, int64_t halo, int64_t count) {
  constexpr int64_t kScratchBytes = 192 << 10;
  const int64_t rows = std::max<int64_t>({kScratchBytes / row_bytes, halo, 1});
  count = std::min(std::max(ceil_div(total, rows), count), total);
  const int64_t band_rows = ceil_div(total, count);
  return {band_rows, ceil_div(total, band_rows)};
}

// The least number of units to cut the work into. Not the number of threads: sums over units must
// not depend on that.
constexpr int64_t kMinUnits = 16;

template <typename T>
DdfOperands<T> make_operands(const DdfShape& s, const Tensor& features,
                             const Tensor& channel_filter, const Tensor& spatial_filter) {
  return {s,
          Axis(s.H, s.K, s.dilation, s.stride),
          Axis(s.W, s.K, s.dilation, s.stride),
          {},
          static_cast<const T*>(features.const_data_ptr()),
          static_cast<const T*>(channel_filter.const_data_ptr()),
          static_cast<const T*>(spatial_filter.const_data_ptr()),
          strides_of<MapStrides>(features),
          strides_of<ChannelFilterStrides>(channel_filter),
          strides_of<SpatialFilterStrides>(spatial_filter)};
}

template <typename T>
void forward(const DdfShape& s, const Tensor& features, const Tensor& channel_filter,
             const Tensor& spatial_filter, const Tensor& out) {
  const DdfKernels<T> kernels = CHOOSE_KERNELS(ddf_kernels<T>(s.multiply));
  DdfForward<T> op{make_operands<T>(s, features, channel_filter, spatial_filter),
                   static_cast<T*>(out.mutable_data_ptr()), strides_of<MapStrides>(out)};
  const int64_t taps = op.live_taps();
  if (is_channels_last(features)) {
    return parallel(s.B * s.Ho, s.Wo * s.C * taps,
                    [&](int64_t begin, int64_t end) { kernels.forward_pixels(op, begin, end); });
  }
  const int64_t phases = op.rows.phases.size() * op.columns.phases.size();
  const int64_t row_bytes =
      (s.Wo + op.columns.reach) * (taps + phases + 1) * sizeof(Accumulator<T>);
  op.bands = make_bands(s.Ho, row_bytes, op.rows.reach, ceil_div(kMinUnits, s.B * s.C));
  parallel(s.B * op.bands.count * s.C, op.bands.rows * s.Wo * taps,
           [&](int64_t begin, int64_t end) { kernels.forward_planes(op, begin, end); });
}

// Sums partial [B, parts, C, taps], or [B, parts, taps, C] if `tap_major`, to grad
// [B or 1, C or 1, taps].
template <typename T, typename A>
void reduce_channel(const Tensor& grad, const A* partial, int64_t B, int64_t parts, int64_t C,
                    int64_t taps, bool tap_major) {
  T* const out = static_cast<T*>(grad.mutable_data_ptr());
  const int64_t out_c = grad.size(1), size = C * taps;
  const int64_t summed = grad.size(0) == 1 ? B * parts : parts;
  const int64_t step_c = tap_major ? 1 : taps, step_k = tap_major ? C : 1;
  parallel(grad.size(0), summed * size, [&](int64_t begin, int64_t end) {
    std::vector<A> sums(size);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(sums.begin(), sums.end(), A(0));
      for (const A *from = partial + b * parts * size, *last = from + summed * size; from != last;
           from += size)
        for (int64_t i = 0; i < size; ++i) sums[i] += from[i];
      if (out_c == 1)
        for (int64_t k = 0; k < taps; ++k)
          for (int64_t c = 1; c < C; ++c) sums[k * step_k] += sums[k * step_k + c * step_c];
      T* to = out + b * out_c * taps;
      for (int64_t c = 0; c < out_c; ++c)
        for (int64_t k = 0; k < taps; ++k) *to++ = static_cast<T>(sums[c * step_c + k * step_k]);
    }
  });
}

// Sums partial [B, parts, planes, rows, columns] to grad [B or 1, planes, rows or 1, columns].
template <typename T, typename A>
void reduce_spatial(const Tensor& grad, const A* partial, int64_t B, int64_t parts, int64_t rows) {
  T* const out = static_cast<T*>(grad.mutable_data_ptr());
  const int64_t planes = grad.size(1), out_rows = grad.size(2), columns = grad.size(3);
  const int64_t summed_parts = grad.size(0) == 1 ? B * parts : parts;
  const int64_t summed_rows = rows / out_rows, size = planes * rows * columns;
  parallel(grad.size(0) * planes * out_rows, summed_parts * summed_rows * columns,
           [&](int64_t begin, int64_t end) {
             std::vector<A> sums(columns);
             for (int64_t i = begin; i < end; ++i) {
               std::fill(sums.begin(), sums.end(), A(0));
               const int64_t b = i / (planes * out_rows), plane_row = i % (planes * out_rows);
               const A* from = partial + b * parts * size + plane_row * summed_rows * columns;
               for (int64_t part = 0; part < summed_parts; ++part, from += size)
                 for (int64_t row = 0; row < summed_rows; ++row)
                   for (int64_t x = 0; x < columns; ++x) sums[x] += from[row * columns + x];
               for (int64_t x = 0; x < columns; ++x) out[i * columns + x] = static_cast<T>(sums[x]);
             }
           });
}

// A buffer for `count` partial sums, or the gradient itself if it has their form already.
template <typename A>
Tensor partial_buffer(const Tensor& grad, int64_t count, bool same_order) {
  constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  if (same_order && grad.scalar_type() == dtype && grad.numel() == count) return grad;
  return torch::stable::empty({count}, dtype, std::nullopt, grad.device());
}

template <typename T>
void backward(const DdfShape& s, const Tensor& grad, const Tensor& features,
              const Tensor& channel_filter, const Tensor& spatial_filter,
              const Tensor* grad_features, const Tensor* grad_channel, const Tensor* grad_spatial) {
  using A = Accumulator<T>;
  const DdfKernels<T> kernels = CHOOSE_KERNELS(ddf_kernels<T>(s.multiply));
  const bool channels_last = is_channels_last(features);
  DdfBackward<T> op{make_operands<T>(s, features, channel_filter, spatial_filter)};  // others null
  op.grad = static_cast<const T*>(grad.const_data_ptr());
  op.grad_strides = strides_of<MapStrides>(grad);
  if (grad_features) {
    op.grad_features = static_cast<T*>(grad_features->mutable_data_ptr());
    op.grad_features_strides = strides_of<MapStrides>(*grad_features);
  }
  op.broadcast_rows = spatial_filter.size(2) == 1;
  op.broadcast_columns = spatial_filter.size(3) == 1;

  const int64_t taps = op.live_taps(), phases = op.rows.phases.size() * op.columns.phases.size();
  const int64_t planes = channels_last ? 2 * taps : 3 * taps + 2 * phases + 1;
  const int64_t row_bytes = (s.Wo + op.columns.reach) * planes * sizeof(A);
  const int64_t min_bands = channels_last || s.C < kMinUnits ? ceil_div(kMinUnits, s.B) : 1;
  op.bands = make_bands(s.Ho, row_bytes, op.rows.reach, min_bands);
  op.channel_blocks = 1;
  if (!channels_last) {
    constexpr int64_t kMinChannels = 32;  // a block has a spatial gradient of its own to add up
    const int64_t wanted = ceil_div(kMinUnits, s.B * op.bands.count);
    op.channel_blocks = std::max<int64_t>(1, std::min(wanted, s.C / kMinChannels));
  }

  Tensor channel_sums, spatial_sums;
  if (grad_channel) {
    channel_sums =
        partial_buffer<A>(*grad_channel, s.B * op.bands.count * s.C * s.taps(), !channels_last);
    op.partial_channel = static_cast<A*>(channel_sums.mutable_data_ptr());
  }
  if (grad_spatial) {
    spatial_sums = partial_buffer<A>(
        *grad_spatial,
        s.B * op.channel_blocks * s.taps() * op.partial_rows() * op.partial_columns(), true);
    op.partial_spatial = static_cast<A*>(spatial_sums.mutable_data_ptr());
  }
  const auto kernel = channels_last ? kernels.backward_pixels : kernels.backward_planes;
  const int64_t units = s.B * op.bands.count * op.channel_blocks;
  parallel(units, s.B * s.C * s.Ho * s.Wo * taps / units,
           [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
  if (grad_channel && channel_sums.get() != grad_channel->get())
    reduce_channel<T>(*grad_channel, op.partial_channel, s.B, op.bands.count, s.C, s.taps(),
                      channels_last);
  if (grad_spatial && spatial_sums.get() != grad_spatial->get())
    reduce_spatial<T>(*grad_spatial, op.partial_spatial, s.B, op.channel_blocks, op.partial_rows());
}

Tensor ddf(const Tensor& features, const Tensor& channel_filter, const Tensor& spatial_filter,
           int64_t kernel_size, int64_t dilation, int64_t stride,
           const std::string& kernel_combine) {
  const DdfShape s = check_ddf(features, channel_filter, spatial_filter, kernel_size, dilation,
                               stride, kernel_combine);
  const Tensor out = empty(features, {s.B, s.C, s.Ho, s.Wo}, is_channels_last(features));
  if (out.numel() == 0) return out;
  dispatch(features.scalar_type(), [&](auto zero) {
    forward<decltype(zero)>(s, features, channel_filter, spatial_filter, out);
  });
  return out;
}

// The kernels read rows (NCHW) or pixels (channels_last) of the gradient: give them such.
Tensor readable_grad(const Tensor& grad, bool channels_last) {
  if (channels_last)
    return grad.stride(1) == 1 ? grad : torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
  return is_channels_last(grad) ? torch::stable::contiguous(grad) : grad;
}

std::tuple<Tensor, Tensor, Tensor> ddf_backward(const Tensor& grad, const Tensor& features,
                                                const Tensor& channel_filter,
                                                const Tensor& spatial_filter, int64_t kernel_size,
                                                int64_t dilation, int64_t stride,
                                                const std::string& kernel_combine,
                                                const std::vector<bool>& needs) {
  const DdfShape s = check_ddf(features, channel_filter, spatial_filter, kernel_size, dilation,
                               stride, kernel_combine);
  check_ddf_grad(grad, features, s);
  STD_TORCH_CHECK(needs.size() == 3, "needs must have 3 entries, got ", needs.size());
  const bool channels_last = is_channels_last(features);
  Tensor grads[] = {empty_gradient(features, needs[0], channels_last),
                    empty_gradient(channel_filter, needs[1]),
                    empty_gradient(spatial_filter, needs[2])};
  if (features.numel() == 0) {
    for (Tensor& t : grads) torch::stable::zero_(t);
  } else if (needs[0] || needs[1] || needs[2]) {
    const Tensor g = readable_grad(grad, channels_last);
    dispatch(features.scalar_type(), [&](auto zero) {
      backward<decltype(zero)>(s, g, features, channel_filter, spatial_filter,
                               needs[0] ? &grads[0] : nullptr, needs[1] ? &grads[1] : nullptr,
                               needs[2] ? &grads[2] : nullptr);
    });
  }
  return {grads[0], grads[1], grads[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("ddf", TORCH_BOX(&ddf));
  m.impl("ddf_backward", TORCH_BOX(&ddf_backward));
}

}  // namespace timm_dynamic
