// What the kernels for both layouts share: bands of rows in scratch. Included once per instruction
// set, after common/vectors.h.

namespace timm_dynamic::ISA {

// The layout of a band in scratch. Position (y, x), relative to the band, is at
// `origin + y*pitch + x`.
struct Band {
  int64_t pad, pitch, halo, origin, plane, vectors;

  Band(int64_t halo, int64_t pad, int64_t columns, int64_t band_rows, int64_t lanes)
      : pad(pad), pitch(columns + pad), halo(halo) {
    origin = ceil_div(halo * pitch + pad, lanes) * lanes;  // aligned
    // With slack for the last row's padding and whole vectors. An odd number of vectors, so that
    // one position of consecutive planes falls into different cache sets.
    const int64_t elements = origin + (band_rows + halo) * pitch + pad + 2 * lanes;
    plane = (ceil_div(elements, lanes) | 1) * lanes;
    vectors = ceil_div(band_rows * pitch - pad, lanes);
  }
  // The positions from the first to the last of some rows.
  int64_t span(Range rows) const { return (rows.end - rows.begin) * pitch - pad; }
};

template <typename A>
struct Scratch {
  std::unique_ptr<char[]> memory;  // zeroed: padding is never written
  A* next;

  explicit Scratch(int64_t elements) : memory(new char[elements * sizeof(A) + 64]()) {
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    next = reinterpret_cast<A*>((address + 63) / 64 * 64);
  }
  A* take(int64_t elements) {
    next += elements;
    return next - elements;
  }
};

// The rows of a map as large as the output, with their halo; zeros outside the map.
template <typename A, typename T>
void load_map(A* to, const Band& band, const T* from, int64_t stride_y, int64_t stride_x,
              Range rows, int64_t map_rows, int64_t columns) {
  const int64_t first = rows.begin - band.halo, last = rows.end + band.halo;
  const int64_t inner = std::clamp<int64_t>(0, first, last);
  const int64_t end = std::clamp(map_rows, inner, last);
  to += band.origin - band.halo * band.pitch;
  for (int64_t y = first; y < inner; ++y, to += band.pitch) zero_row(to, columns);
  load_rows(to, band.pitch, from + inner * stride_y, stride_y, stride_x, end - inner, columns);
  to += (end - inner) * band.pitch;
  for (int64_t y = end; y < last; ++y, to += band.pitch) zero_row(to, columns);
}

// The rows of a map enlarged `times` in both directions, likewise.
template <typename A, typename T>
void load_enlarged(A* to, const Band& band, const T* from, int64_t stride_y, int64_t stride_x,
                   Range rows, int64_t map_rows, int64_t columns, int64_t times) {
  for (int64_t y = rows.begin - band.halo; y < rows.end + band.halo; ++y) {
    A* const row = to + band.origin + (y - rows.begin) * band.pitch;
    if (y < 0 || y >= map_rows) {
      zero_row(row, columns);
    } else if (y % times != 0 && y > rows.begin - band.halo) {
      std::copy_n(row - band.pitch, columns, row);
    } else {
      const T* const at = from + y / times * stride_y;
      for (int64_t x = 0; x < columns; x += times)
        std::fill_n(row + x, times, static_cast<A>(at[x / times * stride_x]));
    }
  }
}

// f(i, p + i*step) for i < N, 1, 4 or 8, in few registers: two pointers, and steps of one to three.
template <int N, typename T, typename F>
INLINE void load_each(const T* p, int64_t step, const F& f) {
  f(0, p);
  if constexpr (N > 1) {
    const int64_t twice = 2 * step, thrice = 3 * step;
    f(1, p + step), f(2, p + twice), f(3, p + thrice);
    if constexpr (N > 4) {
      const T* const q = p + 4 * step;
      f(4, q), f(5, q + step), f(6, q + twice), f(7, q + thrice);
    }
  }
}

template <Combine COMBINE, typename V>
INLINE V combine(V channel, V spatial) {
  if constexpr (COMBINE == Combine::kMultiply) return channel * spatial;
  if constexpr (COMBINE == Combine::kAdd) return channel + spatial;
  return spatial;
}

// A product of gradient and input as it counts for one factor of the filter, beside the other.
template <Combine COMBINE, typename V, typename F>
INLINE V weighted(V product, F other) {
  if constexpr (COMBINE == Combine::kMultiply) return product * other;
  return product;
}

// The gradient of tap k of the spatial filter in a band, `from` rows `pitch` apart, to the partial
// sums: copied, or summed over what is broadcast.
template <typename A, typename T>
void flush_tap(const A* from, int64_t pitch, const DdfBackward<T>& op, int64_t b, int64_t band,
               int64_t block, int64_t g, int64_t k) {
  const Range rows = op.bands.of(band, op.shape.Ho);
  const int64_t columns = op.partial_columns(), plane = op.partial_rows() * columns;
  A* const to = op.spatial_sums(b, block, g) + k * plane;
  if (op.broadcast_rows) std::fill_n(to + band * columns, columns, A(0));
  for (int64_t y = rows.begin; y < rows.end; ++y, from += pitch) {
    A* const row = to + (op.broadcast_rows ? band : y) * columns;
    if (!op.broadcast_rows) std::fill_n(row, columns, A(0));
    for (int64_t x = 0; x < op.shape.Wo; ++x) row[op.broadcast_columns ? 0 : x] += from[x];
  }
}

}  // namespace timm_dynamic::ISA
