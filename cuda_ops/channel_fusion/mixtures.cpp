// Convolutions of every sample with a mixture of kernels, on the CPU.
//
// No sample's weight is there as a whole: a block of it is mixed and gated in the cache and meets
// the columns there, what the block's elements read at every output position; or in channels_last,
// where those lie in memory, the pixels themselves, 3x3 kernels and pixels both transformed. A
// block of the kernels is read once for some samples, or once for some rows of a large map.

#include "channel_fusion/mixtures.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/arguments.h"
#include "common/parallel.h"

namespace timm_dynamic {

constexpr int64_t kPanel = 16;  // outputs of a block

struct MixtureKernels {
  void (*mixtures)(const Mixtures&, int64_t begin, int64_t end);
  void (*pixel_mixtures)(const Mixtures&, int64_t begin, int64_t end);
  void (*depthwise_mixtures)(const Mixtures&, int64_t begin, int64_t end);
  int64_t lanes;
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "channel_fusion/depthwise_mixtures.h"
#include "common/dispatch.h"

namespace timm_dynamic {

// Positions of a unit, and elements of its columns: these, 2 MB, are read again for every block of
// outputs. A third of the depth costs 1.1 of the time; other numbers of positions or outputs save
// none (512 channels at 7x7, 256 at 14x14, one thread of an AMD EPYC with AVX2, November 2026).
constexpr int64_t kPositions = 784, kColumns = 1 << 19;

// 0.55 to 0.75 of the time of the sum over all taps; with 8 inputs, or at 2x2 positions, more (64
// to 512 channels at 56x56 to 7x7, two threads of an AMD EPYC with AVX2, November 2026).
static bool has_minimal_filtering(const Mixtures& op) {
  return !op.depthwise && op.Kh == 3 && op.Kw == 3 && op.stride_y == 1 && op.stride_x == 1 &&
         op.dilation_y == 1 && op.dilation_x == 1 && op.C >= 16 && op.positions() >= 9;
}

void run_mixtures(Mixtures op) {
  const MixtureKernels kernels = CHOOSE_KERNELS(mixture_kernels());
  const auto ceil_of = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  op.samples = op.depthwise ? 1 : std::clamp<int64_t>(kPositions / op.positions(), 1, op.B);
  op.rows = std::clamp<int64_t>(kPositions / op.Wo, 1, op.Ho);
  op.winograd = op.channels_last && has_minimal_filtering(op);
  if (op.winograd) op.rows = std::min((op.rows + 1) / 2 * 2, op.Ho);
  op.row_blocks = ceil_of(op.Ho, op.rows);
  const int64_t depth = kColumns / (op.samples * op.rows * op.Wo);
  const int64_t blocks = ceil_of(op.whole_depth(), std::clamp<int64_t>(depth, 576, 1152));
  op.depth = ceil_of(ceil_of(op.whole_depth(), blocks), kernels.lanes) * kernels.lanes;
  // Few units: the outputs are divided too, so that threads have equal shares.
  const int64_t units = ceil_of(op.B, op.samples) * op.row_blocks;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = units >= 4 * threads ? 1 : threads / std::gcd(units, threads);
  op.parts = std::min(parts, ceil_of(op.O, kPanel));
  const auto run = op.depthwise       ? kernels.depthwise_mixtures
                   : op.channels_last ? kernels.pixel_mixtures
                                      : kernels.mixtures;
  const int64_t work = op.samples * op.rows * op.Wo * op.O * op.whole_depth() / op.parts;
  parallel(units * op.parts, work / 8, [&](int64_t begin, int64_t end) { run(op, begin, end); });
}

Tensor mixed_convolution(const Tensor& x, const Tensor& kernels,
                         const std::optional<Tensor>& attention, const std::optional<Tensor>& pairs,
                         const std::optional<Tensor>& a_out, const std::optional<Tensor>& shift,
                         double low, double high, const Pair& stride, const Pair& padding,
                         const Pair& dilation) {
  Mixtures op = {};
  op.B = x.size(0), op.C = x.size(1), op.H = x.size(2), op.W = x.size(3);
  op.N = kernels.size(0);
  const bool cells = kernels.dim() == 3;
  if (cells) {
    STD_TORCH_CHECK(attention->dim() == 6 && attention->size(4) * kernels.size(2) == op.C,
                    "of cells ", shape_text(kernels), " the attention must be [", op.B,
                    ", Kh, Kw, outputs, inputs, ", op.N, "] with ", op.C,
                    " channels in the inputs' cells, got ", shape_text(*attention));
    op.cell_outputs = kernels.size(1), op.cell_inputs = kernels.size(2);
    op.O = attention->size(3) * op.cell_outputs;
    op.Kh = attention->size(1), op.Kw = attention->size(2);
  } else {
    op.O = kernels.size(1), op.Kh = kernels.size(3), op.Kw = kernels.size(4);
    op.depthwise = op.O == op.C && kernels.size(2) == 1 && op.C > 1;
    STD_TORCH_CHECK((op.depthwise || kernels.size(2) == op.C) && (attention || op.N == 1),
                    "kernels must be [N, O, ", op.C, ", Kh, Kw] or [N, ", op.C,
                    ", 1, Kh, Kw], one or with an attention, got ", shape_text(kernels));
    if (op.depthwise) op.C = 1;
  }
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation are pairs");
  op.stride_y = stride[0], op.stride_x = stride[1];
  op.padding_y = padding[0], op.padding_x = padding[1];
  op.dilation_y = dilation[0], op.dilation_x = dilation[1];
  op.Ho = (op.H + 2 * op.padding_y - op.dilation_y * (op.Kh - 1) - 1) / op.stride_y + 1;
  op.Wo = (op.W + 2 * op.padding_x - op.dilation_x * (op.Kw - 1) - 1) / op.stride_x + 1;
  STD_TORCH_CHECK(op.Ho > 0 && op.Wo > 0, "x ", shape_text(x), " is too small for kernels ",
                  shape_text(kernels));
  op.channels_last = cells || !x.is_contiguous();
  STD_TORCH_CHECK(!cells || is_dense_channels_last(x), "x must be channels_last");
  // It pays for two copies; a single pixel is in both layouts already.
  if (!op.channels_last && has_minimal_filtering(op) && op.H * op.W > 1) {
    const auto copy = [](const Tensor& t, MemoryFormat format) {
      return torch::stable::contiguous(t, format);
    };
    return copy(mixed_convolution(copy(x, MemoryFormat::ChannelsLast), kernels, attention, pairs,
                                  a_out, shift, low, high, stride, padding, dilation),
                MemoryFormat::Contiguous);
  }
  const Tensor out = empty(x, {op.B, op.O, op.Ho, op.Wo}, op.channels_last);
  op.x = floats(x), op.out = mutable_floats(out);
  op.kernels = parameter("weight", kernels, kernels.numel(), x);
  const int64_t blocks = cells ? op.O * op.whole_depth() / (kernels.numel() / op.N) : 1;
  op.attention = optional_parameter("attention", attention, op.B * blocks * op.N, x);
  op.pairs = optional_parameter("in_scale", pairs, op.B * op.whole_depth(), x);
  const auto rows_of = [&](const std::optional<Tensor>& t) {  // one for all samples, or for each
    return t && (t->dim() == 1 || t->size(0) == 1) ? 1 : op.B;
  };
  op.a_out = optional_parameter("out_scale", a_out, rows_of(a_out) * op.O, x);
  op.a_out_stride = rows_of(a_out) == 1 ? 0 : op.O;
  op.shift = optional_parameter("shift", shift, rows_of(shift) * op.O, x);
  op.shift_stride = rows_of(shift) == 1 ? 0 : op.O;
  op.low = static_cast<float>(low), op.high = static_cast<float>(high);
  run_mixtures(op);
  return out;
}

}  // namespace timm_dynamic
