// Includes KERNELS_HEADER, which the includer defines, once for every instruction set, and says
// which of them serves where the program runs. Elsewhere than on x86-64, and with compilers that
// cannot switch within a file, there is only the portable one.
#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#  define HAVE_X86_DISPATCH
#  include <immintrin.h>

#  pragma GCC push_options
#  pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#  define ISA avx512
#  define ISA_LEVEL 4
#  define VECTOR_BYTES 64
#  include KERNELS_HEADER
#  undef ISA
#  undef ISA_LEVEL
#  undef VECTOR_BYTES
#  undef INLINE
#  pragma GCC pop_options

#  pragma GCC push_options
#  pragma GCC target("avx2,fma,f16c")
#  define ISA avx2
#  define ISA_LEVEL 2
#  define VECTOR_BYTES 32
#  include KERNELS_HEADER
#  undef ISA
#  undef ISA_LEVEL
#  undef VECTOR_BYTES
#  undef INLINE
#  pragma GCC pop_options
#endif

#define ISA portable
#define ISA_LEVEL 0
#define VECTOR_BYTES 16
#include KERNELS_HEADER

namespace timm_dynamic {

// Calls one of three functions: that of the best instruction set there is.
#ifdef HAVE_X86_DISPATCH
#  define CHOOSE_KERNELS(function) \
    (isa_level() == 4 ? avx512::function : isa_level() == 2 ? avx2::function : portable::function)

// Not above what ATEN_CPU_CAPABILITY asks for, which bounds torch's own kernels likewise.
inline int isa_level() {
  static const int level = [] {
    const char* const set = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view most = set ? set : "";
    if (most == "default") return 0;
    if (most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return 4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      return 2;
    return 0;
  }();
  return level;
}
#else
#  define CHOOSE_KERNELS(function) (portable::function)
#endif

}  // namespace timm_dynamic
