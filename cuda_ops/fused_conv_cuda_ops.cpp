// The operators of timm_dynamic/ops/fused_conv.py on CUDA: checks and memory. Their kernels are in
// fused_conv_cuda.cu and fused_conv_cuda_grad.cu.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cuda_maps.h"
#include "fused_conv_cuda.h"
#include "sparse_args.h"

namespace timm_dynamic {
namespace {

constexpr int64_t kLongestSide = 1 << 14;

const void* aligned(const char* name, const void* data) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                  " must begin at a multiple of 16 bytes");
  return data;
}

// The elements of a map that has to be channels_last.
const void* map_data(const char* name, const Tensor& t) {
  const bool served =
      t.dim() == 4 && t.numel() > 0 && t.size(1) % 8 == 0 &&
      (t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16);
  STD_TORCH_CHECK(
      served && is_dense_channels_last(t), name,
      " must be [B, C, H, W] with C a multiple of 8, float16 or bfloat16, channels_last "
      "and not empty, got ",
      shape_text(t));
  return aligned(name, t.const_data_ptr());
}

// A float32 factor of the weights.
const float* factor(const char* name, const Tensor& t, std::vector<int64_t> sizes,
                    const Tensor& x) {
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  std::string text;
  for (size_t i = 0; i < sizes.size(); ++i) {
    fits = fits && t.size(i) == sizes[i];
    text += (i ? ", " : "[") + std::to_string(sizes[i]);
  }
  STD_TORCH_CHECK(fits, name, " must be ", text, "], got ", shape_text(t));
  return parameter(name, t, t.numel(), x);
}

// One that is loaded 16 bytes at a time.
const float* aligned_factor(const char* name, const Tensor& t, std::vector<int64_t> sizes,
                            const Tensor& x) {
  return static_cast<const float*>(aligned(name, factor(name, t, sizes, x)));
}

// For 32-bit indices, some beyond the last.
void check_count(int64_t count) {
  STD_TORCH_CHECK(count <= 1 << 30, "too many positions or weights for int32: ", count);
}

// From an input of `size` to an output of `output_size`.
Window<int> convolution(Sizes size, Sizes output_size, Sizes kernel_size, Sizes stride,
                        Sizes padding, Sizes dilation) {
  const Window<int64_t> w = make_window(size, output_size, kernel_size, stride, dilation, padding);
  for (const int64_t n :
       {w.H, w.W, w.Ho, w.Wo, w.Ky, w.Kx, w.stride_y, w.stride_x, w.dilation_y, w.dilation_x})
    STD_TORCH_CHECK(n >= 1 && n <= kLongestSide, "sizes must be in [1, ", kLongestSide, "], got ",
                    n);
  for (const int64_t n : {w.padding_y, w.padding_x})
    STD_TORCH_CHECK(n >= 0 && n <= kLongestSide, "padding must be in [0, ", kLongestSide, "], got ",
                    n);
  const auto outputs = [](int64_t n, int64_t kernel, int64_t stride, int64_t padding,
                          int64_t dilation) {
    return floor_div(n + 2 * padding - dilation * (kernel - 1) - 1, stride) + 1;
  };
  STD_TORCH_CHECK(w.Ho == outputs(w.H, w.Ky, w.stride_y, w.padding_y, w.dilation_y) &&
                      w.Wo == outputs(w.W, w.Kx, w.stride_x, w.padding_x, w.dilation_x),
                  "no convolution with these options takes ", w.H, "x", w.W, " to ", w.Ho, "x",
                  w.Wo);
  const auto small = [](int64_t n) { return static_cast<int>(n); };
  return {small(w.H),          small(w.W),          small(w.Ho),        small(w.Wo),
          small(w.Ky),         small(w.Kx),         small(w.stride_y),  small(w.stride_x),
          small(w.dilation_y), small(w.dilation_x), small(w.padding_y), small(w.padding_x)};
}

// The shared kernels, [N, taps, columns, channels], beside a map with those channels.
OwnWeights shared_kernels(const Tensor& kernels, const Window<int>& window, const Tensor& x) {
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(kernels.dim() == 4 && kernels.size(0) >= 1 && kernels.size(0) <= kMostKernels &&
                      kernels.size(2) > 0 && kernels.size(2) % 8 == 0,
                  "kernels must be [N, taps, columns, channels] with N in [1, ", kMostKernels,
                  "] and columns a multiple of 8, got ", shape_text(kernels));
  const int64_t N = kernels.size(0), columns = kernels.size(2);
  check_count(kernels.numel());
  check_count(x.size(0) * std::max(columns, window.taps() * channels));
  OwnWeights own = {};
  own.N = N, own.columns = columns, own.channels = channels;
  own.kernels = aligned_factor("kernels", kernels, {N, window.taps(), columns, channels}, x);
  return own;
}

OwnWeights mixed_weights(const Tensor& kernels, const Tensor& attention, const Window<int>& window,
                         const Tensor& x) {
  OwnWeights own = shared_kernels(kernels, window, x);
  own.attention = factor("attention", attention, {x.size(0), own.N}, x);
  return own;
}

OwnWeights gated_weights(const Tensor& kernel, const Tensor& pairs, const Tensor& gates,
                         const Window<int>& window, const Tensor& x) {
  OwnWeights own = shared_kernels(kernel, window, x);
  STD_TORCH_CHECK(own.N == 1, "one kernel is gated, got ", own.N);
  own.pairs = aligned_factor("pairs", pairs, {x.size(0), window.taps(), own.channels}, x);
  own.gates = factor("gates", gates, {x.size(0), own.columns}, x);
  return own;
}

Window<int> product_window(const Tensor& x, Sizes size, Sizes kernel_size, Sizes stride,
                           Sizes padding, Sizes dilation, bool transposed) {
  const std::vector<int64_t> own_size = {x.size(2), x.size(3)};
  return convolution(transposed ? size : own_size, transposed ? own_size : size, kernel_size,
                     stride, padding, dilation);
}

void check_positions(const Window<int>& w, const Tensor& x) {
  check_count(x.size(0) * std::max(w.H * w.W, w.Ho * w.Wo));
}

Tensor run_product(WindowProduct& op, const Tensor& x) {
  op.B = x.size(0);
  check_positions(op.window, x);
  const Tensor out = empty(x, {x.size(0), op.own.columns, op.height(), op.width()}, true);
  op.out = out.mutable_data_ptr();
  launch(op, dtype_of(x), Device(x).stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor fused_mixed_conv(const Tensor& x, const Tensor& attention, const Tensor& kernels, Sizes size,
                        Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation,
                        bool transposed) {
  WindowProduct op;
  op.source = map_data("x", x), op.transposed = transposed;
  op.window = product_window(x, size, kernel_size, stride, padding, dilation, transposed);
  op.own = mixed_weights(kernels, attention, op.window, x);
  return run_product(op, x);
}

Tensor fused_gated_conv(const Tensor& x, const Tensor& pairs, const Tensor& gates,
                        const Tensor& kernel, Sizes size, Sizes kernel_size, Sizes stride,
                        Sizes padding, Sizes dilation, bool transposed) {
  WindowProduct op;
  op.source = map_data("x", x), op.transposed = transposed;
  op.window = product_window(x, size, kernel_size, stride, padding, dilation, transposed);
  op.own = gated_weights(kernel, pairs, gates, op.window, x);
  return run_product(op, x);
}

Window<int> gradient_window(const Tensor& grad, const Tensor& x, Sizes kernel_size, Sizes stride,
                            Sizes padding, Sizes dilation) {
  return convolution({x.size(2), x.size(3)}, {grad.size(2), grad.size(3)}, kernel_size, stride,
                     padding, dilation);
}

// Room for the kernels' gradient, in as many parts as keep the device busy.
Tensor kernel_parts(WindowGradients& op, const Tensor& grad, const Tensor& x,
                    const Device& device) {
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(1) == op.own.columns &&
                      grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
                  "grad must be [", x.size(0), ", ", op.own.columns,
                  ", Ho, Wo], of the dtype and on the device of x, got ", shape_text(grad));
  check_positions(op.window, x);
  op.B = x.size(0);
  op.parts = std::clamp<int64_t>(2 * device.processors / op.tiles(), 1, std::min(op.B, 65535));
  const Tensor parts =
      empty_floats(x, {op.parts, op.own.N, op.window.taps(), op.own.columns, op.own.channels});
  op.kernels = floats(parts);
  return parts;
}

std::tuple<Tensor, Tensor> fused_mixed_conv_gradients(const Tensor& grad, const Tensor& x,
                                                      const Tensor& attention,
                                                      const Tensor& kernels, Sizes kernel_size,
                                                      Sizes stride, Sizes padding, Sizes dilation) {
  WindowGradients op;
  op.grad = map_data("grad", grad), op.source = map_data("x", x);
  op.window = gradient_window(grad, x, kernel_size, stride, padding, dilation);
  op.own = mixed_weights(kernels, attention, op.window, x);
  const Device device(x);
  const Tensor of_kernels = kernel_parts(op, grad, x, device);
  const Tensor of_attention = empty_floats(x, {op.tiles(), op.B, op.own.N});
  op.attention = floats(of_attention);
  launch(op, dtype_of(x), device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {summed(of_attention), summed(of_kernels)};
}

std::tuple<Tensor, Tensor, Tensor> fused_gated_conv_gradients(
    const Tensor& grad, const Tensor& x, const Tensor& pairs, const Tensor& gates,
    const Tensor& kernel, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation) {
  WindowGradients op;
  op.grad = map_data("grad", grad), op.source = map_data("x", x);
  op.window = gradient_window(grad, x, kernel_size, stride, padding, dilation);
  op.own = gated_weights(kernel, pairs, gates, op.window, x);
  const Device device(x);
  const Tensor of_kernel = kernel_parts(op, grad, x, device);
  const int64_t B = op.B, taps = op.window.taps();
  const Tensor of_pairs = empty_floats(x, {op.column_tiles(), B, taps, op.own.channels});
  const Tensor of_gates = empty_floats(x, {taps * op.channel_tiles(), B, op.own.columns});
  op.pairs = floats(of_pairs), op.gates = floats(of_gates);
  launch(op, dtype_of(x), device.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {summed(of_pairs), summed(of_gates), summed(of_kernel)};
}

}  // namespace
}  // namespace timm_dynamic

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CUDA, m) {
  m.impl("fused_mixed_conv", TORCH_BOX(&timm_dynamic::fused_mixed_conv));
  m.impl("fused_gated_conv", TORCH_BOX(&timm_dynamic::fused_gated_conv));
  m.impl("fused_mixed_conv_gradients", TORCH_BOX(&timm_dynamic::fused_mixed_conv_gradients));
  m.impl("fused_gated_conv_gradients", TORCH_BOX(&timm_dynamic::fused_gated_conv_gradients));
}
