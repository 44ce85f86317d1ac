// The DDF kernels for one instruction set; see common/vectors.h for what the includer defines.

#include "common/vectors.h"
#include "dynamic_filter/bands.h"
#include "dynamic_filter/pixels.h"
#include "dynamic_filter/pixels_backward.h"
#include "dynamic_filter/planes.h"
#include "dynamic_filter/planes_backward.h"

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
