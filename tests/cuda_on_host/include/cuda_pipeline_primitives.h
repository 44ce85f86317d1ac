// What CUDA's header of this name declares; see cuda_runtime.h. Copies are done as late as allowed,
// by the wait that needs them, such that a missing wait shows.
#pragma once

#include <source_location>

#include "cuda_runtime.h"

namespace cuda_on_host {
void copy_later(const Site& site, void* to, const void* from, size_t bytes, size_t zeros);
void commit_copies();
void wait_copies(size_t newest);  // all batches but so many
}  // namespace cuda_on_host

inline void __pipeline_memcpy_async(
    void* to, const void* from, size_t bytes, size_t zeros = 0,
    const std::source_location& site = std::source_location::current()) {
  cuda_on_host::copy_later(site, to, from, bytes, zeros);
}
inline void __pipeline_commit() { cuda_on_host::commit_copies(); }
inline void __pipeline_wait_prior(size_t newest) { cuda_on_host::wait_copies(newest); }
