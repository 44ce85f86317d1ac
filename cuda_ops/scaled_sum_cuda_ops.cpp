// timm_dynamic::scaled_sum and ::scaled_sum_backward on CUDA: checks, memory, and how to cut the
// work. Their kernels are in scaled_sum_cuda.cu.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_maps.h"
#include "scaled_sum_cuda.h"

namespace timm_dynamic {
namespace {

constexpr int64_t kMaxSize = 1 << 24;  // of dimensions: offsets within a tile fit 32 bits

void check_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "scaled_sum: tensors too large, ", blocks, " thread blocks");
}

// The rest of `s` follows from the shapes, which are checked.
ScaledSumShape check(const Tensor& y, const Tensor& scale, const Tensor& p, const Tensor& v) {
  const ScalarType dtype = y.scalar_type(), other = scale.scalar_type();
  check_map("y", y);
  const int64_t B = y.size(0), O = y.size(1), positions = y.size(2) * y.size(3);
  STD_TORCH_CHECK(p.dim() > 1 && p.numel() > 0, "p must be [O, L, ...], got ", shape_text(p));
  const int64_t L = p.size(1);
  const auto fits = [&](const char* name, const Tensor& t, int64_t rows, int64_t columns,
                        int64_t count) {
    STD_TORCH_CHECK(t.dim() > 1 && t.size(0) == rows && t.size(1) == columns && t.numel() == count,
                    name, " must have shape [", rows, ", ", columns, ", ...] for y ", shape_text(y),
                    ", got ", shape_text(t));
    STD_TORCH_CHECK(t.device() == y.device() && t.scalar_type() == other &&
                        (other == ScalarType::Float || other == dtype),
                    name, " must be beside y, and with the others float32 or of the dtype of y");
  };
  fits("scale", scale, B, O, B * O);
  fits("p", p, O, L, O * L);
  fits("v", v, B, L, B * L * positions);
  for (const int64_t size : {B, O, L, positions})
    STD_TORCH_CHECK(size < kMaxSize, "scaled_sum: size ", size, " is not below ", kMaxSize);
  return {int(B),
          int(O),
          int(L),
          int(positions),
          is_channels_last(y),
          false,
          other == ScalarType::Float};
}

// Of the rows of the kernels' matrices.
int64_t row_length(const ScaledSumShape& s) { return s.channels_last ? s.O : s.positions; }

Tensor scaled_sum(const Tensor& y_in, const Tensor& scale_in, const Tensor& p_in,
                  const Tensor& v_in) {
  ScaledSum op;
  op.s = check(y_in, scale_in, p_in, v_in);
  const Tensor out = empty_gradient(y_in, true, op.s.channels_last);
  if (out.numel() == 0) return out;
  const Tensor y = dense(y_in, op.s.channels_last), scale = torch::stable::contiguous(scale_in),
               p = torch::stable::contiguous(p_in),
               v = v_in.dim() == 4 && is_channels_last(v_in) ? dense(v_in, true)
                                                             : torch::stable::contiguous(v_in);
  const bool v_channels_last = v.dim() == 4 && is_channels_last(v);
  op.v_sample = op.s.L * int64_t(op.s.positions);
  op.v_channel = v_channels_last ? 1 : op.s.positions;
  op.v_position = v_channels_last ? op.s.L : 1;
  op.y = y.const_data_ptr(), op.scale = scale.const_data_ptr(), op.p = p.const_data_ptr();
  op.v = v.const_data_ptr(), op.out = out.mutable_data_ptr();
  op.s.vectorize = can_vectorize(y, row_length(op.s), op.y, op.out);
  check_blocks(blocks_of(op));
  launch(op, dtype_of(y), Device(y).stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor zeros(const Tensor& like) {
  Tensor t = empty(like, shape_of(like));
  return torch::stable::zero_(t);
}

// Adds up partial sums over their first dimension.
Tensor total(const Tensor& sums, const Tensor& like) {
  const std::vector<int64_t> first = {0};
  const Tensor sum = sums.size(0) == 1 ? sums : torch::stable::sum(sums, first);
  return torch::stable::to(torch::stable::reshape(sum, shape_of(like)), like.scalar_type());
}

// Into how many parts to cut the channels: several rounds of blocks, but long walks.
int parts(const ScaledSumBackward& op, int processors) {
  const int64_t walk = ceil_div(op.s.O, kTileChannels);
  int n = 1;
  while (op.blocks() * n < 8 * processors && walk >= 8 * n) n *= 2;
  return n;
}

std::tuple<Tensor, Tensor, Tensor> scaled_sum_backward(const Tensor& grad_in, const Tensor& y_in,
                                                       const Tensor& scale_in, const Tensor& p_in,
                                                       const Tensor& v) {
  ScaledSumBackward op;
  op.s = check(y_in, scale_in, p_in, v);
  check_tensor("grad", grad_in, {y_in.size(0), y_in.size(1), y_in.size(2), y_in.size(3)},
               {true, true, true, true}, y_in);
  const Tensor dy = empty_gradient(y_in, true, op.s.channels_last);
  if (y_in.numel() == 0) return {dy, zeros(scale_in), zeros(v)};
  const Device device(y_in);
  const Tensor grad = dense(grad_in, op.s.channels_last), y = dense(y_in, op.s.channels_last),
               scale = torch::stable::contiguous(scale_in), p = torch::stable::contiguous(p_in);
  op.parts = 1;
  op.parts = parts(op, device.processors);
  check_blocks(op.blocks());
  const Tensor scale_sums = empty_floats(y, {op.tiles(), op.s.B, op.s.O}),
               v_sums = empty_floats(y, {op.parts, op.s.B, op.s.L, op.s.positions});
  op.grad = grad.const_data_ptr(), op.y = y.const_data_ptr(), op.scale = scale.const_data_ptr();
  op.p = p.const_data_ptr(), op.dy = dy.mutable_data_ptr();
  op.scale_sums = floats(scale_sums);
  op.v_sums = floats(v_sums);
  op.s.vectorize = can_vectorize(y, row_length(op.s), op.grad, op.y, op.dy);
  launch(op, dtype_of(y), device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {dy, total(scale_sums, scale_in), total(v_sums, v)};
}

}  // namespace
}  // namespace timm_dynamic

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CUDA, m) {
  m.impl("scaled_sum", TORCH_BOX(&timm_dynamic::scaled_sum));
  m.impl("scaled_sum_backward", TORCH_BOX(&timm_dynamic::scaled_sum_backward));
}
