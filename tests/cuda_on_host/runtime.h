// Runs CUDA kernels on the CPU, for tests: what include/cuda_runtime.h declares, and the checks.
//
// The threads of a block are fibers that run one at a time, each until it has to wait for others,
// in an order that follows from a seed. What a GPU would leave undefined is reported with the
// kernel's line:
//
//   threads that wait for others which never come, or which wait elsewhere;
//   launches that a GPU would refuse;
//   addresses outside of the tensors that the operator asked for, of __shared__ arrays and of the
//   thread's own memory: the compiler calls __asan_loadN and __asan_storeN
//   (-fsanitize=kernel-address), defined here; misaligned addresses (-fsanitize=alignment).
//
// Shared memory is garbage (all bits set: NaN, -1) when a block starts.
//
// Blocks run one after the other and threads change places only where they wait, so a race shows as
// a wrong result for some seeds and not always. Not seen at all: launch bounds, sizes that need
// more memory than there is here, what nvcc makes of the code, and speed.
#pragma once

#include <string>

#include "cuda_runtime.h"

namespace cuda_on_host {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStack = 256 << 10, kMaxDynamic = 48 << 10;

struct Range {
  char *begin, *end;
  bool holds(const void* at, size_t bytes) const {
    return at >= begin && static_cast<const char*>(at) + bytes <= end;
  }
};
// threads.cpp

// The stacks of all threads of a block.
extern Range stacks;

// Whether a thread of a kernel runs, and not the host's code.
bool in_kernel();

// Ends the launch: the thread that calls this is never resumed. `at` is where, of the kernel's
// code.
[[noreturn]] void abandon(const std::string& what, const void* at = nullptr);

// memory.cpp

extern Range arguments;  // of the kernel
extern size_t dynamic_bytes;

void find_memory();  // what this library was loaded to
void fill_shared();  // with garbage
void forget_tensors();

}  // namespace cuda_on_host
