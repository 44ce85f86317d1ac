// timm_dynamic::affine_, kernel_attention, factored_gates and dcd_factors on CUDA: checks and
// memory. Their kernels are in inference_cuda.cu.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cuda_maps.h"
#include "inference_cuda.h"

namespace timm_dynamic {
namespace {

// The elements of a parameter that has to have `count` of them, and all else as `like`.
const void* operand(const char* name, const Tensor& t, int64_t count, const Tensor& like) {
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous() &&
                      t.scalar_type() == like.scalar_type() && t.device() == like.device(),
                  name, " must be ", count,
                  " contiguous elements of the same dtype and device, got ", shape_text(t));
  return t.const_data_ptr();
}

int vector_of(const Tensor& map, bool channels_last, const void* at) {
  const int64_t length = channels_last ? map.size(1) : map.size(2) * map.size(3);
  return can_vectorize(map, length, at) ? 16 / map.element_size() : 1;
}

void affine_(Tensor y, const Tensor& scale, const Tensor& shift, double low, double high) {
  check_map("y", y);
  STD_TORCH_CHECK(y.is_contiguous() || is_dense_channels_last(y),
                  "y must be contiguous, or so as channels_last");
  STD_TORCH_CHECK(scale.device() == y.device() && (scale.scalar_type() == ScalarType::Float ||
                                                   scale.scalar_type() == y.scalar_type()),
                  "scale must be float32 or of the dtype of y, and beside it");
  AffineMap op;
  op.size = y.numel(), op.C = y.size(1);
  STD_TORCH_CHECK(op.size <= int64_t(INT32_MAX) * 256, "y is too large: ", op.size, " elements");
  op.positions = y.size(2) * y.size(3);
  op.channels_last = !y.is_contiguous(), op.narrow = scale.scalar_type() != ScalarType::Float;
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  op.scale = operand("scale", scale, op.C, scale), op.shift = operand("shift", shift, op.C, scale);
  if (op.size == 0) return;
  op.y = y.mutable_data_ptr(), op.vector = vector_of(y, op.channels_last, op.y);
  launch(op, dtype_of(y), Device(y).stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// What the layers of an operator share: the pooled input, their dtype, and where they run.
class Layers {
 public:
  Layers(const Tensor& x, const Tensor& like) : x_(checked(x, like)), device_(x_) {
    const bool channels_last = is_channels_last(x_);
    Pool op;
    op.B = x_.size(0), op.C = x_.size(1), op.positions = x_.size(2) * x_.size(3);
    op.channels_last = channels_last, op.x = x_.const_data_ptr();
    op.vector = vector_of(x_, channels_last, op.x);
    const int64_t wanted = ceil_div(2 * device_.processors, op.blocks());
    op.parts = channels_last ? std::clamp<int64_t>(op.positions / 64, 1, wanted) : 1;
    pooled_ = empty_floats(x_, {op.parts, op.B, op.C});
    op.sums = floats(pooled_);
    launch(op, dtype_of(x_), device_.stream);
    factor_ = 1.0f / op.positions;
  }

  int64_t samples() const { return x_.size(0); }
  int64_t channels() const { return x_.size(1); }
  cudaStream_t stream() const { return device_.stream; }

  // Layers of the pooled input, [B, channels()].
  void run_pooled(std::initializer_list<Head> heads, const Tensor& like) const {
    run({int(samples()), int(channels()), int(pooled_.size(0)), 0, factor_}, pooled_, heads, like);
  }
  // Of a hidden vector.
  void run_hidden(const Tensor& in, std::initializer_list<Head> heads, const Tensor& like,
                  bool narrow_out = false) const {
    run({int(samples()), int(in.size(1)), 1, 0, 1.0f, narrow_out}, in, heads, like);
  }

 private:
  static Tensor checked(const Tensor& x, const Tensor& like) {
    check_map("x", x);
    STD_TORCH_CHECK(x.numel() > 0 && x.numel() <= INT32_MAX, "x must not be empty, nor have more ",
                    "than 2^31 elements, got ", shape_text(x));
    STD_TORCH_CHECK(
        like.scalar_type() == ScalarType::Float || like.scalar_type() == x.scalar_type(),
        "parameters must be float32 or of the dtype of x");
    STD_TORCH_CHECK(like.device() == x.device(), "parameters must be beside x");
    return dense(x, is_channels_last(x));
  }

  void run(Heads op, const Tensor& in, std::initializer_list<Head> heads,
           const Tensor& like) const {
    op.in = floats(in);
    for (const Head& head : heads) op.heads[op.count++] = head;
    STD_TORCH_CHECK(op.B * ceil_div(op.outputs(), 32) <= INT32_MAX, "too many samples: ", op.B);
    launch(op, dtype_of(like), device_.stream);
  }

  Tensor x_, pooled_;
  Device device_;
  float factor_;
};

Tensor kernel_attention(const Tensor& x, const Tensor& hidden_weight, const Tensor& hidden_bias,
                        const Tensor& score_weight, const Tensor& score_bias, double temperature) {
  const Layers layers(x, hidden_weight);
  const int64_t B = layers.samples(), size = hidden_bias.numel(), N = score_bias.numel();
  const Tensor hidden = empty_floats(x, {B, size}), out = empty_floats(x, {B, N});
  layers.run_pooled(
      {{int(size), Activation::kRelu,
        operand("hidden_weight", hidden_weight, size * layers.channels(), hidden_weight),
        operand("hidden_bias", hidden_bias, size, hidden_weight), floats(hidden)}},
      hidden_weight);
  KernelScores op{int(B), int(size), int(N), static_cast<float>(temperature), floats(hidden)};
  op.weight = operand("score_weight", score_weight, N * size, hidden_weight);
  op.bias = operand("score_bias", score_bias, N, hidden_weight);
  op.out = floats(out);
  launch(op, dtype_of(hidden_weight), layers.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> factored_gates(const Tensor& x, const Tensor& hidden_weight,
                                                  const Tensor& hidden_bias, const Tensor& weight1,
                                                  const Tensor& bias1, const Tensor& weight2,
                                                  const Tensor& bias2, const Tensor& weight3,
                                                  const Tensor& bias3) {
  const Layers layers(x, hidden_weight);
  const int64_t B = layers.samples(), size = hidden_bias.numel();
  const Tensor hidden = empty_floats(x, {B, size});
  layers.run_pooled(
      {{int(size), Activation::kRelu,
        operand("hidden_weight", hidden_weight, size * layers.channels(), hidden_weight),
        operand("hidden_bias", hidden_bias, size, hidden_weight), floats(hidden)}},
      hidden_weight);
  const auto head = [&](const Tensor& weight, const Tensor& bias, const Tensor& out) {
    return Head{int(bias.numel()), Activation::kSigmoid,
                operand("weight", weight, bias.numel() * size, hidden_weight),
                operand("bias", bias, bias.numel(), hidden_weight), floats(out)};
  };
  const Tensor out1 = empty_floats(x, {B, bias1.numel()}),
               out2 = empty_floats(x, {B, bias2.numel()}),
               out3 = empty_floats(x, {B, bias3.numel()});
  layers.run_hidden(
      hidden, {head(weight1, bias1, out1), head(weight2, bias2, out2), head(weight3, bias3, out3)},
      hidden_weight);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out1, out2, out3};
}

std::tuple<Tensor, Tensor> dcd_factors(const Tensor& x, const std::vector<Tensor>& fc) {
  STD_TORCH_CHECK(fc.size() == 4, "fc must be 4 weights, got ", fc.size());
  for (const Tensor& t : fc)
    STD_TORCH_CHECK(t.dim() == 2, "fc must be matrices, got ", shape_text(t));
  const Layers layers(x, fc[0]);
  const int64_t B = layers.samples(), size = fc[0].size(0), outputs = fc[3].size(0);
  int64_t L = 1;
  while (L * L < fc[2].size(0)) ++L;
  const Tensor a = empty_floats(x, {B, size}), z = empty_floats(x, {B, size}),
               phi = empty(fc[0], {B, L, L}), scale = empty(fc[0], {B, outputs});
  const auto head = [&](int i, int64_t rows, int64_t columns, Activation activation, void* out) {
    return Head{int(rows), activation, operand("fc", fc[i], rows * columns, fc[0]), nullptr, out};
  };
  layers.run_pooled({head(0, size, layers.channels(), Activation::kNone, floats(a))}, fc[0]);
  layers.run_hidden(a, {head(1, size, size, Activation::kGate, floats(z))}, fc[0]);
  layers.run_hidden(
      z,
      {head(2, L * L, size, Activation::kNone, phi.mutable_data_ptr()),
       head(3, outputs, size, Activation::kTwiceHardSigmoid, scale.mutable_data_ptr())},
      fc[0], fc[0].scalar_type() != ScalarType::Float);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {phi, scale};
}

}  // namespace
}  // namespace timm_dynamic

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CUDA, m) {
  m.impl("affine_", TORCH_BOX(&timm_dynamic::affine_));
  m.impl("kernel_attention", TORCH_BOX(&timm_dynamic::kernel_attention));
  m.impl("factored_gates", TORCH_BOX(&timm_dynamic::factored_gates));
  m.impl("dcd_factors", TORCH_BOX(&timm_dynamic::dcd_factors));
}
