// CPU kernels of timm_dynamic/ops/sparse: convolutions of listed positions, and a mask unit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "sparse/arguments.h"

namespace timm_dynamic {

constexpr int64_t kRowBlock = 240;      // rows of a unit, whose sums stay in the cache
constexpr int64_t kDepthwiseRows = 16;  // rows of a unit
constexpr int64_t kDots = 10;           // nine taps and the linear layer of a mask unit

// out[m] = clamp(bias + sum_t source[table[m, t]] . matrix[t]), or with positions
// out[positions[m]] = clamp(out[positions[m]] + bias + ...). Without a table it reads source[m].
struct GatherConv {
  int64_t M, T, C, N, width, blocks;
  float low, high;
  const float *source, *zeros, *matrix, *bias;
  const int32_t *table, *positions;
  float* out;
};

struct GatherDepthwise {
  int64_t M, T, C;
  float low, high;
  const float *source, *zeros, *weight, *bias;
  const int32_t* table;
  float* out;
};

// out = a sample's mean + the dot products of the window's taps.
struct MaskLogits {
  Window<int64_t> window;
  const float *dots, *means;
  float* out;
};

struct SparseKernels {
  void (*gather_conv)(const GatherConv&, int64_t begin, int64_t end);
  void (*gather_depthwise)(const GatherDepthwise&, int64_t begin, int64_t end);
  void (*mask_logits)(const MaskLogits&, int64_t begin, int64_t end);
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "sparse/kernels.h"
#include "common/dispatch.h"

namespace timm_dynamic {
namespace {

const float* rows(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous() && t.scalar_type() == ScalarType::Float, name,
                  " must be contiguous float32 of 2 dimensions, got ", shape_text(t));
  return static_cast<const float*>(t.const_data_ptr());
}

void run(GatherConv& op) {
  if (op.M == 0) return;
  const int64_t panels = (op.N + op.width - 1) / op.width;
  // Few panels: small blocks, to have units for some threads.
  op.blocks = std::max((op.M + kRowBlock - 1) / kRowBlock, std::min(8 / panels, op.M / 24));
  const SparseKernels kernels = CHOOSE_KERNELS(sparse_kernels());
  parallel(panels * op.blocks, op.M / op.blocks * op.T * op.C * op.width / 16,
           [&](int64_t begin, int64_t end) { kernels.gather_conv(op, begin, end); });
}

void run_gather_conv(GatherConv& op, const Tensor& source, const std::optional<Tensor>& table,
                     const Tensor& matrix, const Tensor& bias, double low, double high) {
  op.source = rows("source", source), op.C = source.size(1);
  op.table = table ? indices("table", *table, 2) : nullptr;
  op.T = table ? table->size(1) : 1, op.N = bias.numel();
  op.width = matrix.dim() == 3 ? matrix.size(2) : 0;
  STD_TORCH_CHECK(op.width > 0 && op.width <= 64 && op.width % 16 == 0 &&
                      matrix.size(1) == op.T * op.C &&
                      matrix.size(0) == (op.N + op.width - 1) / op.width,
                  "matrix must be [panels, ", op.T * op.C, ", width] with 16, 32, 48 or 64, got ",
                  shape_text(matrix));
  op.matrix = parameter("matrix", matrix, matrix.numel(), source);
  op.bias = parameter("bias", bias, op.N, source);
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  const std::vector<float> zeros(op.C);
  op.zeros = zeros.data();
  run(op);
}

Tensor gather_conv(const Tensor& source, const std::optional<Tensor>& table, const Tensor& matrix,
                   const Tensor& bias, double low, double high) {
  GatherConv op{};
  op.M = table ? table->size(0) : source.size(0);
  const Tensor out = empty(source, {op.M, bias.numel()});
  op.out = static_cast<float*>(out.mutable_data_ptr());
  run_gather_conv(op, source, table, matrix, bias, low, high);
  return out;
}

void scatter_conv_(Tensor& out, const Tensor& positions, const Tensor& source,
                   const std::optional<Tensor>& table, const Tensor& matrix, const Tensor& bias,
                   double low, double high) {
  GatherConv op{};
  op.M = positions.numel();
  op.positions = indices("positions", positions, 1);
  rows("out", out);
  op.out = static_cast<float*>(out.mutable_data_ptr());
  STD_TORCH_CHECK(out.size(1) == bias.numel(), "out must be [P, ", bias.numel(), "], got ",
                  shape_text(out));
  STD_TORCH_CHECK((table ? table->size(0) : source.size(0)) == op.M, "positions must be ",
                  table ? table->size(0) : source.size(0), " numbers, got ", op.M);
  run_gather_conv(op, source, table, matrix, bias, low, high);
}

Tensor gather_depthwise(const Tensor& source, const Tensor& table, const Tensor& weight,
                        const Tensor& bias, double low, double high) {
  GatherDepthwise op;
  op.source = rows("source", source), op.C = source.size(1);
  op.table = indices("table", table, 2), op.M = table.size(0), op.T = table.size(1);
  op.weight = parameter("weight", weight, op.T * op.C, source);
  op.bias = parameter("bias", bias, op.C, source);
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  const std::vector<float> zeros(op.C);
  op.zeros = zeros.data();
  const Tensor out = empty(source, {op.M, op.C});
  op.out = static_cast<float*>(out.mutable_data_ptr());
  const SparseKernels kernels = CHOOSE_KERNELS(sparse_kernels());
  parallel((op.M + kDepthwiseRows - 1) / kDepthwiseRows, kDepthwiseRows * op.T * op.C / 8,
           [&](int64_t begin, int64_t end) { kernels.gather_depthwise(op, begin, end); });
  return out;
}

// The products of every position with the ten weight vectors first, then their sums.
Tensor mask_logits(const Tensor& x, const Tensor& conv_weight, const Tensor& conv_bias,
                   const Tensor& fc_weight, const Tensor& fc_bias, int64_t stride) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && x.scalar_type() == ScalarType::Float &&
                      is_dense_channels_last(x),
                  "x must be [B, C, H, W], float32, channels_last and not empty, got ",
                  shape_text(x));
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  STD_TORCH_CHECK(conv_weight.dim() == 4 && conv_weight.size(0) == 1 && conv_weight.size(1) == C &&
                      conv_weight.size(2) == 3 && conv_weight.size(3) == 3 &&
                      conv_weight.scalar_type() == ScalarType::Float,
                  "conv_weight must be [1, ", C, ", 3, 3] in float32, got ",
                  shape_text(conv_weight));
  const float* const taps = static_cast<const float*>(conv_weight.const_data_ptr());
  const float* const fc = parameter("fc_weight", fc_weight, C, x);
  constexpr int64_t width = 16;
  std::vector<float> matrix(C * width);
  // In any memory format.
  const int64_t strides[] = {conv_weight.stride(1), conv_weight.stride(2), conv_weight.stride(3)};
  for (int64_t c = 0; c < C; ++c) {
    float* const row = matrix.data() + c * width;
    const float* const from = taps + c * strides[0];
    for (int64_t ky = 0; ky < 3; ++ky)
      for (int64_t kx = 0; kx < 3; ++kx) row[3 * ky + kx] = from[ky * strides[1] + kx * strides[2]];
    row[9] = fc[c];
  }
  const float zeros[kDots] = {};
  const Tensor dots = empty(x, {B * H * W, kDots});
  GatherConv products{};
  products.M = B * H * W, products.T = 1, products.C = C, products.N = kDots;
  products.width = width, products.low = -INFINITY, products.high = INFINITY;
  products.source = static_cast<const float*>(x.const_data_ptr());
  products.matrix = matrix.data(), products.bias = zeros;
  products.out = static_cast<float*>(dots.mutable_data_ptr());
  run(products);

  MaskLogits op;
  op.window = {H, W, (H - 1) / stride + 1, (W - 1) / stride + 1, 3, 3, stride, stride, 1, 1, 1, 1};
  op.dots = products.out;
  std::vector<float> means(B);  // of the linear layer, with the biases
  const float bias =
      *parameter("conv_bias", conv_bias, 1, x) + *parameter("fc_bias", fc_bias, 1, x);
  for (int64_t b = 0; b < B; ++b) {
    float sum = 0;
    for (int64_t i = 0; i < H * W; ++i) sum += op.dots[(b * H * W + i) * kDots + 9];
    means[b] = sum / (H * W) + bias;
  }
  op.means = means.data();
  const Tensor out = empty(x, {B, 1, op.window.Ho, op.window.Wo});
  op.out = static_cast<float*>(out.mutable_data_ptr());
  const SparseKernels kernels = CHOOSE_KERNELS(sparse_kernels());
  parallel(B * op.window.Ho, op.window.Wo * kDots * 4,
           [&](int64_t begin, int64_t end) { kernels.mask_logits(op, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CPU, m) {
  m.impl("gather_conv", TORCH_BOX(&gather_conv));
  m.impl("scatter_conv_", TORCH_BOX(&scatter_conv_));
  m.impl("gather_depthwise", TORCH_BOX(&gather_depthwise));
  m.impl("mask_logits", TORCH_BOX(&mask_logits));
}

}  // namespace timm_dynamic
