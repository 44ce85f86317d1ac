// What a branch's kernels for few float32 samples share, the same for every instruction set.
#pragma once

#include <cstdint>

namespace timm_dynamic {

constexpr int64_t kBlock = 64;  // positions of a branch's work unit
constexpr int64_t kRows = 9;    // outputs of it

// A 1x1 convolution: weight [rows, C], bias [rows] or null.
struct Pointwise {
  int64_t C, H, W, Ho, Wo, stride_y, stride_x, rows;
  const float *weight, *bias;

  int64_t outputs() const { return Ho * Wo; }
  int64_t blocks() const { return (outputs() + kBlock - 1) / kBlock; }
  int64_t row_groups() const { return (rows + kRows - 1) / kRows; }
};

}  // namespace timm_dynamic
