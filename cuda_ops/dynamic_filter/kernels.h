// The kernels of dynamic_filter for one instruction set; see common/vectors.h for what the includer
// defines.

#include "common/vectors.h"
#include "dynamic_filter/bands.h"
// Each of these uses those in front of it.
// clang-format off
#include "dynamic_filter/pixels.h"
#include "dynamic_filter/pixels_backward.h"
#include "dynamic_filter/direct.h"
#include "dynamic_filter/lanes.h"
#include "dynamic_filter/lanes_backward.h"
#include "dynamic_filter/planes.h"
#include "dynamic_filter/rows.h"
#include "dynamic_filter/planes_backward.h"
// clang-format on

namespace timm_dynamic::ISA {

template <typename T, Combine COMBINE>
DdfKernels<T> kernels_of() {
  return {forward_planes<T, COMBINE>,  forward_pixels<T, COMBINE>,  forward_lanes<T, COMBINE>,
          backward_planes<T, COMBINE>, backward_pixels<T, COMBINE>, backward_lanes<T, COMBINE>};
}

template <typename T>
DdfKernels<T> ddf_kernels(bool alone, bool multiply) {
  if (alone)
    return {forward_rows<T>,
            forward_direct<T>,
            forward_lanes<T, Combine::kAlone>,
            backward_planes<T, Combine::kAlone>,
            nullptr,  // see dynamic_filter_backward
            backward_lanes<T, Combine::kAlone>};
  return multiply ? kernels_of<T, Combine::kMultiply>() : kernels_of<T, Combine::kAdd>();
}

}  // namespace timm_dynamic::ISA
