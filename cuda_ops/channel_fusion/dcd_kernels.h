// DCD's factors and branch, for one instruction set; see common/vectors.h for what the includer
// defines, and dcd_conv.cpp for the operator.

#include "common/pooling.h"

namespace timm_dynamic::ISA {

INLINE float hsig(float t) { return std::min(std::max(t + 3, 0.0f), 6.0f) / 3; }

inline void pool_inputs(const DcdConv& op, int64_t begin, int64_t end) {
  pool(op.x, {op.C, op.H, op.W, op.channels_last}, op.pool_size, op.pooled, begin, end);
}

// z; units are its elements.
inline void squeeze(const DcdConv& op, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h)
    for (int64_t b = 0; b < op.B; ++b)
      op.z[b * op.hidden + h] =
          dot(op.fc + h * op.pooled_size(), op.pooled + b * op.pooled_size(), op.pooled_size());
}

inline void gate(const DcdConv& op, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h)
    for (int64_t b = 0; b < op.B; ++b) {
      const float* const z = op.z + b * op.hidden;
      op.gated[b * op.hidden + h] = z[h] * hsig(dot(op.gate + h * op.hidden, z, op.hidden));
    }
}

// Phi and scale; units are their elements, one after the other.
inline void factors(const DcdConv& op, int64_t begin, int64_t end) {
  const int64_t squared = op.L * op.L;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t b = 0; b < op.B; ++b) {
      const float* const z = op.gated + b * op.hidden;
      if (i < squared) {
        op.phi[b * squared + i] = dot(op.phi_head + i * op.hidden, z, op.hidden);
      } else {
        const int64_t o = i - squared;
        op.scale[b * op.O + o] = hsig(dot(op.scale_head + o * op.hidden, z, op.hidden));
      }
    }
}

// out[0, n) = s * sum_m phi[m] * rows[m*pitch + i] + out[i]
INLINE void fuse(const float* phi, const float* rows, int64_t L, int64_t pitch, float s, float* out,
                 int64_t n) {
  constexpr int64_t kLane = kLanes<float>;
  for (int64_t i = 0; i < n; i += kLane) {
    Vec<float> sum = {};
    for (int64_t m = 0; m < L; ++m)
      sum += broadcast(phi[m]) * load<float>(rows + m * pitch + i, n - i);
    store<float>(out + i, load<float>(out + i, n - i) + broadcast(s) * sum, n - i);
  }
}

// x at the stride; units are maps.
inline void subsample(const DcdConv& op, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    float* to = op.maps + i * op.outputs();
    for (int64_t y = 0; y < op.Ho; ++y) {
      const float* const row = op.x + i * op.inputs() + y * op.stride_y * op.W;
      for (int64_t x = 0; x < op.Wo; ++x) *to++ = row[x * op.stride_x];
    }
  }
}

// v = BN2(Phi u) + u; units are (b, l).
inline void fuse_channels(const DcdConv& op, int64_t begin, int64_t end) {
  const int64_t L = op.L, n = op.outputs();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / L, l = i % L;
    const float t = op.norm2.offset(l);
    const float* const u = op.u + b * L * n;
    float* const v = op.v + i * n;
    for (int64_t j = 0; j < n; ++j) v[j] = u[l * n + j] + t;
    fuse(op.phi + i * L, u, L, n, op.norm2.slope(l), v, n);
  }
}

// The branch is affine: [S1 Q, t1] in `base`, and (S2 Phi + I) of it, plus t2, in `folded`.
inline void fold_base(const DcdConv& op, int64_t begin, int64_t end) {
  const int64_t C = op.C;
  for (int64_t l = begin; l < end; ++l) {
    const float s = op.norm1.slope(l);
    for (int64_t c = 0; c < C; ++c) op.base[l * (C + 1) + c] = s * op.q[l * C + c];
    op.base[l * (C + 1) + C] = op.norm1.offset(l);
  }
}

inline void fold(const DcdConv& op, int64_t begin, int64_t end) {  // units are (b, l)
  const int64_t L = op.L, n = op.C + 1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t l = i % L;
    float* const to = op.folded + i * n;
    std::copy(op.base + l * n, op.base + (l + 1) * n, to);
    to[n - 1] += op.norm2.offset(l);
    fuse(op.phi + i * L, op.base, L, n, op.norm2.slope(l), to, n);
  }
}

// A weight and a bias for every sample; units are (b, o).
inline void sample_weights(const DcdConv& op, int64_t begin, int64_t end) {
  const int64_t L = op.L, C = op.C, taps = op.taps();
  std::vector<float> row(C + 1);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / op.O, o = i % op.O;
    std::fill(row.begin(), row.end(), 0.0f);
    fuse(op.p + o * L, op.folded + b * L * (C + 1), L, C + 1, 1.0f, row.data(), C + 1);
    const float s = op.scale[i];
    const float* const from = op.weight + o * C * taps;
    float* const to = op.sample_weights + i * C * taps;
    if (taps == 1) {
      for (int64_t c = 0; c < C; ++c) to[c] = s * from[c] + row[c];
    } else {
      for (int64_t j = 0; j < C * taps; ++j) to[j] = s * from[j];
      for (int64_t c = 0; c < C; ++c) to[c * taps + taps / 2] += row[c];
    }
    op.shifts[i] = row[C] + (op.bias ? s * op.bias[o] : 0.0f) + (op.shift ? op.shift[o] : 0.0f);
  }
}

inline DcdConvKernels dcd_conv_kernels() {
  return {pool_inputs,   squeeze,   gate, factors,       subsample,
          fuse_channels, fold_base, fold, sample_weights};
}

}  // namespace timm_dynamic::ISA
