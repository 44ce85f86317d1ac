// The DDF kernels for one instruction set; see cpu_vectors.h for what the includer defines.

#include "cpu_vectors.h"
#include "ddf_cpu_bands.h"
#include "ddf_cpu_pixels.h"
#include "ddf_cpu_planes.h"

namespace timm_dynamic::ISA {

template <typename T>
DdfKernels<T> ddf_kernels(bool multiply) {
  if (multiply)
    return {forward_planes<T, true>, forward_pixels<T, true>, backward_planes<T, true>,
            backward_pixels<T, true>};
  return {forward_planes<T, false>, forward_pixels<T, false>, backward_planes<T, false>,
          backward_pixels<T, false>};
}

}  // namespace timm_dynamic::ISA
