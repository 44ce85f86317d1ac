// A 1x1 convolution of NCHW float32 maps, a block of positions at a time, for one instruction set;
// see cpu_vectors.h for what the includer defines. For few outputs, such as a branch has.

#include "cpu_vectors.h"

namespace timm_dynamic::ISA {

#if ISA_LEVEL == 4
constexpr int kVectors = 2;  // accumulators: kRows of each, within the registers
#else
constexpr int kVectors = 1;
#endif
constexpr int64_t kStep = kVectors * kLanes<float>;

// How positions are read: as full vectors, as the first ones of a vector, one by one.
enum class Access { kWhole, kPart, kStrided };

// Outputs [row, row + kRows) at the `count` <= kStep positions from `first` on, to out[row*pitch +
// i].
template <Access kAccess>
inline void convolve_rows(const Pointwise& op, const float* x, float* out, int64_t pitch,
                          int64_t row, int64_t first, int64_t count, const float* scale,
                          const float* base) {
  const float* weights[kRows];
  Vec<float> sums[kRows][kVectors];
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t at = std::min(row + r, op.rows - 1);
    weights[r] = op.weight + at * op.C;
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = scale ? broadcast(scale[at]) * load<float>(base + at * pitch + v * kLanes<float>,
                                                              count - v * kLanes<float>)
                         : broadcast(op.bias ? op.bias[at] : 0.0f);
  }
  int64_t offsets[kStep] = {};
  if (kAccess == Access::kStrided)
    for (int64_t i = 0; i < count; ++i)
      offsets[i] = (first + i) / op.Wo * op.stride_y * op.W + (first + i) % op.Wo * op.stride_x;
  for (int64_t c = 0; c < op.C; ++c, x += op.H * op.W) {
    float gathered[kStep];
    if (kAccess == Access::kStrided)
      for (int64_t i = 0; i < kStep; ++i) gathered[i] = x[offsets[i]];
    const float* const from = kAccess == Access::kStrided ? gathered : x + first;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = v * kLanes<float>;
      const Vec<float> values =
          load<float>(from + at, kAccess == Access::kPart ? count - at : kStep);
      for (int64_t r = 0; r < kRows; ++r) sums[r][v] += broadcast(weights[r][c]) * values;
    }
  }
  for (int64_t r = 0; r < std::min(kRows, op.rows - row); ++r)
    for (int v = 0; v < kVectors; ++v)
      store<float>(out + (row + r) * pitch + v * kLanes<float>, sums[r][v],
                   count - v * kLanes<float>);
}

// Outputs [row, row + kRows) at the positions [first, last) of one sample, to
// out[row*pitch + position - first]; `scale` and `base` as above.
INLINE void convolve(const Pointwise& op, const float* x, float* out, int64_t pitch, int64_t row,
                     int64_t first, int64_t last, const float* scale = nullptr,
                     const float* base = nullptr) {
  for (int64_t at = first; at < last; at += kStep) {
    const int64_t skip = at - first, count = std::min(kStep, last - at);
    const auto rows = op.stride_y != 1 || op.stride_x != 1 ? convolve_rows<Access::kStrided>
                      : count == kStep                     ? convolve_rows<Access::kWhole>
                                                           : convolve_rows<Access::kPart>;
    rows(op, x, out + skip, pitch, row, at, count, scale, scale ? base + skip : nullptr);
  }
}

}  // namespace timm_dynamic::ISA
