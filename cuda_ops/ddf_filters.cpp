// CPU kernels of timm_dynamic::filter_norm and ::ddf_filters; the files of the same names in
// timm_dynamic/ops define the operators.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cpu_pointwise_args.h"
#include "ddf_args.h"
#include "ddf_cpu.h"

namespace timm_dynamic {

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

struct DdfFilters {
  Pointwise spatial;
  int64_t B, hidden_size, taps;
  double scale;
  const float *x, *hidden_weight, *hidden_bias, *channel_weight, *channel_bias, *channel_scale;
  float *pooled, *hidden, *channel_filter, *spatial_filter;
};

struct DdfFiltersKernels {
  using Kernel = void (*)(const DdfFilters&, int64_t begin, int64_t end);
  Kernel pool, spatial_filters, hidden_layer, channel_filters;
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "ddf_filters_cpu.h"
#include "cpu_dispatch.h"

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

std::tuple<Tensor, Tensor> ddf_filters(const Tensor& x, const Tensor& spatial_weight,
                                       const Tensor& spatial_bias, const Tensor& hidden_weight,
                                       const Tensor& hidden_bias, const Tensor& channel_weight,
                                       const Tensor& channel_bias, const Tensor& channel_scale,
                                       int64_t taps, int64_t stride, double scale) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.numel() > 0 && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
      "x must be [B, C, H, W], float32, contiguous and not empty, got ", shape_text(x));
  DdfFilters op;
  Pointwise& conv = op.spatial;
  op.B = x.size(0), conv.C = x.size(1), conv.H = x.size(2), conv.W = x.size(3);
  conv.rows = spatial_bias.numel(), op.hidden_size = hidden_bias.numel();
  STD_TORCH_CHECK(
      stride >= 1 && taps >= 2 && conv.rows >= taps && conv.rows % taps == 0 && op.hidden_size > 0,
      "stride must be positive, and spatial_bias hold filters of at least 2 taps");
  conv.Ho = output_size(conv.H, stride), conv.Wo = output_size(conv.W, stride);
  conv.stride_y = conv.stride_x = stride;
  op.taps = taps, op.scale = scale;
  const int64_t size = conv.C * taps;
  op.x = static_cast<const float*>(x.const_data_ptr());
  conv.weight = parameter("spatial_weight", spatial_weight, conv.rows * conv.C, x);
  conv.bias = parameter("spatial_bias", spatial_bias, conv.rows, x);
  op.hidden_weight = parameter("hidden_weight", hidden_weight, op.hidden_size * conv.C, x);
  op.hidden_bias = parameter("hidden_bias", hidden_bias, op.hidden_size, x);
  op.channel_weight = parameter("channel_weight", channel_weight, size * op.hidden_size, x);
  op.channel_bias = parameter("channel_bias", channel_bias, size, x);
  op.channel_scale = parameter("channel_scale", channel_scale, size, x);

  const Tensor scratch = empty(x, {op.B * (conv.C + op.hidden_size)});
  op.pooled = static_cast<float*>(scratch.mutable_data_ptr());
  op.hidden = op.pooled + op.B * conv.C;
  const Tensor channel = empty(x, {op.B, size, 1, 1}),
               spatial = empty(x, {op.B, conv.rows, conv.Ho, conv.Wo});
  op.channel_filter = static_cast<float*>(channel.mutable_data_ptr());
  op.spatial_filter = static_cast<float*>(spatial.mutable_data_ptr());

  const DdfFiltersKernels kernels = CHOOSE_KERNELS(ddf_filters_kernels());
  const auto run = [&](int64_t units, int64_t work, DdfFiltersKernels::Kernel kernel) {
    parallel(units, work, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
  };
  run(op.B * conv.C, conv.H * conv.W, kernels.pool);
  run(op.B * conv.blocks(), conv.rows * conv.C * kBlock, kernels.spatial_filters);
  run(op.hidden_size, op.B * conv.C, kernels.hidden_layer);
  run(conv.C, op.B * taps * op.hidden_size, kernels.channel_filters);
  return {channel, spatial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("filter_norm", TORCH_BOX(&filter_norm));
  m.impl("ddf_filters", TORCH_BOX(&ddf_filters));
}

}  // namespace timm_dynamic
