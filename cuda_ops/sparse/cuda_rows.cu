// CUDA kernels of sparse execution that gather and scatter rows; timm_dynamic/ops/sparse defines
// what they compute. Along a row each lane loads 16 bytes at a time where C allows. The matrix
// products between them are left to cuBLAS.

#include <cmath>

#include "sparse/cuda_rows.h"

namespace timm_dynamic {
namespace {

__device__ float limit(float v, float low, float high) {
  v = v < low ? low : v;  // NaN stays
  return v > high ? high : v;
}

// Which rows a thread works on, and its part of them.
struct Rows {
  int lane, step;  // from one of its kRows rows to the next
  int64_t first;

  __device__ explicit Rows(int lanes)
      : lane(threadIdx.x % lanes),
        step(kThreads / lanes),
        first(int64_t(blockIdx.x) * step * kRows + threadIdx.x / lanes) {}
  __device__ int64_t operator[](int r) const { return first + r * step; }
};

struct Keep {
  template <typename Unit>
  __device__ Unit operator()(const Unit& unit) const {
    return unit;
  }
};

template <typename T, int V>
struct Limit {
  float low, high;

  __device__ Vec<T, V> operator()(Vec<T, V> v) const {
#pragma unroll
    for (int i = 0; i < V; ++i) v.at[i] = T(limit(float(v.at[i]), low, high));
    return v;
  }
};

template <typename Unit, typename F>
__global__ void __launch_bounds__(kThreads)
    gather_units(int64_t M, int units, int lanes, const Unit* __restrict__ source,
                 const int* __restrict__ table, Unit* __restrict__ out, const F change) {
  const Rows rows(lanes);
  int64_t from[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) from[r] = rows[r] < M ? table[rows[r]] : -1;
  for (int u = rows.lane; u < units; u += lanes) {
    Unit values[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) values[r] = from[r] < 0 ? Unit{} : source[from[r] * units + u];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (rows[r] < M) out[rows[r] * units + u] = change(values[r]);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) add_rows(const ScatterRows op, int lanes) {
  const auto from = static_cast<const Vec<T, V>*>(op.rows);
  const auto out = static_cast<Vec<T, V>*>(op.out);
  const Rows rows(lanes);
  const int vectors = op.C / V;
  int64_t to[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) to[r] = rows[r] < op.M ? op.positions[rows[r]] : -1;
  for (int c = rows.lane; c < vectors; c += lanes) {
    Vec<T, V> sums[kRows], values[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (to[r] < 0) continue;
      sums[r] = out[to[r] * vectors + c];
      values[r] = from[rows[r] * vectors + c];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (to[r] < 0) continue;
#pragma unroll
      for (int v = 0; v < V; ++v)
        sums[r].at[v] = T(limit(float(sums[r].at[v]) + float(values[r].at[v]), op.low, op.high));
      out[to[r] * vectors + c] = sums[r];
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) depthwise_rows(const GatherDepthwise op, int lanes) {
  const auto source = static_cast<const Vec<T, V>*>(op.source);
  const auto weight = static_cast<const Vec<T, V>*>(op.weight);
  const auto bias = static_cast<const Vec<T, V>*>(op.bias);
  const auto out = static_cast<Vec<T, V>*>(op.out);
  const Rows rows(lanes);
  const int vectors = op.C / V;
  for (int c = rows.lane; c < vectors; c += lanes) {
    float sums[kRows][V];
    const Vec<T, V> start = bias[c];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v) sums[r][v] = float(start.at[v]);
    for (int t = 0; t < op.T; ++t) {
      const Vec<T, V> weights = weight[int64_t(t) * vectors + c];
      Vec<T, V> in[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = rows[r] < op.M ? op.table[rows[r] * op.T + t] : -1;
        in[r] = at < 0 ? Vec<T, V>{} : source[at * vectors + c];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < V; ++v)
          sums[r][v] = fmaf(float(weights.at[v]), float(in[r].at[v]), sums[r][v]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (rows[r] >= op.M) continue;
      Vec<T, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) result.at[v] = T(limit(sums[r][v], op.low, op.high));
      out[rows[r] * vectors + c] = result;
    }
  }
}

unsigned row_blocks(int64_t rows, int lanes) { return blocks_for(rows, kThreads / lanes * kRows); }

// Calls f.operator()<T, V>(vectors) for rows of C elements.
template <typename F>
void dispatch_rows(Dtype dtype, int C, bool aligned, F f) {
  dispatch(dtype, [&]<typename T>() {
    if (aligned) return f.template operator()<T, kWide<T>>(C / kWide<T>);
    f.template operator()<T, 1>(C);
  });
}

}  // namespace

void launch(const GatherRows& op, Dtype dtype, cudaStream_t stream) {
  const auto gather = [&]<typename Unit, typename F>(Unit, int units, F change) {
    const int lanes = lanes_for(units);
    run_kernel(gather_units<Unit, F>, row_blocks(op.M, lanes), kThreads, 0, stream, op.M, units,
               lanes, static_cast<const Unit*>(op.source), op.table, static_cast<Unit*>(op.out),
               change);
  };
  if (op.low > -INFINITY || op.high < INFINITY)
    return dispatch_rows(dtype, op.C, op.unit == 16, [&]<typename T, int V>(int vectors) {
      gather(Vec<T, V>{}, vectors, Limit<T, V>{op.low, op.high});
    });
  const int units = int64_t(op.C) * (dtype == Dtype::kFloat32 ? 4 : 2) / op.unit;
  if (op.unit == 16) return gather(uint4{}, units, Keep{});
  if (op.unit == 8) return gather(uint2{}, units, Keep{});
  if (op.unit == 4) return gather(uint32_t{}, units, Keep{});
  gather(uint16_t{}, units, Keep{});
}

void launch(const ScatterRows& op, Dtype dtype, cudaStream_t stream) {
  dispatch_rows(dtype, op.C, op.aligned, [&]<typename T, int V>(int vectors) {
    const int lanes = lanes_for(vectors);
    run_kernel(add_rows<T, V>, row_blocks(op.M, lanes), kThreads, 0, stream, op, lanes);
  });
}

void launch(const GatherDepthwise& op, Dtype dtype, cudaStream_t stream) {
  dispatch_rows(dtype, op.C, op.aligned, [&]<typename T, int V>(int vectors) {
    const int lanes = lanes_for(vectors);
    run_kernel(depthwise_rows<T, V>, row_blocks(op.M, lanes), kThreads, 0, stream, op, lanes);
  });
}

}  // namespace timm_dynamic
