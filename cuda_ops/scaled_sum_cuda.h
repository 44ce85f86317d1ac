// What the CUDA kernels of timm_dynamic::scaled_sum (scaled_sum_cuda.cu, no torch) and the
// operators (scaled_sum_cuda_ops.cpp, no kernels) share. Sizes and strides are of elements.
#pragma once

#include <cstdint>

#include "cuda_kernels.h"
#include "ddf_index.h"

namespace timm_dynamic {

struct ScaledSumShape {
  int B, O, L, positions;   // maps [B, O, positions], latent ones [B, L, positions]
  bool channels_last;       // the maps' layout
  bool vectorize;           // whether 16 bytes of maps may be loaded at once
  bool wide;                // what is not a map is float32, whatever the maps are
  int p_channel, p_latent;  // strides of P, which is [O, L]
};

struct ScaledSum {
  ScaledSumShape s;
  int64_t v_sample;  // strides
  int v_channel, v_position;
  const void *y, *scale, *p, *v;  // y null: ones
  void* out;
};

constexpr int kTilePositions = 64, kTileChannels = 64;  // that a block has at a time, going back
constexpr int kTileLatent = 48;                         // more are read again

struct ScaledSumBackward {
  ScaledSumShape s;
  int parts;                         // of the channels, each the walk of a block
  const void *grad, *y, *scale, *p;  // y null: ones
  void* dy;                          // null, and so may scale be: not wanted
  float* scale_sums;                 // [tiles(), B, O], to be summed over the first dimension
  float* v_sums;                     // [parts, B, L, positions], likewise

  DDF_HOST_DEVICE int tiles() const { return ceil_div(s.positions, kTilePositions); }
  DDF_HOST_DEVICE int latent_tiles() const { return ceil_div(s.L, kTileLatent); }
  DDF_HOST_DEVICE int64_t blocks() const { return int64_t(s.B) * tiles() * latent_tiles() * parts; }
};

int64_t blocks_of(const ScaledSum& op);
void launch(const ScaledSum& op, Dtype dtype, cudaStream_t stream);
void launch(const ScaledSumBackward& op, Dtype dtype, cudaStream_t stream);

}  // namespace timm_dynamic
