// The arguments of timm_dynamic::dynamic_filter and its backward form as both devices' kernels need
// them: checked, their strides, and their results allocated.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "dynamic_filter/shape.h"

namespace timm_dynamic {

// In `expected` of check_tensor: a dimension of this size, or of 1, along which it is broadcast.
inline int64_t or_one(int64_t size) { return -1 - size; }

inline void check_tensor(const char* name, const Tensor& t, const std::vector<int64_t>& expected,
                         const Tensor& x) {
  bool fits = t.dim() == static_cast<int64_t>(expected.size());
  std::string text;
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool broadcast = expected[i] < 0;
    const int64_t size = broadcast ? -1 - expected[i] : expected[i];
    fits = fits && (t.size(i) == size || (broadcast && t.size(i) == 1));
    text += (i ? ", " : "[") + std::to_string(size);
  }
  STD_TORCH_CHECK(fits, name, " must have shape ", text, "] for x ", shape_text(x), ", got ",
                  shape_text(t));
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on the device of x");
}

inline DdfShape check_arguments(const Tensor& x, const Tensor& filters,
                                const std::optional<Tensor>& channel_filter, int64_t kernel_size,
                                const std::string& kernel_combine, int64_t parts, int64_t dilation,
                                int64_t stride, int64_t upsample) {
  constexpr int64_t kMax = INT32_MAX;  // so that no index overflows
  STD_TORCH_CHECK(kernel_size % 2 == 1 && kernel_size >= 1 && kernel_size <= kMax,
                  "kernel_size must be odd and positive, got ", kernel_size);
  STD_TORCH_CHECK(dilation >= 1 && dilation <= kMax, "dilation must be in [1, ", kMax, "], got ",
                  dilation);
  STD_TORCH_CHECK(stride >= 1 && stride <= kMax, "stride must be in [1, ", kMax, "], got ", stride);
  STD_TORCH_CHECK(upsample >= 1 && upsample <= 1024 && (upsample == 1 || stride == 1),
                  "upsample must be in [1, 1024], and 1 beside a stride, got ", upsample);
  STD_TORCH_CHECK(kernel_combine == "mul" || kernel_combine == "add",
                  "kernel_combine must be \"mul\" or \"add\", got \"", kernel_combine, "\"");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(2) > 0 && x.size(3) > 0,
                  "x must be [B, C, H, W] with H, W > 0, got ", shape_text(x));
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "x must be float64, float32, bfloat16 or float16");
  DdfShape s;
  s.B = x.size(0), s.C = x.size(1), s.H = x.size(2), s.W = x.size(3);
  s.Ho = output_size(s.H * upsample, stride), s.Wo = output_size(s.W * upsample, stride);
  s.K = kernel_size, s.dilation = dilation, s.stride = stride, s.upsample = upsample;
  s.multiply = kernel_combine == "mul", s.alone = !channel_filter;
  s.groups = filters.dim() == 5 ? filters.size(1) : 1;
  STD_TORCH_CHECK(s.groups >= 1 && s.C % s.groups == 0, "the filters' number must divide ", s.C,
                  " channels, got ", s.groups);
  STD_TORCH_CHECK(parts >= 1 && s.groups % parts == 0, "parts must divide ", s.groups,
                  " filters, got ", parts);
  s.inner = s.members() == 1 ? s.groups : s.groups / parts;
  if (channel_filter)
    check_tensor("channel_filter", *channel_filter, {or_one(s.B), or_one(s.C), s.taps()}, x);
  check_tensor("filters", filters, {or_one(s.B), s.groups, s.taps(), or_one(s.Ho), or_one(s.Wo)},
               x);
  return s;
}

inline void check_grad(const Tensor& grad, const Tensor& x, const DdfShape& s) {
  check_tensor("grad", grad, {s.B, s.C, s.Ho, s.Wo}, x);
}

// The gradient tensor of one input: 0 elements where it is not needed.
inline Tensor empty_gradient(const Tensor& input, bool needed, bool channels_last = false) {
  if (!needed) return empty(input, {0});
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < input.dim(); ++i) sizes.push_back(input.size(i));
  return empty(input, sizes, channels_last);
}

// Adds up partial sums [n, ...] over n and over the dimensions along which `input` was broadcast;
// `sizes` are its dimensions beside those of the sums.
inline Tensor finish(const Tensor& sums, const std::vector<int64_t>& sizes, const Tensor& input) {
  std::vector<int64_t> dims = {0}, shape;
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] == 1) dims.push_back(i + 1);
  for (int64_t i = 0; i < input.dim(); ++i) shape.push_back(input.size(i));
  const Tensor total = torch::stable::reshape(torch::stable::sum(sums, dims), shape);
  return torch::stable::contiguous(torch::stable::to(total, input.scalar_type()));
}

// 0 along dimensions of size 1.
inline int64_t stride_of(const Tensor& t, int64_t i) { return t.size(i) == 1 ? 0 : t.stride(i); }

inline MapStrides map_strides(const Tensor& t) {
  return {stride_of(t, 0), stride_of(t, 1), stride_of(t, 2), stride_of(t, 3)};
}

inline ChannelFilterStrides channel_strides(const std::optional<Tensor>& t, int64_t K) {
  if (!t) return {0, 0, 0, 0};
  const int64_t k = stride_of(*t, 2);
  return {stride_of(*t, 0), stride_of(*t, 1), K * k, k};
}

inline SpatialFilterStrides spatial_strides(const Tensor& t) {
  return {stride_of(t, 0), stride_of(t, 2), stride_of(t, 3), stride_of(t, 4), stride_of(t, 1)};
}

}  // namespace timm_dynamic
