// The arguments of the operators of timm_dynamic/ops/sparse as both devices' kernels need them.
#pragma once

#include "common/arguments.h"
#include "sparse/window.h"

namespace timm_dynamic {

using Sizes = const std::vector<int64_t>&;

inline Window<int64_t> make_window(Sizes input_size, Sizes output_size, Sizes kernel_size,
                                   Sizes stride, Sizes dilation, Sizes padding) {
  for (const auto* sizes : {&input_size, &output_size, &kernel_size, &stride, &dilation, &padding})
    STD_TORCH_CHECK(sizes->size() == 2, "sizes must be pairs, got ", sizes->size(), " numbers");
  return {input_size[0],  input_size[1],  output_size[0], output_size[1],
          kernel_size[0], kernel_size[1], stride[0],      stride[1],
          dilation[0],    dilation[1],    padding[0],     padding[1]};
}

inline Tensor empty_indices(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::empty(sizes, ScalarType::Int, std::nullopt, like.device());
}

inline int32_t* mutable_indices(const Tensor& t) {
  return static_cast<int32_t*>(t.mutable_data_ptr());
}

// Room for so many active positions and so many needed ones.
inline void check_capacity(Sizes capacity, int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(capacity.size() == 2 && capacity[0] >= 0 && capacity[0] <= outputs &&
                      capacity[1] >= 0 && capacity[1] <= inputs,
                  "capacity must be two numbers up to ", outputs, " and ", inputs);
}

inline const int32_t* indices(const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim && t.is_contiguous() && t.scalar_type() == ScalarType::Int, name,
                  " must be contiguous int32 of ", dim, " dimensions, got ", shape_text(t));
  return static_cast<const int32_t*>(t.const_data_ptr());
}

}  // namespace timm_dynamic
