// dynamic_filter without channel filters on NCHW tensors. Included once per instruction set, after
// planes.h.
//
// As there the input is copied to scratch with zeros around it, but rows begin at whole vectors, so
// that the filters, which several channels share, and the output can stay where they are.

namespace timm_dynamic::ISA {

// A live tap: where it is in the filters, and in scratch.
struct DirectTap {
  int64_t filter, map;
};

// n outputs of CHANNELS channels, `out_step` and `map_step` apart.
template <typename T, int CHANNELS>
INLINE void sum_vectors(T* out, int64_t out_step, const Accumulator<T>* map, int64_t map_step,
                        const T* filter, int64_t next, const std::vector<DirectTap>& taps,
                        int64_t n) {
  using A = Accumulator<T>;
  Vec<A> sums[CHANNELS] = {};
  for (const DirectTap& tap : taps) {
    // Many planes of filters are read at once, which the processor does not foresee.
    __builtin_prefetch(filter + tap.filter + next);
    const Vec<A> f = load<A>(filter + tap.filter, n);
    load_each<CHANNELS>(map + tap.map, map_step,
                        [&](int c, const A* p) { sums[c] += f * load<A>(p); });
  }
#pragma GCC unroll 8
  for (int c = 0; c < CHANNELS; ++c) store<A>(out + c * out_step, sums[c], n);
}

// Columns [0, columns) of a row; `next` filters on is the one below. The last vectors overlap.
template <typename T, int CHANNELS>
INLINE void sum_row(T* out, int64_t out_step, const Accumulator<T>* map, int64_t map_step,
                    const T* filter, int64_t next, const std::vector<DirectTap>& taps,
                    int64_t columns) {
  constexpr int64_t kStep = kLanes<Accumulator<T>>;
  if (columns < kStep)
    return sum_vectors<T, CHANNELS>(out, out_step, map, map_step, filter, next, taps, columns);
  for (int64_t x = 0; x < columns; x += kStep) {
    const int64_t at = std::min(x, columns - kStep);
    sum_vectors<T, CHANNELS>(out + at, out_step, map + at, map_step, filter + at, next, taps,
                             kStep);
  }
}

// The units of `forward_planes`.
template <typename T>
void forward_rows(const DdfForward<T>& op, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const DdfShape& s = op.shape;
  const SpatialFilterStrides& filter = op.spatial_strides;
  if (filter.x != 1) return forward_planes<T, Combine::kAlone>(op, begin, end);
  const MapStrides& to = op.out_strides;
  const int64_t pitch = ceil_div(s.Wo + op.columns.reach, kLanes<A>) * kLanes<A>;
  const Band layout(op.rows.reach, pitch - s.Wo, s.Wo, op.bands.rows, kLanes<A>);
  const FlatTaps flat(op.rows, op.columns, layout, s.K);
  std::vector<DirectTap> taps;
  for (const FlatTap& tap : flat.output) taps.push_back({tap.k * filter.k, tap.distance});
  const int64_t input_size = flat.input.size() * layout.plane, group = 8;
  Scratch<A> scratch(group * input_size);
  A* const input = scratch.take(group * input_size);
  const auto run = [&](int64_t b, int64_t g, int64_t first, int64_t n, Range rows, bool) {
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const T* const filters = op.spatial_filter + b * filter.b + g * filter.g + y * filter.y;
      const A* const map = input + layout.origin + (y - rows.begin) * layout.pitch;
      T* const out = op.out + b * to.b + first * to.c + y * to.y;
      const int64_t step = s.inner * to.c;
      int64_t i = 0;
      const auto sum = [&]<int CHANNELS>() {
        for (; i + CHANNELS <= n; i += CHANNELS)
          sum_row<T, CHANNELS>(out + i * step, step, map + i * input_size, input_size, filters,
                               filter.y, taps, s.Wo);
      };
      sum.template operator()<8>();
      sum.template operator()<4>();
      sum.template operator()<1>();
    }
  };
  each_channels(op, layout, input, input_size, group, begin, end, run);
}

}  // namespace timm_dynamic::ISA
