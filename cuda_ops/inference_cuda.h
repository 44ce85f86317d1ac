// What the CUDA kernels that fuse a layer's small operations for inference (inference_cuda.cu, no
// torch) and the operators (inference_cuda_ops.cpp, no kernels) share. Sizes are of elements.
#pragma once

#include <cstdint>

#include "cuda_kernels.h"
#include "ddf_index.h"

namespace timm_dynamic {

// y = clamp(scale * y + shift), in place; scale and shift float32, or `narrow`: of the dtype of y.
struct AffineMap {
  int64_t size;
  int C, positions;
  int vector;  // elements to load at once: 1, or those of 16 bytes
  bool channels_last, narrow;
  float low, high;
  const void *scale, *shift;
  void* y;
};

// Sums over positions, [parts, B, C]; every part of other positions.
struct Pool {
  int B, C, positions, parts;
  int vector;
  bool channels_last;
  const void* x;
  float* sums;

  int lanes() const;   // that share a map (NCHW), or have adjacent channels (channels_last)
  int blocks() const;  // in one part
};

enum class Activation { kNone, kRelu, kSigmoid, kTwiceHardSigmoid, kGate };

// out[b,o] = activation(sum_i weight[o,i] * in[b,i] + bias[o]); kGate: in[b,o] * twice the hard
// sigmoid of it. No bias where it is null.
struct Head {
  int outputs;
  Activation activation;
  const void *weight, *bias;
  void* out;
};

constexpr int kMaxHeads = 3;

// Linear layers of the same input, and of one dtype.
struct Heads {
  int B, inputs, parts, count;
  float factor;     // of the input, whose parts are added up
  bool narrow_out;  // results are of the weights' dtype, else float32
  const float* in;  // [parts, B, inputs]
  Head heads[kMaxHeads];

  DDF_HOST_DEVICE int outputs() const {
    int sum = 0;
    for (int i = 0; i < count; ++i) sum += heads[i].outputs;
    return sum;
  }
};

// out[b,:] = softmax((weight . in[b] + bias) / temperature).
struct KernelScores {
  int B, inputs, kernels;
  float temperature;
  const float* in;
  const void *weight, *bias;
  float* out;
};

void launch(const AffineMap& op, Dtype dtype, cudaStream_t stream);
void launch(const Pool& op, Dtype dtype, cudaStream_t stream);
void launch(const Heads& op, Dtype dtype, cudaStream_t stream);
void launch(const KernelScores& op, Dtype dtype, cudaStream_t stream);

}  // namespace timm_dynamic
