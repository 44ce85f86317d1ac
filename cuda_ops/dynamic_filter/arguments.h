// The arguments of timm_dynamic::ddf and ::ddf_backward as both devices' kernels need them:
// checked, their strides, and their results allocated.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "common/arguments.h"
#include "dynamic_filter/shape.h"

namespace timm_dynamic {

// `fixed` dimensions must have exactly the expected size, the others may also be 1.
inline void check_tensor(const char* name, const Tensor& t, std::array<int64_t, 4> expected,
                         std::array<bool, 4> fixed, const Tensor& features) {
  bool fits = t.dim() == 4;
  std::string text;
  for (int64_t i = 0; i < 4; ++i) {
    fits = fits && (t.size(i) == expected[i] || (!fixed[i] && t.size(i) == 1));
    text += (i ? ", " : "[") + std::to_string(expected[i]);
  }
  STD_TORCH_CHECK(fits, name, " must have shape ", text, "] for features ", shape_text(features),
                  ", got ", shape_text(t));
  STD_TORCH_CHECK(t.scalar_type() == features.scalar_type(), name,
                  " must have the dtype of features");
  STD_TORCH_CHECK(t.device() == features.device(), name, " must be on the device of features");
}

inline DdfShape check_ddf(const Tensor& features, const Tensor& channel_filter,
                          const Tensor& spatial_filter, int64_t kernel_size, int64_t dilation,
                          int64_t stride, const std::string& kernel_combine) {
  constexpr int64_t kMax = INT32_MAX;  // so that no index overflows
  STD_TORCH_CHECK(kernel_size % 2 == 1 && kernel_size >= 1 && kernel_size <= kMax,
                  "kernel_size must be odd and positive, got ", kernel_size);
  STD_TORCH_CHECK(dilation >= 1 && dilation <= kMax, "dilation must be in [1, ", kMax, "], got ",
                  dilation);
  STD_TORCH_CHECK(stride >= 1 && stride <= kMax, "stride must be in [1, ", kMax, "], got ", stride);
  STD_TORCH_CHECK(kernel_combine == "mul" || kernel_combine == "add",
                  "kernel_combine must be \"mul\" or \"add\", got \"", kernel_combine, "\"");
  STD_TORCH_CHECK(features.dim() == 4 && features.size(2) > 0 && features.size(3) > 0,
                  "features must be [B, C, H, W] with H, W > 0, got ", shape_text(features));
  const ScalarType dtype = features.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "features must be float64, float32, bfloat16 or float16");
  DdfShape s;
  s.B = features.size(0), s.C = features.size(1), s.H = features.size(2), s.W = features.size(3);
  s.Ho = output_size(s.H, stride), s.Wo = output_size(s.W, stride);
  s.K = kernel_size, s.dilation = dilation, s.stride = stride;
  s.multiply = kernel_combine == "mul";
  check_tensor("channel_filter", channel_filter, {s.B, s.C, s.K, s.K}, {false, false, true, true},
               features);
  check_tensor("spatial_filter", spatial_filter, {s.B, s.taps(), s.Ho, s.Wo},
               {false, true, false, false}, features);
  return s;
}

inline void check_ddf_grad(const Tensor& grad, const Tensor& features, const DdfShape& s) {
  check_tensor("grad", grad, {s.B, s.C, s.Ho, s.Wo}, {true, true, true, true}, features);
}

// The gradient tensor of one input: 0 elements where it is not needed.
inline Tensor empty_gradient(const Tensor& input, bool needed, bool channels_last = false) {
  if (!needed) return empty(input, {0});
  return empty(input, {input.size(0), input.size(1), input.size(2), input.size(3)}, channels_last);
}

// Strides as {b, c, y, x}, {b, c, ky, kx} or {b, k, y, x}; 0 along dimensions of size 1.
template <typename Strides>
Strides strides_of(const Tensor& t) {
  const auto stride = [&](int64_t i) { return t.size(i) == 1 ? 0 : t.stride(i); };
  return {stride(0), stride(1), stride(2), stride(3)};
}

}  // namespace timm_dynamic
