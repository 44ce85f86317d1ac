// What the CUDA kernels of sparse execution (cuda_*.cu, no torch) and the operators
// (cuda_operators.cpp, no kernels) share. Sizes and strides are of elements.
#pragma once

#include <cstdint>

#include "common/cuda_kernels.h"
#include "sparse/window.h"

namespace timm_dynamic {

// out[m] = clamp(source[table[m]]), zeros where the table holds -1.
struct GatherRows {
  int64_t M;
  int C;
  int unit;  // the most bytes, up to 16, that may be loaded at once
  float low, high;
  const void* source;
  const int* table;
  void* out;
};

// out[positions[m]] = clamp(out[positions[m]] + rows[m])
struct ScatterRows {
  int64_t M;
  int C;
  bool aligned;  // whether 16 bytes may be loaded at once
  float low, high;
  const void* rows;
  const int* positions;
  void* out;
};

// out[m] = clamp(bias + sum_t source[table[m, t]] * weight[t])
struct GatherDepthwise {
  int64_t M;
  int T, C;
  bool aligned;
  float low, high;
  const void *source, *weight, *bias;
  const int* table;
  void* out;
};

struct WindowTable {
  Window<int> window;
  int M;
  const int* positions;
  int* table;
};

// Sets of positions are words of 32 bits, with the number of set bits before each word.
HOST_DEVICE constexpr int64_t words_of(int64_t positions) { return (positions + 31) / 32; }

// Of what there is no room for, only the number is kept; rows that are left are -1.
struct NeighbourTable {
  Window<int> window;
  int outputs, inputs;  // positions of the whole batch
  int active_capacity;  // rows of `positions` and `table`, at most `outputs`
  int needed_capacity;  // rows of `needed`, at most `inputs`
  bool all_listed;      // in `needed`, whether or not they are needed
  int mask_bytes;       // of an element: 1, 2 or 4
  const void* mask;
  unsigned* words;  // [words_of(outputs) + words_of(inputs)]: the active ones, the needed ones
  int* before;      // likewise
  int* sizes;       // [2]: how many are active, how many needed
  int *positions, *needed, *table;
};

void launch(const GatherRows& op, Dtype dtype, cudaStream_t stream);
void launch(const ScatterRows& op, Dtype dtype, cudaStream_t stream);
void launch(const GatherDepthwise& op, Dtype dtype, cudaStream_t stream);
void launch(const WindowTable& op, cudaStream_t stream);
void launch(const NeighbourTable& op, cudaStream_t stream);

}  // namespace timm_dynamic
