// The operators of sparse execution on CUDA: checks and memory. Their kernels are in cuda_*.cu.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/cuda_device.h"
#include "sparse/arguments.h"
#include "sparse/cuda_calls.h"

namespace timm_dynamic {
namespace {

bool is_supported(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Half ||
         t.scalar_type() == ScalarType::BFloat16;
}

// The elements of a matrix.
const void* matrix(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous() && is_supported(t), name,
                  " must be contiguous float32, float16 or bfloat16 of 2 dimensions, got ",
                  shape_text(t));
  return t.const_data_ptr();
}

// The elements of a tensor that has to have `count` of them, and all else as `like`.
const void* operand(const char* name, const Tensor& t, int64_t count, const Tensor& like) {
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous() &&
                      t.scalar_type() == like.scalar_type() && t.device() == like.device(),
                  name, " must be ", count,
                  " contiguous elements of the same dtype and device, got ", shape_text(t));
  return t.const_data_ptr();
}

// `indices`, on the device of `like`.
const int* indices_beside(const char* name, const Tensor& t, int64_t dim, const Tensor& like) {
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the same device as the rest");
  return indices(name, t, dim);
}

// The most bytes, of 16, that every row of `bytes` and every address can be cut into.
template <typename... Pointers>
int largest_unit(int64_t bytes, Pointers... at) {
  const uintptr_t bits = (reinterpret_cast<uintptr_t>(at) | ... | uintptr_t(16 | bytes));
  return bits & -bits;
}

// For 32-bit arithmetic.
Window<int> small_window(const Window<int64_t>& w) {
  const auto in_range = [](int64_t v, int64_t least, const char* name) {
    STD_TORCH_CHECK(v >= least && v <= 1 << 15, name, " must be in [", least, ", 32768], got ", v);
    return static_cast<int>(v);
  };
  return {in_range(w.H, 0, "height"),
          in_range(w.W, 0, "width"),
          in_range(w.Ho, 0, "height"),
          in_range(w.Wo, 0, "width"),
          in_range(w.Ky, 1, "kernel_size"),
          in_range(w.Kx, 1, "kernel_size"),
          in_range(w.stride_y, 1, "stride"),
          in_range(w.stride_x, 1, "stride"),
          in_range(w.dilation_y, 1, "dilation"),
          in_range(w.dilation_x, 1, "dilation"),
          in_range(w.padding_y, 0, "padding"),
          in_range(w.padding_x, 0, "padding")};
}

void check_entries(int64_t entries) {
  STD_TORCH_CHECK(entries <= INT32_MAX, "too many positions and taps for int32: ", entries);
}

Tensor gather_rows(const Tensor& source, const Tensor& table, double low, double high) {
  GatherRows op;
  op.source = matrix("source", source);
  op.table = indices_beside("table", table, 2, source);
  const int64_t bytes = source.size(1) * source.element_size();
  STD_TORCH_CHECK(bytes <= INT32_MAX, "rows too long: ", bytes, " bytes");
  op.M = table.numel(), op.C = source.size(1);
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  const Tensor out = empty(source, {table.size(0), table.size(1) * source.size(1)});
  if (out.numel() == 0) return out;
  op.out = out.mutable_data_ptr();
  op.unit = largest_unit(bytes, op.source, op.out);
  launch(op, dtype_of(source), Device(source).stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

void scatter_rows_(Tensor& out, const Tensor& positions, const Tensor& rows, double low,
                   double high) {
  ScatterRows op;
  matrix("out", out);
  op.positions = indices_beside("positions", positions, 1, out);
  op.M = positions.numel(), op.C = out.size(1);
  op.rows = operand("rows", rows, op.M * op.C, out);
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  if (rows.numel() == 0) return;
  op.out = out.mutable_data_ptr();
  op.aligned = largest_unit(op.C * out.element_size(), op.out, op.rows) == 16;
  launch(op, dtype_of(out), Device(out).stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor gather_depthwise(const Tensor& source, const Tensor& table, const Tensor& weight,
                        const Tensor& bias, double low, double high) {
  GatherDepthwise op;
  op.source = matrix("source", source), op.C = source.size(1);
  op.table = indices_beside("table", table, 2, source);
  op.M = table.size(0), op.T = table.size(1);
  op.weight = operand("weight", weight, int64_t(op.T) * op.C, source);
  op.bias = operand("bias", bias, op.C, source);
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  const Tensor out = empty(source, {op.M, op.C});
  if (out.numel() == 0) return out;
  op.out = out.mutable_data_ptr();
  op.aligned = largest_unit(op.C * source.element_size(), op.source, op.weight, op.bias) == 16;
  launch(op, dtype_of(source), Device(source).stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor window_table(const Tensor& positions, Sizes input_size, Sizes output_size, Sizes kernel_size,
                    Sizes stride, Sizes dilation, Sizes padding) {
  WindowTable op;
  op.window =
      small_window(make_window(input_size, output_size, kernel_size, stride, dilation, padding));
  op.positions = indices("positions", positions, 1);
  check_entries(positions.numel() * op.window.taps());
  op.M = positions.numel();
  const Tensor table = empty_indices(positions, {op.M, op.window.taps()});
  if (op.M == 0) return table;
  op.table = static_cast<int*>(table.mutable_data_ptr());
  launch(op, Device(positions).stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return table;
}

struct Tables {
  Tensor positions, needed, table;
  Tensor sizes;  // [2]: how many positions are active, how many needed
};

Window<int> table_window(const Tensor& mask, Sizes input_size, Sizes kernel_size, Sizes stride,
                         Sizes dilation, Sizes padding) {
  STD_TORCH_CHECK(
      mask.dim() == 4 && mask.size(1) == 1 && mask.is_contiguous() &&
          (mask.scalar_type() == ScalarType::Bool || is_supported(mask)),
      "mask must be [B, 1, H, W], boolean, float32, float16 or bfloat16, and contiguous, "
      "got ",
      shape_text(mask));
  return small_window(make_window(input_size, {mask.size(2), mask.size(3)}, kernel_size, stride,
                                  dilation, padding));
}

Tables make_tables(const Tensor& mask, const Window<int>& w, int64_t active, int64_t needed,
                   bool all_listed, const Device& device) {
  const int64_t inputs = mask.size(0) * w.H * w.W, taps = w.taps();
  check_entries(std::max(mask.numel() * taps, inputs));
  NeighbourTable op;
  op.window = w, op.outputs = mask.numel(), op.inputs = inputs;
  op.active_capacity = active, op.needed_capacity = needed, op.all_listed = all_listed;
  const Tables tables{empty_indices(mask, {active}), empty_indices(mask, {needed}),
                      empty_indices(mask, {active, taps}), empty_indices(mask, {2})};
  const int64_t words = words_of(op.outputs) + words_of(inputs);
  const Tensor scratch = empty_indices(mask, {2 * words});
  op.before = static_cast<int*>(scratch.mutable_data_ptr());
  op.words = reinterpret_cast<unsigned*>(op.before + words);
  op.sizes = static_cast<int*>(tables.sizes.mutable_data_ptr());
  op.mask = mask.const_data_ptr(), op.mask_bytes = mask.element_size();
  op.positions = static_cast<int*>(tables.positions.mutable_data_ptr());
  op.needed = static_cast<int*>(tables.needed.mutable_data_ptr());
  op.table = static_cast<int*>(tables.table.mutable_data_ptr());
  launch(op, device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return tables;
}

// Without a capacity the tables have room for all positions and are cut to what there are: the host
// waits once, for the sizes.
std::tuple<Tensor, Tensor, Tensor, Tensor> neighbour_table(
    const Tensor& mask, Sizes input_size, Sizes kernel_size, Sizes stride, Sizes dilation,
    Sizes padding, const std::optional<std::vector<int64_t>>& capacity) {
  const Window<int> w = table_window(mask, input_size, kernel_size, stride, dilation, padding);
  const int64_t outputs = mask.numel(), inputs = mask.size(0) * w.H * w.W;
  if (capacity) check_capacity(*capacity, outputs, inputs);
  const int64_t active = capacity ? (*capacity)[0] : outputs;
  const int64_t needed = capacity ? (*capacity)[1] : inputs;
  const Device device(mask);
  const Tables tables = make_tables(mask, w, active, needed, capacity && needed == inputs, device);
  if (capacity) return {tables.positions, tables.needed, tables.table, tables.sizes};
  int sizes[2];
  STD_CUDA_CHECK(cudaMemcpyAsync(sizes, tables.sizes.const_data_ptr(), sizeof sizes,
                                 cudaMemcpyDeviceToHost, device.stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(device.stream));
  const auto cut = [](Tensor t, int64_t rows) { return torch::stable::narrow(t, 0, 0, rows); };
  return {cut(tables.positions, sizes[0]), cut(tables.needed, sizes[1]),
          cut(tables.table, sizes[0]), tables.sizes};
}

}  // namespace
}  // namespace timm_dynamic

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&timm_dynamic::gather_rows));
  m.impl("scatter_rows_", TORCH_BOX(&timm_dynamic::scatter_rows_));
  m.impl("gather_depthwise", TORCH_BOX(&timm_dynamic::gather_depthwise));
  m.impl("window_table", TORCH_BOX(&timm_dynamic::window_table));
  m.impl("neighbour_table", TORCH_BOX(&timm_dynamic::neighbour_table));
}
