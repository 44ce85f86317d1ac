// timm_dynamic::scaled_sum and ::sum_and_project on CUDA, and their gradients: checks, memory, and
// how to cut the work. Their kernels are in scaled_sum_cuda.cu.
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

// `t` has to be beside a map, of its dtype or float32, and [rows, columns, ...] of `count`
// elements.
void check_beside(const char* name, const Tensor& t, const Tensor& map, int64_t rows,
                  int64_t columns, int64_t count) {
  STD_TORCH_CHECK(t.dim() > 1 && t.size(0) == rows && t.size(1) == columns && t.numel() == count,
                  name, " must have shape [", rows, ", ", columns, ", ...] for maps ",
                  shape_text(map), ", got ", shape_text(t));
  STD_TORCH_CHECK(t.device() == map.device() && (t.scalar_type() == ScalarType::Float ||
                                                 t.scalar_type() == map.scalar_type()),
                  name, " must be beside the maps, and float32 or of their dtype");
}

ScaledSumShape shape_for(const Tensor& map, int64_t L, bool wide) {
  const int64_t B = map.size(0), O = map.size(1), positions = map.size(2) * map.size(3);
  for (const int64_t size : {B, O, L, positions})
    STD_TORCH_CHECK(size < kMaxSize, "size ", size, " is not below ", kMaxSize);
  return {int(B), int(O), int(L), int(positions), is_channels_last(map), false, wide, int(L), 1};
}

ScaledSumShape check(const Tensor& y, const Tensor& scale, const Tensor& p, const Tensor& v) {
  check_map("y", y);
  const int64_t B = y.size(0), O = y.size(1), positions = y.size(2) * y.size(3);
  STD_TORCH_CHECK(p.dim() > 1 && p.numel() > 0, "p must be [O, L, ...], got ", shape_text(p));
  const int64_t L = p.size(1);
  check_beside("scale", scale, y, B, O, B * O);
  check_beside("p", p, y, O, L, O * L);
  check_beside("v", v, y, B, L, B * L * positions);
  STD_TORCH_CHECK(scale.scalar_type() == p.scalar_type() && scale.scalar_type() == v.scalar_type(),
                  "scale, p and v must be of one dtype");
  return shape_for(y, L, scale.scalar_type() == ScalarType::Float);
}

// Of the rows of the kernels' matrices.
int64_t row_length(const ScaledSumShape& s) { return s.channels_last ? s.O : s.positions; }

// Fills what `op` lacks and runs it: scale * y, or scale where `y` is null, + P v.
Tensor run(ScaledSum op, const Tensor* y, const Tensor& like, const Tensor& scale_in,
           const Tensor& p_in, const Tensor& v_in) {
  const Tensor out = empty_gradient(like, true, op.s.channels_last);
  if (out.numel() == 0) return out;
  const Tensor own = y ? dense(*y, op.s.channels_last) : out,
               scale = torch::stable::contiguous(scale_in), p = torch::stable::contiguous(p_in);
  const bool v_channels_last = v_in.dim() == 4 && is_channels_last(v_in);
  const Tensor v = dense(v_in, v_channels_last);
  op.v_sample = int64_t(op.s.L) * op.s.positions;
  op.v_channel = v_channels_last ? 1 : op.s.positions;
  op.v_position = v_channels_last ? op.s.L : 1;
  op.y = y ? own.const_data_ptr() : nullptr, op.scale = scale.const_data_ptr();
  op.p = p.const_data_ptr(), op.v = v.const_data_ptr(), op.out = out.mutable_data_ptr();
  op.s.vectorize = can_vectorize(out, row_length(op.s), op.y, op.out);
  check_blocks(blocks_of(op));
  launch(op, dtype_of(out), Device(out).stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor scaled_sum(const Tensor& y, const Tensor& scale, const Tensor& p, const Tensor& v) {
  return run({check(y, scale, p, v)}, &y, y, scale, p, v);
}

Tensor zeros(const Tensor& like) {
  Tensor t = empty(like, shape_of(like));
  return torch::stable::zero_(t);
}

// The sum of parts, of the shape and dtype of `like`.
Tensor total(const Tensor& parts, const Tensor& like) {
  return torch::stable::to(torch::stable::reshape(summed(parts), shape_of(like)),
                           like.scalar_type());
}

// Into how many parts to cut the channels: several rounds of blocks, but long walks.
int parts(const ScaledSumBackward& op, int processors) {
  const int64_t walk = ceil_div(op.s.O, kTileChannels);
  int n = 1;
  while (op.blocks() * n < 8 * processors && walk >= 8 * n) n *= 2;
  return n;
}

// Fills what `op` lacks and runs it; returns the partial sums.
std::pair<Tensor, Tensor> run(ScaledSumBackward op, const Tensor& grad, const Tensor& p_in) {
  const Device device(grad);
  const Tensor p = torch::stable::contiguous(p_in);
  op.p = p.const_data_ptr();
  op.parts = 1;
  op.parts = parts(op, device.processors);
  check_blocks(op.blocks());
  const Tensor scale_sums = empty_floats(grad, {op.tiles(), op.s.B, op.s.O}),
               v_sums = empty_floats(grad, {op.parts, op.s.B, op.s.L, op.s.positions});
  op.scale_sums = floats(scale_sums), op.v_sums = floats(v_sums);
  op.s.vectorize = can_vectorize(grad, row_length(op.s), op.grad, op.y, op.dy);
  launch(op, dtype_of(grad), device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {scale_sums, v_sums};
}

// Q is [L, C]: the transpose of P.
ScaledSumShape check_projection(const Tensor& x, const Tensor& q) {
  check_map("x", x);
  STD_TORCH_CHECK(q.dim() > 1 && q.numel() > 0, "q must be [L, C, ...], got ", shape_text(q));
  check_beside("q", q, x, q.size(0), x.size(1), q.size(0) * x.size(1));
  ScaledSumShape s = shape_for(x, q.size(0), q.scalar_type() == ScalarType::Float);
  s.p_channel = 1, s.p_latent = s.O;
  return s;
}

std::tuple<Tensor, Tensor, Tensor> scaled_sum_backward(const Tensor& grad_in, const Tensor& y_in,
                                                       const Tensor& scale_in, const Tensor& p_in,
                                                       const Tensor& v) {
  ScaledSumBackward op{};
  op.s = check(y_in, scale_in, p_in, v);
  check_tensor("grad", grad_in, {y_in.size(0), y_in.size(1), y_in.size(2), y_in.size(3)},
               {true, true, true, true}, y_in);
  const Tensor dy = empty_gradient(y_in, true, op.s.channels_last);
  if (y_in.numel() == 0) return {dy, zeros(scale_in), zeros(v)};
  const Tensor grad = dense(grad_in, op.s.channels_last), y = dense(y_in, op.s.channels_last),
               scale = torch::stable::contiguous(scale_in);
  op.grad = grad.const_data_ptr(), op.y = y.const_data_ptr(), op.scale = scale.const_data_ptr();
  op.dy = dy.mutable_data_ptr();
  const auto [scale_sums, v_sums] = run(op, grad, p_in);
  return {dy, total(scale_sums, scale_in), total(v_sums, v)};
}

// The sums over positions, [B, C], and Q x, [B, L, H, W].
std::tuple<Tensor, Tensor> sum_and_project(const Tensor& x_in, const Tensor& q) {
  ScaledSumBackward op{};
  op.s = check_projection(x_in, q);
  const Tensor sums = empty_floats(x_in, {op.s.B, op.s.O}),
               z = empty(q, {op.s.B, op.s.L, x_in.size(2), x_in.size(3)});
  if (x_in.numel() == 0) return {zeros(sums), z};
  const Tensor x = dense(x_in, op.s.channels_last);
  op.grad = x.const_data_ptr();
  const auto [own_sums, z_sums] = run(op, x, q);
  return {total(own_sums, sums), total(z_sums, z)};
}

// The gradient of x.
Tensor sum_and_project_backward(const Tensor& dsums, const Tensor& dz, const Tensor& x,
                                const Tensor& q) {
  ScaledSum op;
  op.s = check_projection(x, q);
  check_beside("dsums", dsums, x, op.s.B, op.s.O, int64_t(op.s.B) * op.s.O);
  check_beside("dz", dz, x, op.s.B, op.s.L, int64_t(op.s.B) * op.s.L * op.s.positions);
  STD_TORCH_CHECK(dz.scalar_type() == q.scalar_type(), "dz must be of the dtype of q");
  const Tensor scale = torch::stable::to(dsums, q.scalar_type());
  return run(op, nullptr, x, scale, q, dz);
}

}  // namespace
}  // namespace timm_dynamic

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CUDA, m) {
  m.impl("scaled_sum", TORCH_BOX(&timm_dynamic::scaled_sum));
  m.impl("scaled_sum_backward", TORCH_BOX(&timm_dynamic::scaled_sum_backward));
  m.impl("sum_and_project", TORCH_BOX(&timm_dynamic::sum_and_project));
  m.impl("sum_and_project_backward", TORCH_BOX(&timm_dynamic::sum_and_project_backward));
}
