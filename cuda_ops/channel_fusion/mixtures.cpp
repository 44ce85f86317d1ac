// Convolutions of every sample with a mixture of kernels, on the CPU.
//
// No sample's weight is there as a whole: a block of it is mixed and gated in the cache and meets
// the columns there, what the block's elements read at every output position; or in channels_last,
// where those lie in memory, the pixels themselves. A block of the kernels is read once for some
// samples, or once for some rows of a large map.

#include "channel_fusion/mixtures.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/parallel.h"

namespace timm_dynamic {

constexpr int64_t kPanel = 16;  // outputs of a block

struct MixtureKernels {
  void (*mixtures)(const Mixtures&, int64_t begin, int64_t end);
  void (*pixel_mixtures)(const Mixtures&, int64_t begin, int64_t end);
  int64_t lanes;
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "channel_fusion/pixel_mixtures.h"
#include "common/dispatch.h"

namespace timm_dynamic {

// Positions of a unit, and elements of its columns: these, 2 MB, are read again for every block of
// outputs. A third of the depth costs 1.1 of the time; other numbers of positions or outputs save
// none (512 channels at 7x7, 256 at 14x14, one thread of an AMD EPYC with AVX2, November 2026).
constexpr int64_t kPositions = 784, kColumns = 1 << 19;

void run_mixtures(Mixtures op) {
  const MixtureKernels kernels = CHOOSE_KERNELS(mixture_kernels());
  const auto ceil_of = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  op.samples = std::clamp<int64_t>(kPositions / op.positions(), 1, op.B);
  op.rows = std::clamp<int64_t>(kPositions / op.Wo, 1, op.Ho);
  op.row_blocks = ceil_of(op.Ho, op.rows);
  const int64_t depth = kColumns / (op.samples * op.rows * op.Wo);
  const int64_t blocks = ceil_of(op.whole_depth(), std::clamp<int64_t>(depth, 576, 1152));
  op.depth = ceil_of(ceil_of(op.whole_depth(), blocks), kernels.lanes) * kernels.lanes;
  // Few units: the outputs are divided too, so that threads have equal shares.
  const int64_t units = ceil_of(op.B, op.samples) * op.row_blocks;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = units >= 4 * threads ? 1 : threads / std::gcd(units, threads);
  op.parts = std::min(parts, ceil_of(op.O, kPanel));
  const auto run = op.channels_last ? kernels.pixel_mixtures : kernels.mixtures;
  const int64_t work = op.samples * op.rows * op.Wo * op.O * op.whole_depth() / op.parts;
  parallel(units * op.parts, work / 8, [&](int64_t begin, int64_t end) { run(op, begin, end); });
}

}  // namespace timm_dynamic
