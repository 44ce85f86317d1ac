// dynamic_filter without channel filters on channels_last tensors, where neighbouring channels
// share a filter. Included once per instruction set, after bands.h.
//
// Some channels of some rows are copied to scratch, pixel after pixel with zeros around them: in
// the tensor the pixels of a group lie so far apart that they share few sets of the cache. A vector
// of channels is multiplied by one filter value, read where it lies. Neighbouring pixels, which
// read almost the same input, are worked on together: each input is loaded once a row of taps.

namespace timm_dynamic::ISA {

// What the pixels of an output row read: `map` and `filter` are those of pixel 0 and tap (0, 0).
template <typename T>
struct DirectRow {
  const Accumulator<T>* map;
  const T* filter;
  int64_t step;                 // of the map, from one pixel to the next
  int64_t map_row, map_column;  // from one row or column of taps to the next
  int64_t filter_x, filter_y, filter_k;
  int64_t K, channels;
};

// Channels that are in scratch together.
template <typename A>
constexpr int64_t kTwo = 2 * kLanes<A>;

// PIXELS neighbouring pixels from x, of a stride and dilation of 1.
template <typename T, int K, int PIXELS>
void sum_window(T* out, int64_t out_step, const DirectRow<T>& in, int64_t x) {
  using A = Accumulator<T>;
  Vec<A> sums[PIXELS][2] = {};
  for (int64_t ky = 0; ky < K; ++ky) {
    const A* const map = in.map + x * kTwo<A> + ky * in.map_row;
    const T* const filter = in.filter + x * in.filter_x + ky * K * in.filter_k;
    // Many filters are read at once, which the processor does not foresee.
    for (int i = 0; i < (in.filter_k == 1 ? PIXELS : K); ++i)
      __builtin_prefetch(filter + in.filter_y + i * (in.filter_k == 1 ? in.filter_x : in.filter_k));
#pragma GCC unroll 16
    for (int i = 0; i < PIXELS + K - 1; ++i) {
      const Vec<A> a = load<A>(map + i * kTwo<A>), b = load<A>(map + i * kTwo<A> + kLanes<A>);
#pragma GCC unroll 8
      for (int p = 0; p < PIXELS; ++p) {
        if (p > i || i - p >= K) continue;
        const Vec<A> f = broadcast(static_cast<A>(filter[p * in.filter_x + (i - p) * in.filter_k]));
        sums[p][0] += f * a, sums[p][1] += f * b;
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < PIXELS; ++p) {
    store<A>(out + p * out_step, sums[p][0], in.channels);
    store<A>(out + p * out_step + kLanes<A>, sums[p][1], in.channels - kLanes<A>);
  }
}

// One pixel. Even and odd taps have sums of their own: one sum would wait for itself.
template <typename T>
void sum_pixel(T* out, const DirectRow<T>& in, int64_t x) {
  using A = Accumulator<T>;
  Vec<A> sums[2][2] = {};
  for (int64_t ky = 0; ky < in.K; ++ky) {
    const A* map = in.map + x * in.step + ky * in.map_row;
    const T* filter = in.filter + x * in.filter_x + ky * in.K * in.filter_k;
    for (int64_t kx = 0; kx < in.K; kx += 2) {  // K is odd
      const Vec<A> f = broadcast(static_cast<A>(filter[kx * in.filter_k]));
      sums[0][0] += f * load<A>(map), sums[0][1] += f * load<A>(map + kLanes<A>);
      if (kx + 1 == in.K) break;
      const Vec<A> g = broadcast(static_cast<A>(filter[(kx + 1) * in.filter_k]));
      map += in.map_column;
      sums[1][0] += g * load<A>(map), sums[1][1] += g * load<A>(map + kLanes<A>);
      map += in.map_column;
    }
  }
  store<A>(out, sums[0][0] + sums[1][0], in.channels);
  store<A>(out + kLanes<A>, sums[0][1] + sums[1][1], in.channels - kLanes<A>);
}

// Pixels that are worked on together.
constexpr int kWindow = 6;

template <typename T>
using Window = void (*)(T*, int64_t, const DirectRow<T>&, int64_t);

// Null where pixels are taken one after the other.
template <typename T>
Window<T> window_of(const DdfShape& s) {
  if (s.stride == 1 && s.dilation == 1 && s.Wo >= kWindow) {
    if (s.K == 3) return sum_window<T, 3, kWindow>;
    if (s.K == 5) return sum_window<T, 5, kWindow>;
    if (s.K == 7) return sum_window<T, 7, kWindow>;
  }
  return nullptr;
}

template <typename T>
void direct_row(T* out, int64_t out_step, const DirectRow<T>& in, int64_t columns,
                Window<T> window) {
  int64_t x = 0;
  if (window) {
    for (; x < columns; x += kWindow) {
      const int64_t first = std::min(x, columns - kWindow);  // the last one overlaps
      window(out + first * out_step, out_step, in, first);
    }
  }
  for (; x < columns; ++x) sum_pixel(out + x * out_step, in, x);
}

// The scratch of `rows` output rows.
template <typename A>
struct DirectScratch {
  int64_t halo, left, width, rows;

  explicit DirectScratch(const DdfShape& s) {
    constexpr int64_t kBytes = 192 << 10;
    halo = (s.K - 1) * s.dilation, left = s.K / 2 * s.dilation;
    width = (s.Wo - 1) * s.stride + 1 + halo;
    const int64_t fit = kBytes / (width * kTwo<A> * sizeof(A)) - halo - 1;
    rows = std::clamp<int64_t>(fit / s.stride + 1, std::min<int64_t>(s.Ho, 4), s.Ho);
  }
  int64_t row() const { return width * kTwo<A>; }
  int64_t size(int64_t stride) const { return ((rows - 1) * stride + 1 + halo) * row(); }
};

// n channels from `from`, of the pixels that output rows read; what is outside the map stays zero.
template <typename A, typename T>
void load_pixels(A* to, const DirectScratch<A>& layout, const T* from, const MapStrides& stride,
                 const DdfShape& s, Range rows, int64_t n) {
  const int64_t top = rows.begin * s.stride - layout.left;
  const int64_t count = (rows.end - rows.begin - 1) * s.stride + 1 + layout.halo;
  const int64_t columns = std::min(s.W, layout.width - layout.left);
  for (int64_t r = 0; r < count; ++r, to += layout.row()) {
    const int64_t y = top + r;
    if (y < 0 || y >= s.H) {
      std::fill_n(to, layout.row(), A(0));
      continue;
    }
    A* pixel = to + layout.left * kTwo<A>;
    for (int64_t x = 0; x < columns; ++x, pixel += kTwo<A>) {
      const T* const at = from + y * stride.y + x * stride.x;
      store<A>(pixel, load<A>(at, n));
      store<A>(pixel + kLanes<A>, load<A>(at + kLanes<A>, n - kLanes<A>));
    }
  }
}

// The units of `forward_pixels`.
template <typename T>
void forward_direct(const DdfForward<T>& op, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const DdfShape& s = op.shape;
  const MapStrides &from = op.features_strides, &to = op.out_strides;
  const SpatialFilterStrides& filter = op.spatial_strides;
  if (s.is_sparse()) return forward_pixels<T, Combine::kAlone>(op, begin, end);
  const DirectScratch<A> layout(s);
  Scratch<A> scratch(layout.size(s.stride));
  A* const map = scratch.take(layout.size(s.stride));
  const Window<T> window = window_of<T>(s);
  for (int64_t unit = begin; unit < end;) {
    const int64_t y = unit % s.Ho, g = unit / s.Ho % s.groups, b = unit / s.Ho / s.groups;
    const Range rows{y, y + std::min({layout.rows, s.Ho - y, end - unit})};
    for (int64_t first = 0; first < s.members(); first += kTwo<A>) {
      const int64_t c = s.channel(g) + first, n = std::min(kTwo<A>, s.members() - first);
      load_pixels(map, layout, op.features + b * from.b + c * from.c, from, s, rows, n);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const DirectRow<T> in{map + (row - rows.begin) * s.stride * layout.row(),
                              op.spatial_filter + b * filter.b + g * filter.g + row * filter.y,
                              s.stride * kTwo<A>,
                              s.dilation * layout.row(),
                              s.dilation * kTwo<A>,
                              filter.x,
                              filter.y,
                              filter.k,
                              s.K,
                              n};
        direct_row(op.out + b * to.b + row * to.y + c * to.c, to.x, in, s.Wo, window);
      }
    }
    unit += rows.end - rows.begin;
  }
}

}  // namespace timm_dynamic::ISA
