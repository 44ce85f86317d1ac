// CPU kernels of channel_fusion.cpp, for one instruction set; see common/vectors.h for what the
// includer defines.

#include "channel_fusion/strips.h"

namespace timm_dynamic::ISA {

// Rows [row, row + rows) of a sample's result at `count` <= kWidth vectors of positions, to out;
// x is [C + L, kWidth vectors].
template <int kWidth>
INLINE void scaled_strip(const Products& op, int64_t b, int64_t row, int64_t rows, const float* x,
                         float* out, int64_t count) {
  const float* matrix[kOutputs];
  take_rows(matrix, op.weight + b * op.weight_stride + row * op.C, rows, op.C);
  Sums<kWidth> sums = {};
  accumulate<kWidth>(sums, matrix, op.C, x);
  const auto at = [&](int64_t r) { return row + std::min(r, rows - 1); };
  if (op.out_scale)
    for (int64_t r = 0; r < kOutputs; ++r)
      for (int v = 0; v < kWidth; ++v)
        sums[r][v] *= broadcast(op.out_scale[b * op.out_scale_stride + at(r)]);
  if (op.L) {
    take_rows(matrix, op.p + row * op.L, rows, op.L);
    accumulate<kWidth>(sums, matrix, op.L, x + op.C * kWidth * kLanes<float>);
  }
  const Vec<float> low = broadcast(op.low), high = broadcast(op.high);
  for (int64_t r = 0; r < rows; ++r, out += op.positions) {
    const Vec<float> shift = broadcast(op.shift ? op.shift[b * op.shift_stride + row + r] : 0.0f);
    for (int v = 0; v < kWidth; ++v) {
      Vec<float> y = sums[r][v] + shift;
      y = y < low ? low : y;  // NaN stays NaN
      y = y > high ? high : y;
      store<float>(out + v * kLanes<float>, y, count - v * kLanes<float>);
    }
  }
}

// The same at few positions; x is [count, C + L].
INLINE void scaled_singles(const Products& op, int64_t b, int64_t row, int64_t rows, const float* x,
                           float* out, int64_t count) {
  for (int64_t r = row; r < row + rows; ++r, out += op.positions) {
    const float* const weight = op.weight + b * op.weight_stride + r * op.C;
    for (int64_t i = 0; i < count; ++i) {
      const float* const column = x + i * (op.C + op.L);
      float y = dot(weight, column, op.C);
      if (op.out_scale) y *= op.out_scale[b * op.out_scale_stride + r];
      if (op.L) y += dot(op.p + r * op.L, column + op.C, op.L);
      if (op.shift) y += op.shift[b * op.shift_stride + r];
      y = y < op.low ? op.low : y;
      out[i] = y > op.high ? op.high : y;
    }
  }
}

// Units are (part of the outputs, sample, block of positions).
inline void scaled_products(const Products& op, int64_t begin, int64_t end) {
  const int64_t depth = op.C + op.L, groups = (op.O + kOutputs - 1) / kOutputs;
  const int64_t padded = (op.block + kStrip - 1) / kStrip * kStrip;
  const auto packed = std::make_unique_for_overwrite<float[]>(depth * padded);
  int64_t packed_unit = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t unit = i / op.parts, part = i % op.parts, b = unit / op.blocks;
    const int64_t first = unit % op.blocks * op.block;
    const int64_t count = std::min(op.block, op.positions - first);
    if (packed_unit != unit) {
      pack_rows(op.x + b * op.C * op.positions + first, op.positions,
                op.in_scale ? op.in_scale + b * op.C : nullptr, op.C, 0, depth, count,
                packed.get());
      if (op.L)
        pack_rows(op.v + b * op.L * op.positions + first, op.positions, nullptr, op.L, op.C, depth,
                  count, packed.get());
      packed_unit = unit;
    }
    const int64_t last = std::min((part + 1) * groups / op.parts * kOutputs, op.O);
    for (int64_t row = part * groups / op.parts * kOutputs; row < last; row += kOutputs)
      strips(count, [&](int64_t at, int64_t n, int vectors) {
        const auto run = vectors == 3   ? scaled_strip<3>
                         : vectors == 2 ? scaled_strip<2>
                         : vectors == 1 ? scaled_strip<1>
                                        : scaled_singles;
        run(op, b, row, std::min(kOutputs, last - row), packed.get() + at * depth,
            op.out + (b * op.O + row) * op.positions + first + at, n);
      });
  }
}

// Adds maps . columns to rows [begin, end) of `sum`, [*, pitch], `width` columns of it; columns is
// [positions, kWidth vectors]. `scale`, `weight` and `dscale` are null, or those of the rows: what
// is added is then scaled, and its products with the weight go to dscale.
template <int kWidth>
INLINE void add_grads(const float* maps, const float* columns, int64_t positions, int64_t begin,
                      int64_t end, float* sum, int64_t pitch, int64_t width, const float* scale,
                      const float* weight, float* dscale) {
  for (int64_t row = begin; row < end; row += kOutputs) {
    const int64_t rows = std::min(kOutputs, end - row);
    const float* matrix[kOutputs];
    take_rows(matrix, maps + row * positions, rows, positions);
    Sums<kWidth> sums = {};
    accumulate<kWidth>(sums, matrix, positions, columns);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * pitch;
      const Vec<float> factor = broadcast(scale ? scale[row + r] : 1.0f);
      Vec<float> products = {};
      for (int v = 0; v < kWidth; ++v) {
        const int64_t skip = v * kLanes<float>, n = width - skip;
        if (weight) products += load<float>(weight + at + skip, n) * sums[r][v];
        store<float>(sum + at + skip, load<float>(sum + at + skip, n) + factor * sums[r][v], n);
      }
      if (weight) dscale[row + r] += sum_lanes(products);
    }
  }
}

// Units are (part of the columns, part of the rows).
inline void scaled_grads(const ProductGrads& op, int64_t begin, int64_t end) {
  constexpr int64_t n = kLanes<float>;
  const auto vectors_of = [](int64_t width) { return (width + n - 1) / n; };
  const auto packed = std::make_unique_for_overwrite<float[]>(op.positions * kStrip);
  const int64_t total = vectors_of(op.C) + vectors_of(op.L);
  const auto part_of = [&](int64_t rows, int64_t part) {
    return std::min((rows + kOutputs - 1) / kOutputs * part / op.row_parts * kOutputs, rows);
  };
  for (int64_t i = begin; i < end; ++i) {
    const int64_t part = i / op.row_parts, row_part = i % op.row_parts;
    const int64_t first = part_of(op.O, row_part), last = part_of(op.O, row_part + 1);
    const int64_t first_l = part_of(op.L, row_part), last_l = part_of(op.L, row_part + 1);
    for (int64_t b = 0; b < op.B; ++b) {
      const float* const grad = op.grad + b * op.O * op.positions;
      const float* const dz = op.dz + b * op.L * op.positions;
      float* const dscale = op.dscale + (part * op.B + b) * op.O;
      int64_t number = 0;  // of vectors before a strip
      const auto each_strip = [&](int64_t width, const float* maps, const auto& f) {
        for (int64_t at = 0, left = vectors_of(width); left > 0;) {
          const int64_t vectors = strip_vectors(left), count = std::min(vectors * n, width - at);
          if (number * op.parts / total == part) {
            copy_transposed<true>(packed.get(), vectors * n, maps + at * op.positions, op.positions,
                                  1, count, op.positions);
            if (vectors == 3) f.template operator()<3>(at, count);
            if (vectors == 2) f.template operator()<2>(at, count);
            if (vectors == 1) f.template operator()<1>(at, count);
          }
          number += vectors, left -= vectors, at += vectors * n;
        }
      };
      each_strip(op.C, op.x + b * op.C * op.positions, [&]<int kWidth>(int64_t c, int64_t count) {
        add_grads<kWidth>(grad, packed.get(), op.positions, first, last, op.dweight + c, op.C,
                          count, op.scale + b * op.O, op.weight + c, dscale);
        add_grads<kWidth>(dz, packed.get(), op.positions, first_l, last_l, op.dq + c, op.C, count,
                          nullptr, nullptr, nullptr);
      });
      each_strip(op.L, op.v + b * op.L * op.positions, [&]<int kWidth>(int64_t l, int64_t count) {
        add_grads<kWidth>(grad, packed.get(), op.positions, first, last, op.dp + l, op.L, count,
                          nullptr, nullptr, nullptr);
      });
    }
  }
}

inline ProductKernels product_kernels() {
  return {scaled_products, scaled_grads, kStrip, kOutputs, kLanes<float>};
}

}  // namespace timm_dynamic::ISA
