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
template <typename T, int CHANNELS, bool WHOLE>
INLINE void sum_vectors(T* out, int64_t out_step, const Accumulator<T>* map, int64_t map_step,
                        const T* filter, int64_t next, const std::vector<DirectTap>& taps,
                        int64_t n) {
  using A = Accumulator<T>;
  Vec<A> sums[CHANNELS] = {};
  for (const DirectTap& tap : taps) {
    // Many planes of filters are read at once, which the processor does not foresee.
    __builtin_prefetch(filter + tap.filter + next);
    const Vec<A> f = load<A>(filter + tap.filter, WHOLE ? kLanes<A> : n);
    load_each<CHANNELS>(map + tap.map, map_step,
                        [&](int c, const A* p) { sums[c] += f * load<A>(p); });
  }
#pragma GCC unroll 8
  for (int c = 0; c < CHANNELS; ++c) store<A>(out + c * out_step, sums[c], n);
}

// Columns [0, columns) of a row; `next` filters on is the one below. Filters up to `end` can be
// read: those behind the row's last are multiplied, too, and the products dropped.
template <typename T, int CHANNELS>
INLINE void sum_row(T* out, int64_t out_step, const Accumulator<T>* map, int64_t map_step,
                    const T* filter, int64_t next, const T* end, const std::vector<DirectTap>& taps,
                    int64_t columns) {
  constexpr int64_t kStep = kLanes<Accumulator<T>>;
  for (int64_t x = 0; x < columns; x += kStep) {
    const bool whole = end - (filter + x + taps.back().filter) >= kStep;
    const auto sum = whole ? sum_vectors<T, CHANNELS, true> : sum_vectors<T, CHANNELS, false>;
    sum(out + x, out_step, map + x, map_step, filter + x, next, taps, columns - x);
  }
}

// The units of `forward_planes`.
template <typename T>
void forward_rows(const DdfForward<T>& op, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const DdfShape& s = op.shape;
  const SpatialFilterStrides& filter = op.spatial_strides;
  if (filter.x != 1) return forward_planes<T, Combine::kAlone>(op, begin, end);
  const MapStrides &from = op.features_strides, &to = op.out_strides;
  const int64_t members = s.members(), lanes = kLanes<A>;
  const int64_t pitch = ceil_div(s.Wo + op.columns.reach, lanes) * lanes;
  const Band layout(op.rows.reach, pitch - s.Wo, s.Wo, op.bands.rows, lanes);
  const FlatTaps flat(op.rows, op.columns, layout, s.K);
  std::vector<DirectTap> taps;
  for (const FlatTap& tap : flat.output) taps.push_back({tap.k * filter.k, tap.distance});
  const int64_t input_size = flat.input.size() * layout.plane, group = 8;
  Scratch<A> scratch(group * input_size);
  A* const input = scratch.take(group * input_size);
  const T* const last = op.spatial_filter + (s.B - 1) * filter.b + (s.groups - 1) * filter.g +
                        (s.taps() - 1) * filter.k + (s.Ho - 1) * filter.y + s.Wo;
  for (int64_t unit = begin; unit < end;) {
    const int64_t member = unit % members, g = unit / members % s.groups;
    const int64_t band = unit / s.C % op.bands.count, b = unit / s.C / op.bands.count;
    const int64_t n = std::min({group, members - member, end - unit});
    const int64_t first = s.channel(g) + member * s.inner;
    const Range rows = op.bands.of(band, s.Ho);
    for (int64_t i = 0; i < n; ++i)
      load_input(input + i * input_size, layout,
                 op.features + b * from.b + (first + i * s.inner) * from.c, from.y, from.x, rows,
                 op.rows, op.columns, s.upsample);
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const T* const filters = op.spatial_filter + b * filter.b + g * filter.g + y * filter.y;
      const A* const map = input + layout.origin + (y - rows.begin) * layout.pitch;
      T* const out = op.out + b * to.b + first * to.c + y * to.y;
      const int64_t step = s.inner * to.c;
      int64_t i = 0;
      const auto run = [&](auto size) {
        constexpr int kChannels = decltype(size)::value;
        for (; i + kChannels <= n; i += kChannels)
          sum_row<T, kChannels>(out + i * step, step, map + i * input_size, input_size, filters,
                                filter.y, last, taps, s.Wo);
      };
      run(std::integral_constant<int, 8>());
      run(std::integral_constant<int, 4>());
      run(std::integral_constant<int, 1>());
    }
    unit += n;
  }
}

}  // namespace timm_dynamic::ISA
