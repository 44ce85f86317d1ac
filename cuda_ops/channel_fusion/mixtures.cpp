// Convolutions of every sample with a mixture of kernels, on the CPU.
//
// No sample's weight is there as a whole: a block of it is mixed and gated in the cache and meets
// the columns there, what the block's elements read at every output position. A block of the
// kernels is read once for some samples, or once for some rows of a large map.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>

#include "channel_fusion/mixtures.h"
#include "common/parallel.h"

namespace timm_dynamic {

constexpr int64_t kPanel = 16;  // outputs of a block

struct MixtureKernels {
  void (*mixtures)(const Mixtures&, int64_t begin, int64_t end);
  int64_t lanes;
};

}  // namespace timm_dynamic

#define KERNELS_HEADER "channel_fusion/mixture_kernels.h"
#include "common/dispatch.h"

namespace timm_dynamic {

// Positions and elements of a unit: its columns, 800 KB, are read again for every block of outputs.
constexpr int64_t kPositions = 784, kDepth = 256;

void run_mixtures(Mixtures op) {
  const MixtureKernels kernels = CHOOSE_KERNELS(mixture_kernels());
  const auto ceil_of = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  op.samples = std::clamp<int64_t>(kPositions / op.positions(), 1, op.B);
  op.rows = std::clamp<int64_t>(kPositions / op.Wo, 1, op.Ho);
  op.row_blocks = ceil_of(op.Ho, op.rows);
  const int64_t blocks = ceil_of(op.whole_depth(), kDepth);
  op.depth = ceil_of(ceil_of(op.whole_depth(), blocks), kernels.lanes) * kernels.lanes;
  // Few units: the outputs are divided too, so that threads have equal shares.
  const int64_t units = ceil_of(op.B, op.samples) * op.row_blocks;
  const int64_t threads = torch::stable::get_num_threads();
  op.parts = units >= 4 * threads
                 ? 1
                 : std::clamp<int64_t>(threads / std::gcd(units, threads), 1, ceil_of(op.O, kPanel));
  const int64_t work = op.samples * op.rows * op.Wo * op.O * op.whole_depth() / op.parts;
  parallel(units * op.parts, work / 8,
           [&](int64_t begin, int64_t end) { kernels.mixtures(op, begin, end); });
}

}  // namespace timm_dynamic
