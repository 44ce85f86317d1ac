// CPU kernels of timm_dynamic/ops/sparse: which positions are active, which are read, and where.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "sparse/arguments.h"

namespace timm_dynamic {
namespace {

Tensor window_table(const Tensor& positions, Sizes input_size, Sizes output_size, Sizes kernel_size,
                    Sizes stride, Sizes dilation, Sizes padding) {
  const Window<int64_t> w =
      make_window(input_size, output_size, kernel_size, stride, dilation, padding);
  const int64_t M = positions.numel(), T = w.taps(), outputs = w.Ho * w.Wo;
  const int32_t* const at = indices("positions", positions, 1);
  const Tensor table = empty_indices(positions, {M, T});
  const auto out = static_cast<int32_t*>(table.mutable_data_ptr());
  parallel(M, T * 4, [&](int64_t begin, int64_t end) {
    std::fill(out + begin * T, out + end * T, -1);
    for (int64_t m = begin; m < end; ++m) {
      if (at[m] < 0) continue;
      const int64_t first = at[m] / outputs * w.H * w.W;
      w.each_tap(at[m] % outputs / w.Wo, at[m] % w.Wo, [&](int64_t tap, int64_t input) {
        out[m * T + tap] = static_cast<int32_t>(first + input);
      });
    }
  });
  return table;
}

// The active positions of a mask.
class Mask {
 public:
  explicit Mask(const Tensor& mask) : is_bool_(mask.scalar_type() == ScalarType::Bool) {
    STD_TORCH_CHECK(mask.dim() == 4 && mask.size(1) == 1 && mask.is_contiguous() &&
                        (is_bool_ || mask.scalar_type() == ScalarType::Float),
                    "mask must be [B, 1, H, W], boolean or float32, and contiguous, got ",
                    shape_text(mask));
    data_ = mask.const_data_ptr();
  }
  bool operator[](int64_t i) const {
    return is_bool_ ? static_cast<const bool*>(data_)[i] : static_cast<const float*>(data_)[i] != 0;
  }

 private:
  bool is_bool_;
  const void* data_;
};

// First what every row of the mask and every sample needs, then where that goes. Without a capacity
// there are as many rows as it takes.
std::tuple<Tensor, Tensor, Tensor, Tensor> neighbour_table(
    const Tensor& mask, Sizes input_size, Sizes kernel_size, Sizes stride, Sizes dilation,
    Sizes padding, const std::optional<std::vector<int64_t>>& capacity) {
  const Mask active(mask);
  const int64_t B = mask.size(0);
  const Window<int64_t> w =
      make_window(input_size, {mask.size(2), mask.size(3)}, kernel_size, stride, dilation, padding);
  const int64_t T = w.taps(), outputs = w.Ho * w.Wo, inputs = w.H * w.W;
  STD_TORCH_CHECK(B * std::max(outputs, inputs) <= INT32_MAX,
                  "too many positions for int32: ", B * std::max(outputs, inputs));
  if (capacity) check_capacity(*capacity, B * outputs, B * inputs);
  const bool all_listed = capacity && (*capacity)[1] == B * inputs;
  std::vector<int32_t> rows(B * inputs, -1);  // the row of every input position that is needed
  std::vector<int64_t> first_active(B * w.Ho + 1), first_needed(B + 1);
  parallel(B, outputs * T, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int32_t* const row_of = rows.data() + b * inputs;
      for (int64_t y = 0; y < w.Ho; ++y)
        for (int64_t x = 0; x < w.Wo; ++x) {
          if (!active[(b * w.Ho + y) * w.Wo + x]) continue;
          ++first_active[b * w.Ho + y + 1];
          w.each_tap(y, x, [&](int64_t, int64_t at) { row_of[at] = 0; });
        }
      first_needed[b + 1] = std::count(row_of, row_of + inputs, 0);
    }
  });
  std::partial_sum(first_active.begin(), first_active.end(), first_active.begin());
  std::partial_sum(first_needed.begin(), first_needed.end(), first_needed.begin());
  const int64_t counts[] = {first_active.back(), first_needed.back()};
  const int64_t active_rows = capacity ? (*capacity)[0] : counts[0];
  const int64_t needed_rows = capacity ? (*capacity)[1] : counts[1];
  const Tensor positions = empty_indices(mask, {active_rows}),
               needed = empty_indices(mask, {needed_rows}),
               table = empty_indices(mask, {active_rows, T}), sizes = empty_indices(mask, {2});
  int32_t* const position = mutable_indices(positions);
  int32_t* const need = mutable_indices(needed);
  int32_t* const entry = mutable_indices(table);
  std::copy(counts, counts + 2, mutable_indices(sizes));
  parallel(B, inputs, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t next = first_needed[b];
      for (int64_t i = b * inputs; i < (b + 1) * inputs; ++i) {
        if (rows[i] < 0 && !all_listed) continue;
        const int64_t row = all_listed ? i : next++;
        rows[i] = row < needed_rows ? static_cast<int32_t>(row) : -1;
        if (row < needed_rows) need[row] = static_cast<int32_t>(i);
      }
    }
  });
  parallel(B * w.Ho, w.Wo * T * 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* const row_of = rows.data() + i / w.Ho * inputs;
      int64_t m = first_active[i];
      const int64_t last = std::min(first_active[i + 1], active_rows);
      if (m >= last) continue;
      std::fill(entry + m * T, entry + last * T, -1);
      for (int64_t x = 0; x < w.Wo && m < last; ++x) {
        if (!active[i * w.Wo + x]) continue;
        position[m] = static_cast<int32_t>(i * w.Wo + x);
        w.each_tap(i % w.Ho, x, [&](int64_t tap, int64_t at) { entry[m * T + tap] = row_of[at]; });
        ++m;
      }
    }
  });
  const auto empty_rows = [](int32_t* data, int64_t from, int64_t to) {
    if (from < to) std::fill(data + from, data + to, -1);
  };
  empty_rows(position, counts[0], active_rows);
  empty_rows(entry, counts[0] * T, active_rows * T);
  if (!all_listed) empty_rows(need, counts[1], needed_rows);
  return {positions, needed, table, sizes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("window_table", TORCH_BOX(&window_table));
  m.impl("neighbour_table", TORCH_BOX(&neighbour_table));
}

}  // namespace timm_dynamic
