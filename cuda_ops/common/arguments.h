// What operators ask about the tensors that they are given, and how they allocate their results.
// torch.ops can be called without the Python checks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace timm_dynamic {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// Whether its elements lie one after the other as channels_last.
inline bool is_dense_channels_last(const Tensor& t) {
  const int64_t order[] = {1, 3, 2, 0};
  int64_t stride = 1;
  for (const int64_t i : order) {
    if (t.size(i) != 1 && t.stride(i) != stride) return false;
    stride *= t.size(i);
  }
  return true;
}

// Results are channels_last where this holds.
inline bool is_channels_last(const Tensor& t) {
  return t.size(1) > 1 && t.stride(1) == 1 && t.stride(3) >= t.size(1);
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, bool channels_last = false) {
  return torch::stable::empty(
      sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// The elements of a parameter that has to have `count` of them.
inline const float* parameter(const char* name, const Tensor& t, int64_t count, const Tensor& x) {
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous() && t.scalar_type() == ScalarType::Float &&
                      t.device() == x.device(),
                  name, " must be ", count, " contiguous float32 elements beside x, got ",
                  shape_text(t));
  return static_cast<const float*>(t.const_data_ptr());
}

inline const float* optional_parameter(const char* name, const std::optional<Tensor>& t,
                                       int64_t count, const Tensor& x) {
  return t ? parameter(name, *t, count, x) : nullptr;
}

// Whether its elements are float32, one after the other as [B, C, H, W], or as channels_last where
// that is allowed, and some.
inline void check_maps(const char* name, const Tensor& t, bool channels_last = false) {
  STD_TORCH_CHECK(t.dim() == 4 && t.numel() > 0 && t.scalar_type() == ScalarType::Float &&
                      (t.is_contiguous() || (channels_last && is_dense_channels_last(t))),
                  name, " must be [B, C, H, W], float32, contiguous ",
                  channels_last ? "or channels_last " : "", "and not empty, got ", shape_text(t));
}

inline const float* floats(const Tensor& t) {
  return static_cast<const float*>(t.const_data_ptr());
}

inline float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace timm_dynamic
