// The memory that a kernel may use, and what g++ calls where it instruments kernels; see runtime.h.
#include <dlfcn.h>
#include <link.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "runtime.h"

namespace cuda_on_host {

Range arguments;
size_t dynamic_bytes;

namespace {

std::vector<Range> tensors;  // that the operator asked for
Range module;                // what this library was loaded to
struct Shared : Range {
  size_t with_gap;  // bytes up to the next variable
};
std::vector<Shared> shared;  // the __shared__ arrays of all kernels
Range shared_span;           // around them
enum : char { kOther, kShared, kGap };
std::vector<char> shared_bytes;  // what each byte of the span is
alignas(128) char dynamic[kMaxDynamic];

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

bool may_use(const char* at, size_t bytes, bool write) {
  if (stacks.holds(at, bytes)) return true;
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
  if (!in_kernel() || may_use(at, bytes, write)) return;
  abandon((write ? "write of " : "read of ") + std::to_string(bytes) + " bytes, " + where(at),
          caller);
}

}  // namespace

void find_memory() {
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

void fill_shared() {
  for (const Range& range : shared) std::memset(range.begin, 0xff, range.end - range.begin);
  std::memset(dynamic, 0xff, dynamic_bytes);
}

void* dynamic_shared() { return dynamic; }

void forget_tensors() { tensors.clear(); }

}  // namespace cuda_on_host

using namespace cuda_on_host;

extern "C" {

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
  if (!in_kernel()) return;
  abandon("address " + std::to_string(at % 4096) + " (mod 4096) is no multiple of " +
              std::to_string(1 << what->log_alignment) + ", at " + what->file + ":" +
              std::to_string(what->line),
          __builtin_return_address(0));
}
}
