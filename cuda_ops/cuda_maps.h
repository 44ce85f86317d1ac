// What CUDA operators on maps, [B, C, H, W] in NCHW or channels_last, have in common.
#pragma once

#include "cuda_device.h"
#include "ddf_args.h"

namespace timm_dynamic {

inline void check_map(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && (t.scalar_type() == ScalarType::Float ||
                                   t.scalar_type() == ScalarType::Half ||
                                   t.scalar_type() == ScalarType::BFloat16),
                  name, " must be [B, C, H, W], float32, float16 or bfloat16, got ", shape_text(t));
}

// As the kernels read it.
inline Tensor dense(const Tensor& map, bool channels_last) {
  return torch::stable::contiguous(
      map, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Whether 16 bytes at a time are elements of one row, where all rows are of `length` elements.
template <typename... Pointers>
bool can_vectorize(const Tensor& like, int64_t length, Pointers... at) {
  const uintptr_t bytes = length * like.element_size();
  return ((reinterpret_cast<uintptr_t>(at) | ... | bytes) & 15) == 0;
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape;
}

// Adds up partial sums over their first dimension.
inline Tensor summed(const Tensor& parts) {
  const std::vector<int64_t> first = {0}, shape = shape_of(parts);
  if (shape[0] > 1) return torch::stable::sum(parts, first);
  return torch::stable::reshape(parts, std::vector<int64_t>(shape.begin() + 1, shape.end()));
}

inline Tensor empty_floats(const Tensor& beside, std::vector<int64_t> shape) {
  return torch::stable::empty(shape, ScalarType::Float, std::nullopt, beside.device());
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace timm_dynamic
