"""The emulation of CUDA that tests of the kernels rely on: what it computes, and that it reports what is wrong."""

import cuda_on_host
import pytest
import torch

KERNELS = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include "common/cuda_kernels.h"

namespace timm_dynamic {
namespace {

__global__ void reverse(const float* from, float* to, bool synchronised) {
  extern __shared__ __align__(16) float values[];
  values[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
  if (synchronised) __syncthreads();
  to[blockIdx.x * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// The barrier that each step should end with is missing: seen where one warp runs ahead.
__global__ void drift(const float* from, float* to) {
  __shared__ float value;
  for (int step = 0; step < 2; ++step) {
    if (threadIdx.x == 0) value = from[step];
    __syncthreads();
    to[step * 64 + threadIdx.x] = value;
    __syncwarp();
  }
}

// Sums the warp's numbers, then the numbers of even lanes, and counts the positive ones.
__global__ void warp_sums(const float* from, float* to) {
  float sum = from[threadIdx.x], even = sum;
  for (int offset = 16; offset >= 1; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 2 == 0)
    for (int offset = 16; offset >= 2; offset /= 2) even += __shfl_down_sync(0x55555555u, even, offset);
  const unsigned positive = __ballot_sync(0xffffffffu, from[threadIdx.x] > 0);
  const float first = __shfl_sync(0xffffffffu, from[threadIdx.x], 3, 8), up = __shfl_up_sync(0xffffffffu, sum, 1);
  if (threadIdx.x == 0) to[0] = sum, to[1] = even, to[2] = __popc(positive), to[3] = up;
  if (threadIdx.x == 31) to[4] = first;
}

struct alignas(16) Four {
  float at[4];
};

__global__ void wrong(const float* from, float* to, int what) {
  __shared__ float values[32];
  const int i = threadIdx.x;
  values[i % 32] = 0;
  if (what == 0 && i == 7) to[0] = from[1 << 10];
  if (what == 1 && i == 7) to[-1] = 0;
  if (what == 2 && i == 7) values[32] = 0;
  if (what == 3) *reinterpret_cast<Four*>(to) = *reinterpret_cast<const Four*>(from + 1);
  if (what == 4 && i < 32) __syncthreads();
  if (what == 5 && i % 32 != 3) __shfl_xor_sync(0xffffffffu, 1.f, 1);
  if (what == 5 && i % 32 == 3) __syncthreads();
  if (what == 6) {
    if (i < 32) __syncthreads();
    else __syncthreads();
  }
  if (what == 7) {
    if (i % 2) __syncwarp();
    else __syncwarp();
  }
  if (what == 8) __syncwarp(1);
  to[i] = values[i % 32];
}

}  // namespace

void launch(int what, const float* from, float* to, cudaStream_t stream) {
  if (what == 0) return run_kernel(reverse, 4, 128, 512, stream, from, to, true);
  if (what == 1) return run_kernel(reverse, 4, 128, 512, stream, from, to, false);
  if (what == 2) return run_kernel(warp_sums, 1, 32, 0, stream, from, to);
  if (what == 8) return run_kernel(reverse, 0, 128, 512, stream, from, to, true);
  if (what == 9) return run_kernel(reverse, 1, 2048, 512, stream, from, to, true);
  if (what == 10) return run_kernel(reverse, dim3(1, 65536), 32, 512, stream, from, to, true);
  if (what == 11) return run_kernel(reverse, 1, 32, 49153, stream, from, to, true);
  if (what == 12) return run_kernel(reverse, 1, 128, 500, stream, from, to, true);
  if (what == 13) return run_kernel(drift, 1, 64, 0, stream, from, to);
  if (what >= 20) run_kernel(wrong, 1, 64, 0, stream, from, to, what - 20);
}

}  // namespace timm_dynamic
"""

OPERATORS = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include "common/cuda_device.h"

namespace timm_dynamic {

void launch(int what, const float* from, float* to, cudaStream_t stream);

torch::stable::Tensor probe(const torch::stable::Tensor& from, int64_t what, bool checks) {
  const torch::stable::Tensor to = torch::stable::empty({512}, from.scalar_type(), std::nullopt, from.device());
  launch(what, static_cast<const float*>(from.const_data_ptr()), static_cast<float*>(to.mutable_data_ptr()), nullptr);
  if (checks) STD_CUDA_KERNEL_LAUNCH_CHECK();
  return to;
}

}  // namespace timm_dynamic

STABLE_TORCH_LIBRARY_IMPL(timm_dynamic, CUDA, m) {
  m.impl("probe_of_emulation", TORCH_BOX(&timm_dynamic::probe));
}
"""

SEEDS = pytest.mark.parametrize("seed", range(4))
SOURCE = torch.randn(1024, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe_cuda.cu").write_text(KERNELS)
    (folder / "probe_cuda_ops.cpp").write_text(OPERATORS)
    library = torch.library.Library("timm_dynamic", "FRAGMENT")
    library.define("probe_of_emulation(Tensor source, int what, bool checks) -> Tensor")
    sources = [folder / "probe_cuda.cu", folder / "probe_cuda_ops.cpp"]
    probe = cuda_on_host.load(folder, "probe", sources).probe_of_emulation
    return lambda what, seed=0, checks=True: probe(SOURCE, what, checks, seed=seed)


pytestmark = cuda_on_host.needs_compiler


@SEEDS
def test_barrier(run, seed):
    expected = SOURCE[:512].view(4, 128).flip(1).flatten()
    assert torch.equal(run(0, seed), expected)
    assert not torch.equal(run(1, seed), expected)  # the barrier left out


def test_warps_run_ahead(run):
    expected = SOURCE[:2].repeat_interleave(64)
    assert not all(torch.equal(run(13, seed)[:128], expected) for seed in range(2, 14))


@SEEDS
def test_warp(run, seed):
    x = SOURCE[:32]
    expected = torch.stack([x.sum(), x[::2].sum(), (x > 0).sum(), x.sum(), x[27]])
    torch.testing.assert_close(run(2, seed)[:5], expected)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (8, "an empty grid.*\n.*reverse"),
        (9, "a block too large"),
        (10, "a grid too large"),
        (11, "too much dynamic shared memory"),
        (12, "write of 4 bytes, 0 bytes after dynamic shared memory of 500 bytes"),
        (20, r"read of 4 bytes, 0 bytes after a tensor of 4096 bytes, .* thread \(7, 0, 0\)"),
        (21, "write of 4 bytes, 4 bytes before a tensor of 2048 bytes"),
        (22, "write of 4 bytes, 0 bytes after a __shared__ array of 128 bytes"),
        (23, "no multiple of 16"),
        (25, r"for ever, in block(.|\n)*62 at .*:\d+ with mask 0xffffffff, the first is 0(.|\n)*2 at .*the first is 3"),
        (26, r"threads of a block wait at .*:\d+ and at "),
        (27, r"lanes of a warp wait at .*:\d+ and at "),
        (28, "a lane that is not in its own mask"),
    ],
)
def test_reports(run, what, message):
    with pytest.raises(RuntimeError, match=message):
        run(what)
    with pytest.raises(RuntimeError, match=f"probe_of_emulation did not see.*{message}"):
        run(what, checks=False)
    run(0)  # what comes next is not concerned


def test_threads_that_have_returned_are_not_waited_for(run):
    assert run(24)[64:].isnan().all()  # of 64 threads; new tensors hold NaN
