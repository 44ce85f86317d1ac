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
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <torch/csrc/stable/c/shim.h>
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

using cuda_on_host::Body;
using cuda_on_host::Complete;
using cuda_on_host::Site;

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStack = 256 << 10, kMaxDynamic = 48 << 10;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  jmp_buf at;
  bool started = false;
  State state;
  uint3 thread;
  int number;
  Site site;  // where it waits, and for what
  unsigned mask;
  void* own;
  Complete complete;
};

std::vector<Fiber> fibers(kMaxThreads);
char* stacks;
Fiber* current;  // null in the host's code
jmp_buf scheduler;
int threads, waiting, alive, predicates, barrier_result;
Site barrier_site;
Body body;
std::string error;
const void* error_at;
std::mt19937 random_bits;
unsigned seed;
int processors = 4;
alignas(128) char dynamic[kMaxDynamic];
size_t dynamic_bytes;

struct Range {
  char *begin, *end;
  bool holds(const void* at, size_t bytes) const {
    return at >= begin && static_cast<const char*>(at) + bytes <= end;
  }
};
std::vector<Range> tensors;  // that the operator asked for
Range arguments, module;     // of the kernel; what this library was loaded to
struct Shared : Range {
  size_t with_gap;  // bytes up to the next variable
};
std::vector<Shared> shared;  // the __shared__ arrays of all kernels
Range shared_span;           // around them
enum : char { kOther, kShared, kGap };
std::vector<char> shared_bytes;  // what each byte of the span is

// `what`, and the line of source that has address `at` of this library.
std::string described(const std::string& what, const void* at) {
  Dl_info info;
  std::string text = what;
  if (!at || !dladdr(at, &info)) return text;
  char command[4200];
  const auto offset = static_cast<const char*>(at) - static_cast<const char*>(info.dli_fbase);
  std::snprintf(command, sizeof command, "addr2line -sCfie '%s' %#zx 2>/dev/null", info.dli_fname,
                size_t(offset));
  if (FILE* pipe = popen(command, "r")) {
    text += "\n";
    char line[500];
    while (std::fgets(line, sizeof line, pipe)) text += std::string("  ") + line;
    pclose(pipe);
  }
  return text;
}

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

// Ends the launch: the fiber that calls this is never resumed.
[[noreturn]] void abandon(const std::string& what, const void* at = nullptr) {
  if (error.empty()) {
    error = what + ", in block " + text(blockIdx) + ", thread " + text(threadIdx);
    error_at = at;
  }
  _longjmp(scheduler, 1);
}

void suspend() {
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

void release_barrier() {
  if (waiting == 0 || waiting < alive) return;
  barrier_result = predicates;
  waiting = predicates = 0;
  for (int i = 0; i < threads; ++i)
    if (fibers[i].state == State::kAtBarrier) fibers[i].state = State::kReady;
}

// Lets the lanes that wait with `fiber` go on if all have come.
void release_lanes(Fiber& fiber) {
  const int first = fiber.number & -warpSize;
  void* lanes[warpSize] = {};
  for (int i = 0; i < warpSize; ++i) {
    if (!(fiber.mask >> i & 1) || first + i >= threads) continue;
    Fiber& other = fibers[first + i];
    if (other.state == State::kDone) continue;
    if (other.state != State::kInWarp || other.mask != fiber.mask) return;
    if (other.site.line() != fiber.site.line())
      abandon("lanes of a warp wait at " + text(fiber.site) + " and at " + text(other.site));
    lanes[i] = other.own;
  }
  fiber.complete(lanes);
  for (int i = 0; i < warpSize; ++i)
    if (lanes[i]) fibers[first + i].state = State::kReady;
}

void fiber_main() {
  for (;;) {
    body.run(body.arguments);
    current->state = State::kDone;
    --alive;
    release_barrier();
    const int first = current->number & -warpSize;
    for (int i = first; i < std::min(first + warpSize, threads); ++i)
      if (fibers[i].state == State::kInWarp) release_lanes(fibers[i]);
    suspend();
  }
}

void resume(Fiber& fiber) {
  threadIdx = fiber.thread;
  current = &fiber;
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {stacks + fiber.number * kStack, 0, kStack};
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
  }
  current = nullptr;
}

// What all threads of a block that can go no further wait for.
std::string standstill() {
  std::map<std::string, std::pair<int, int>> places;  // how many, the first
  for (int i = 0; i < threads; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state == State::kDone) continue;
    char mask[40] = "";
    if (fiber.state == State::kInWarp)
      std::snprintf(mask, sizeof mask, " with mask %#x", fiber.mask);
    ++places.try_emplace(text(fiber.site) + mask, 0, i).first->second.first;
  }
  std::string what = "threads wait for others for ever, in block " + text(blockIdx) + ":";
  for (const auto& [place, found] : places)
    what += "\n  " + std::to_string(found.first) + " at " + place + ", the first is " +
            std::to_string(found.second);
  return what + "\n  " + std::to_string(threads - alive) + " have returned";
}

std::vector<int> new_order(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), random_bits);
  return order;
}

// Runs the lanes of a warp up to where each waits next. Whether any could run.
bool advance(int warp) {
  bool ran = false;
  for (const int lane : new_order(warpSize)) {
    const int i = warp * warpSize + lane;
    if (i >= threads || fibers[i].state != State::kReady || !error.empty()) continue;
    ran = true;
    resume(fibers[i]);
  }
  return ran;
}

void run_block() {
  for (const Range& range : shared) std::memset(range.begin, 0xff, range.end - range.begin);
  std::memset(dynamic, 0xff, dynamic_bytes);
  alive = threads, waiting = predicates = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::kReady, fiber.number = i;
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  while (alive > 0 && error.empty()) {
    bool progress = false;
    for (const int warp : new_order((threads + warpSize - 1) / warpSize)) {
      // Far ahead of the others, or side by side.
      while (advance(warp)) {
        progress = true;
        if (seed % 2 == 1) break;
      }
    }
    if (!progress) error = standstill(), error_at = nullptr;
  }
}

// Finds all memory that this library was loaded to, and that its variables are in.
int find_module(dl_phdr_info* info, size_t, void*) {
  Range span{nullptr, nullptr}, writable{nullptr, nullptr}, constants{nullptr, nullptr};
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    char* const begin = reinterpret_cast<char*>(info->dlpi_addr + part.p_vaddr);
    if (part.p_type == PT_GNU_RELRO) constants = {begin, begin + part.p_memsz};
    if (part.p_type != PT_LOAD) continue;
    if (part.p_flags & PF_W) writable = {begin, begin + part.p_memsz};
    if (!span.begin) span.begin = begin;
    span.end = begin + part.p_memsz;
  }
  if (!span.holds(&module, 1)) return 0;
  module = span;
  std::erase_if(shared, [&](const Shared& range) {
    return !writable.holds(range.begin, 1) || constants.holds(range.begin, 1);
  });
  return 1;
}

void prepare() {
  if (stacks) return;
  const auto size = kMaxThreads * kStack;
  stacks = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) std::abort();
  for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStack, 4096, PROT_NONE);
  dl_iterate_phdr(find_module, nullptr);
  if (shared.empty()) return;
  shared_span = shared[0];
  for (const Shared& array : shared) {
    shared_span.begin = std::min(shared_span.begin, array.begin);
    shared_span.end = std::max(shared_span.end, array.begin + array.with_gap);
  }
  shared_bytes.assign(shared_span.end - shared_span.begin, kOther);
  for (const Shared& array : shared) {
    char* const kinds = &shared_bytes[array.begin - shared_span.begin];
    std::fill_n(kinds, array.with_gap, kGap);
    std::fill_n(kinds, array.end - array.begin, kShared);
  }
}

const char* refusal(const cudaLaunchConfig_t& config) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z)
    return "an empty grid or block";
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return "a grid too large";
  if (uint64_t(grid.x) * grid.y * grid.z > 1 << 24) return "more blocks than are emulated";
  if (block.x > kMaxThreads || block.z > 64 || block.x * block.y * block.z > kMaxThreads)
    return "a block too large";
  if (config.dynamicSmemBytes > kMaxDynamic) return "too much dynamic shared memory";
  return nullptr;
}

bool may_use(const char* at, size_t bytes, bool write) {
  const auto offset = size_t(at - stacks);
  if (offset < kMaxThreads * kStack) return true;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].holds(at, bytes)) continue;
    if (i > 0) std::swap(tensors[i], tensors[i / 2]);
    return true;
  }
  if (shared_span.holds(at, bytes)) {
    const char* const kinds = &shared_bytes[at - shared_span.begin];
    if (kinds[0] == kShared && kinds[bytes - 1] == kShared) return true;
    if (kinds[0] != kOther) return false;
  }
  if (Range{dynamic, dynamic + sizeof dynamic}.holds(at, bytes))
    return at + bytes <= dynamic + dynamic_bytes;
  return !write && (arguments.holds(at, bytes) || module.holds(at, bytes));
}

std::string where(const char* at) {
  const char* best = nullptr;
  std::string text = "no memory of this kernel";
  const auto consider = [&](const Range& range, const char* kind) {
    const char* const end = at < range.begin ? range.begin : range.end;
    if (at >= range.begin && at < range.end) return;
    if (best && std::abs(at - best) <= std::abs(at - end)) return;
    best = end;
    text = std::to_string(at < range.begin ? range.begin - at : at - range.end) + " bytes " +
           (at < range.begin ? "before " : "after ") + kind + " of " +
           std::to_string(range.end - range.begin) + " bytes";
  };
  for (const Range& range : tensors) consider(range, "a tensor");
  for (const Range& range : shared) consider(range, "a __shared__ array");
  consider({dynamic, dynamic + dynamic_bytes}, "dynamic shared memory");
  return text;
}

void check(const void* address, size_t bytes, bool write, const void* caller) {
  const auto at = static_cast<const char*>(address);
  if (!current || may_use(at, bytes, write)) return;
  abandon((write ? "write of " : "read of ") + std::to_string(bytes) + " bytes, " + where(at),
          caller);
}

}  // namespace

namespace cuda_on_host {

cudaError_t launch(const cudaLaunchConfig_t& config, const Body& new_body) {
  prepare();
  if (!error.empty()) return cudaErrorLaunchFailure;
  body = new_body;
  const char* refused = refusal(config);
  if (refused) {
    error = described(std::string("launch with ") + refused, body.kernel);
    return cudaErrorInvalidConfiguration;
  }
  arguments.begin = static_cast<char*>(const_cast<void*>(body.arguments)),
  arguments.end = arguments.begin + body.bytes;
  gridDim = config.gridDim, blockDim = config.blockDim, dynamic_bytes = config.dynamicSmemBytes;
  threads = blockDim.x * blockDim.y * blockDim.z;
  for (const int i : new_order(gridDim.x * gridDim.y * gridDim.z)) {
    blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
    run_block();
    if (error.empty()) continue;
    for (Fiber& fiber : fibers) fiber.started = false;
    error = described(described(error, error_at), body.kernel);
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

void* dynamic_shared() { return dynamic; }

int block_barrier(const Site& site, int predicate) {
  if (waiting == 0) barrier_site = site;
  if (site.line() != barrier_site.line())
    abandon("threads of a block wait at " + text(site) + " and at " + text(barrier_site));
  current->state = State::kAtBarrier, current->site = site;
  ++waiting, predicates += predicate;
  release_barrier();
  suspend();
  return barrier_result;
}

void converge(const Site& site, unsigned mask, void* own, Complete complete) {
  current->state = State::kInWarp;
  current->site = site, current->mask = mask, current->own = own, current->complete = complete;
  if (!(mask >> lane() & 1)) abandon("a lane that is not in its own mask, at " + text(site));
  release_lanes(*current);
  suspend();
}

int lane() { return current->number % warpSize; }

}  // namespace cuda_on_host

cudaError_t cudaGetLastError() { return error.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = processors;
  return cudaSuccess;
}

extern "C" {

// For Python: what the next operator runs with, and what was wrong with the last.
[[gnu::visibility("default")]] void cuda_on_host_begin(unsigned new_seed, int new_processors) {
  seed = new_seed, processors = new_processors;
  random_bits.seed(seed);
  error.clear(), tensors.clear();
}
[[gnu::visibility("default")]] const char* cuda_on_host_error() { return error.c_str(); }

// What torch's CUDA library would have.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError torch_c10_cuda_check_msg(int32_t code, const char*, const char*, uint32_t, bool,
                                        char** message) {
  *message = code == cudaSuccess ? nullptr : strdup(error.c_str());
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

// The tensors whose addresses an operator asks for are those that its kernels may use.
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** at) {
  static const auto original = reinterpret_cast<decltype(&aoti_torch_get_data_ptr)>(
      dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), "aoti_torch_get_data_ptr"));
  const AOTITorchError failed = original(tensor, at);
  int64_t dims = 0, *sizes, *strides, count = 0, last = 0;
  int32_t dtype;
  aoti_torch_get_dim(tensor, &dims), aoti_torch_get_numel(tensor, &count);
  aoti_torch_get_sizes(tensor, &sizes), aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  if (failed || count == 0) return failed;
  for (int64_t i = 0; i < dims; ++i) last += (sizes[i] - 1) * strides[i];
  char* const begin = static_cast<char*>(*at);
  tensors.push_back({begin, begin + (last + 1) * aoti_torch_dtype_element_size(dtype)});
  return failed;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** at) {
  return aoti_torch_get_data_ptr(tensor, at);
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** at) {
  return aoti_torch_get_data_ptr(tensor, const_cast<void**>(at));
}

// What g++ calls where it instruments the kernels.
#define CHECKED(bytes)                                    \
  void __asan_load##bytes##_noabort(void* at) {           \
    check(at, bytes, false, __builtin_return_address(0)); \
  }                                                       \
  void __asan_store##bytes##_noabort(void* at) {          \
    check(at, bytes, true, __builtin_return_address(0));  \
  }
CHECKED(1)
CHECKED(2)
CHECKED(4)
CHECKED(8)
CHECKED(16)
void __asan_loadN_noabort(void* at, size_t bytes) {
  check(at, bytes, false, __builtin_return_address(0));
}
void __asan_storeN_noabort(void* at, size_t bytes) {
  check(at, bytes, true, __builtin_return_address(0));
}
void __asan_handle_no_return() {}
void __asan_before_dynamic_init(const char*) {}
void __asan_after_dynamic_init() {}

struct AsanGlobal {
  char* begin;
  size_t size, size_with_redzone;
  const char *name, *module;
  size_t has_dynamic_init;
  const void *location, *odr_indicator;
};
// The variables of kernels are their shared memory; what the compiler adds has no location or no
// such name.
void __asan_register_globals(const AsanGlobal* globals, size_t count) {
  for (const AsanGlobal* global = globals; global < globals + count; ++global) {
    if (global->location && global->name[0] != '*')
      shared.push_back({{global->begin, global->begin + global->size}, global->size_with_redzone});
  }
}
void __asan_unregister_globals(const AsanGlobal*, size_t) {}

struct UbsanMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(const UbsanMismatch* what, uintptr_t at) {
  if (!current) return;
  abandon("address " + std::to_string(at % 4096) + " (mod 4096) is no multiple of " +
              std::to_string(1 << what->log_alignment) + ", at " + what->file + ":" +
              std::to_string(what->line),
          __builtin_return_address(0));
}
}
