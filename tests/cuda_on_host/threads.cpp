// The threads of a block as fibers, and the launch of kernels; see runtime.h.
#include <dlfcn.h>
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

#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {

Range stacks;

namespace {

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

}  // namespace

bool in_kernel() { return current; }

[[noreturn]] void abandon(const std::string& what, const void* at) {
  if (error.empty()) {
    error = what + ", in block " + text(blockIdx) + ", thread " + text(threadIdx);
    error_at = at;
  }
  _longjmp(scheduler, 1);
}

namespace {

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
    context.uc_stack = {stacks.begin + fiber.number * kStack, 0, kStack};
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
  fill_shared();
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

void prepare() {
  if (stacks.begin) return;
  const auto size = kMaxThreads * kStack;
  char* const begin = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (begin == MAP_FAILED) std::abort();
  for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(begin + i * kStack, 4096, PROT_NONE);
  stacks = {begin, begin + size};
  find_memory();
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

}  // namespace

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

using namespace cuda_on_host;

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
  error.clear(), forget_tensors();
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
}
