// timm_dynamic::dynamic_filter and its backward form on CUDA, for one group, two factors and no
// upsampling: checks, memory, and the choice of a kernel of cuda_*.cu and of how to cut the work.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/cuda_device.h"
#include "dynamic_filter/arguments.h"
#include "dynamic_filter/cuda_calls.h"

namespace timm_dynamic {
namespace {

Call make_call(DdfShape s, const Tensor& from, const Tensor& to, const Tensor& channel_filter,
               const Tensor& spatial_filter, bool transposed) {
  // Steps past the end of the map all do the same; so bounded, they fit 32 bits where the map does.
  s.dilation = std::min(s.dilation, std::max(s.H, s.W));
  s.stride = std::min(s.stride, std::max(s.H, s.W));
  return {s,
          transposed,
          map_strides(from),
          map_strides(to),
          channel_strides(channel_filter, s.K),
          spatial_strides(spatial_filter)};
}

// Whether 32-bit indices do: offsets within a plane, and window positions K / 2 * dilation outside.
bool is_small(const Call& call) {
  const auto extent = [](const MapStrides& st, int64_t h, int64_t w) {
    return std::max({h * w, (h - 1) * st.y + (w - 1) * st.x, 4 * h, 4 * w});
  };
  return call.s.C < kMaxOffset && call.s.B < kMaxOffset &&
         extent(call.from, call.from_h(), call.from_w()) < kMaxOffset &&
         extent(call.to, call.to_h(), call.to_w()) < kMaxOffset;
}

// Whether any kVector elements of a row (NCHW) or pixel (channels_last) can be loaded at once.
bool is_aligned(const Tensor& t, const MapStrides& st, int64_t size, Layout layout) {
  const bool channels_last = layout == Layout::kChannelsLast;
  const int64_t inner = channels_last ? st.c : st.x, outer = channels_last ? st.x : st.c;
  const uintptr_t bytes = kVector * t.element_size();
  return size % kVector == 0 && inner == 1 && outer % kVector == 0 && st.b % kVector == 0 &&
         st.y % kVector == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % bytes == 0;
}

// Into how many equal parts to cut `length`, where each part makes `blocks` blocks.
int parts(int64_t length, int64_t shortest, int64_t blocks, int64_t wanted) {
  int64_t n = 1;
  while (n * blocks < wanted && ceil_div(length, 2 * n) >= shortest) n *= 2;
  return ceil_div(length, ceil_div(length, n));
}

// The size of blocks that leaves the fewest threads idle.
int block_size(int64_t items, int most) {
  int best = most / kWarp;
  const auto warps = [&](int n) { return ceil_div(items, n * kWarp) * n; };
  for (int n = best - 1; n >= (items > most ? 4 : 1); --n) {
    if (warps(n) < warps(best)) best = n;
  }
  return best * kWarp;
}

// `most` threads a block, walks no shorter than `shortest`, `wanted` blocks if that allows.
Plan make_plan(const Call& call, const Tensor& from, const Tensor& to, Layout layout, int most,
               int64_t shortest, int64_t wanted) {
  const DdfShape& s = call.s;
  Plan plan{};
  plan.layout = layout;
  plan.specialised = (s.K == 3 || s.K == 5 || s.K == 7) && is_small(call) &&
                     from.scalar_type() != ScalarType::Double;
  if (!plan.specialised) return plan;

  Grid& grid = plan.grid;
  if (layout == Layout::kNchw) {
    const bool vectorize = s.K == 3 && s.stride == 1 && s.dilation == 1 &&
                           is_aligned(from, call.from, s.W, layout) &&
                           is_aligned(to, call.to, s.W, layout);
    plan.vector = vectorize ? kVector : 1;
    const int64_t items = call.to_h() * call.to_w() / plan.vector;
    plan.threads = block_size(items, most);
    grid.x = ceil_div(items, plan.threads);
    grid.y = parts(s.C, shortest, grid.x * s.B, wanted);
    grid.z = 1;
    grid.span = ceil_div(s.C, grid.y);
  } else {
    const bool vectorize = s.K == 3 && is_aligned(from, call.from, s.C, layout) &&
                           is_aligned(to, call.to, s.C, layout);
    plan.vector = vectorize ? kVector : 1;
    grid.lanes = kWarp;
    while (grid.lanes > 8 && grid.lanes / 2 * plan.vector >= s.C) grid.lanes /= 2;
    grid.y = ceil_div(call.to_h(), most / grid.lanes);
    grid.z = ceil_div(s.C, grid.lanes * plan.vector);
    grid.x = parts(call.to_w(), shortest, grid.y * grid.z * s.B, wanted);
    grid.span = ceil_div(call.to_w(), grid.x);
    const int rows = ceil_div(call.to_h(), grid.y), rows_of_warp = kWarp / grid.lanes;
    plan.threads = ceil_div(rows, rows_of_warp) * kWarp;
  }
  const int64_t blocks = s.B * grid.x * grid.y * grid.z;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "dynamic_filter: tensors too large, ", blocks,
                  " thread blocks");
  return plan;
}

void run_gather(const Device& device, const DdfShape& s, const Tensor& from, const Tensor& to,
                const Tensor& channel_filter, const Tensor& spatial_filter, bool transposed,
                Layout layout) {
  const Call call = make_call(s, from, to, channel_filter, spatial_filter, transposed);
  // Several rounds of blocks, so that a last one half full costs little.
  const Plan plan =
      make_plan(call, from, to, layout, gather_threads(s.K), 8, 8 * device.processors);
  gather(call, plan, dtype_of(from), from.data_ptr(), channel_filter.data_ptr(),
         spatial_filter.data_ptr(), to.data_ptr(), device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Layout layout_of(const Tensor& features) {
  return is_channels_last(features) ? Layout::kChannelsLast : Layout::kNchw;
}

// Also that these kernels know the call.
DdfShape check_call(const Tensor& x, const Tensor& filters,
                    const std::optional<Tensor>& channel_filter, int64_t kernel_size,
                    const std::string& kernel_combine, int64_t parts, int64_t dilation,
                    int64_t stride, int64_t upsample) {
  const DdfShape s = check_arguments(x, filters, channel_filter, kernel_size, kernel_combine, parts,
                                     dilation, stride, upsample);
  STD_TORCH_CHECK(
      channel_filter && s.groups == 1 && upsample == 1,
      "the CUDA kernels take a channel filter, one filter a position and no upsampling; "
      "timm_dynamic.ops.dynamic_filter takes all");
  return s;
}

Tensor dynamic_filter(const Tensor& x, const Tensor& filters,
                      const std::optional<Tensor>& channel_filter, int64_t kernel_size,
                      const std::string& kernel_combine, int64_t parts, int64_t dilation,
                      int64_t stride, int64_t upsample) {
  const DdfShape s = check_call(x, filters, channel_filter, kernel_size, kernel_combine, parts,
                                dilation, stride, upsample);
  const Tensor out = empty(x, {s.B, s.C, s.Ho, s.Wo}, is_channels_last(x));
  if (out.numel() == 0) return out;
  run_gather(Device(x), s, x, out, *channel_filter, filters, false, layout_of(x));
  return out;
}

// The gradients of both filters; those not needed stay as they are.
void run_filter_grads(const Device& device, const DdfShape& s, const Tensor& grad,
                      const Tensor& features, const Tensor& channel_filter,
                      const Tensor& spatial_filter, const std::vector<bool>& needs,
                      Tensor& grad_channel, Tensor& grad_spatial) {
  const Call call = make_call(s, features, grad, channel_filter, spatial_filter, false);
  const Layout layout = layout_of(features);
  const bool channels_last = layout == Layout::kChannelsLast;
  // No more than one round of blocks: every part of the walk leaves partial sums of its own.
  const Plan plan = make_plan(call, features, grad, layout, filter_grad_threads(s.K),
                              channels_last ? 16 : channel_batch(s.K), 2 * device.processors);
  const int64_t x = plan.grid.x, y = plan.grid.y, z = plan.grid.z;
  const int64_t channel_parts = !plan.specialised ? 1 : channels_last ? x * y : x;
  const int64_t spatial_parts = !plan.specialised ? 1 : channels_last ? z : y;
  const bool taps_last = plan.specialised && channels_last;
  const auto new_sums = [&](std::vector<int64_t> shape) {
    const bool wide = features.scalar_type() == ScalarType::Double;
    return torch::stable::empty(shape, wide ? ScalarType::Double : ScalarType::Float, std::nullopt,
                                features.device());
  };
  Tensor channel_sums, spatial_sums;
  if (needs[2]) channel_sums = new_sums({channel_parts, s.B, s.C, s.taps()});
  if (needs[1]) {
    spatial_sums = taps_last ? new_sums({spatial_parts, s.B, s.Ho, s.Wo, s.taps()})
                             : new_sums({spatial_parts, s.B, s.taps(), s.Ho, s.Wo});
  }
  filter_grads(call, plan, dtype_of(features), grad.data_ptr(), features.data_ptr(),
               channel_filter.data_ptr(), spatial_filter.data_ptr(),
               needs[2] ? channel_sums.data_ptr() : nullptr,
               needs[1] ? spatial_sums.data_ptr() : nullptr, device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (needs[2]) {
    grad_channel = finish(channel_sums, {channel_filter.size(0), channel_filter.size(1), s.taps()},
                          channel_filter);
  }
  if (needs[1]) {
    if (taps_last) {  // [n, B, Ho, Wo, taps] -> [n, B, taps, Ho, Wo]
      spatial_sums = torch::stable::transpose(spatial_sums, 2, 4);
      spatial_sums = torch::stable::transpose(spatial_sums, 3, 4);
    }
    grad_spatial =
        finish(spatial_sums,
               {spatial_filter.size(0), s.taps(), spatial_filter.size(3), spatial_filter.size(4)},
               spatial_filter);
  }
}

std::tuple<Tensor, Tensor, Tensor> dynamic_filter_backward(
    const Tensor& grad_in, const Tensor& x, const Tensor& filters,
    const std::optional<Tensor>& channel_filter, int64_t kernel_size,
    const std::string& kernel_combine, int64_t parts, int64_t dilation, int64_t stride,
    int64_t upsample, const std::vector<bool>& needs) {
  const DdfShape s = check_call(x, filters, channel_filter, kernel_size, kernel_combine, parts,
                                dilation, stride, upsample);
  check_grad(grad_in, x, s);
  STD_TORCH_CHECK(needs.size() == 3, "needs must have 3 entries, got ", needs.size());
  const bool channels_last = is_channels_last(x), empty_batch = x.numel() == 0;
  Tensor grad_x = empty_gradient(x, needs[0], channels_last);
  Tensor grad_filters = empty_gradient(filters, needs[1] && empty_batch);
  Tensor grad_channel = empty_gradient(*channel_filter, needs[2] && empty_batch);
  if (empty_batch) {
    for (Tensor* t : {&grad_x, &grad_filters, &grad_channel}) torch::stable::zero_(*t);
    return {grad_x, grad_filters, grad_channel};
  }
  const Device device(x);
  const Tensor grad = torch::stable::contiguous(
      grad_in, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (needs[0]) run_gather(device, s, grad, grad_x, *channel_filter, filters, true, layout_of(x));
  if (needs[1] || needs[2])
    run_filter_grads(device, s, grad, x, *channel_filter, filters, needs, grad_channel,
                     grad_filters);
  return {grad_x, grad_filters, grad_channel};
}

}  // namespace
}  // namespace timm_dynamic

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CUDA, m) {
  m.impl("dynamic_filter", TORCH_BOX(&timm_dynamic::dynamic_filter));
  m.impl("dynamic_filter_backward", TORCH_BOX(&timm_dynamic::dynamic_filter_backward));
}
