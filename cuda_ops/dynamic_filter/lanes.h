// dynamic_filter on channels_last tensors, where neighbouring channels read different filters.
// Included once per instruction set, after pixels.h.
//
// A vector holds one channel of each of several groups, so it is multiplied by a vector of filter
// values, which the other channels of these groups, `inner` apart, share. The filters are
// rearranged to [pixel][part][tap][lane], where that is not done in registers, the channel filters
// to [tap][channel]; maps are read in place.

namespace timm_dynamic::ISA {

// The layout of the filters of rows of pixels in scratch.
struct FilterRows {
  int64_t lanes, part, pixel, row;  // elements of a tap, a part, a pixel, a row

  template <typename T>
  explicit FilterRows(const DdfOperands<T>& op) {
    constexpr int64_t kStep = kLanes<Accumulator<T>>;
    const DdfShape& s = op.shape;
    lanes = ceil_div(s.inner, kStep) * kStep;
    part = op.live_taps() * lanes;
    pixel = s.groups / s.inner * part;
    row = s.Wo * pixel;
  }
};

// Asks for rows of n elements each: there are too many for the processor to foresee.
template <typename T>
INLINE void prefetch_rows(const T* from, int64_t step, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i, from += step)
    for (int64_t x = 0; x < n; x += 64 / sizeof(T)) __builtin_prefetch(from + x);
}

// The filters of outputs [x, x + n) of row y.
template <typename A, typename T>
void load_filters(A* to, const FilterRows& layout, const DdfOperands<T>& op, int64_t b, int64_t y,
                  int64_t x, int64_t n) {
  const DdfShape& s = op.shape;
  const SpatialFilterStrides& stride = op.spatial_strides;
  const T* from = op.spatial_filter + b * stride.b + y * stride.y + x * stride.x;
  const int64_t parts = s.groups / s.inner, part_stride = s.inner * stride.g;
  const bool whole = stride.k == 1 && op.live_taps() == s.taps();
  for (int64_t part = 0; part < parts; ++part, from += part_stride, to += layout.part) {
    if (whole) {
      for (int64_t i = 0; i < n; ++i)
        copy_transposed<true>(to + i * layout.pixel, layout.lanes, from + i * stride.x, stride.g, 1,
                              s.inner, s.taps());
      continue;
    }
    A* tap = to;
    for (const Shift& row : op.rows.shifts) {
      for (const Shift& column : op.columns.shifts) {
        const T* const k = from + (row.tap * s.K + column.tap) * stride.k;
        prefetch_rows(k + stride.y, stride.g, s.inner, stride.x == 1 ? n : 0);
        copy_transposed<true>(tap, layout.pixel, k, stride.g, stride.x, s.inner, n);
        tap += layout.lanes;
      }
    }
  }
}

// An image's channel filters as [live tap][channel].
template <typename A, typename T>
void load_channel_rows(A* to, const DdfOperands<T>& op, int64_t b) {
  if (op.shape.alone) return;
  const ChannelFilterStrides& stride = op.channel_strides;
  for (const Shift& row : op.rows.shifts) {
    for (const Shift& column : op.columns.shifts) {
      const T* const from =
          op.channel_filter + b * stride.b + row.tap * stride.ky + column.tap * stride.kx;
      for (int64_t c = 0; c < op.shape.C; ++c) to[c] = static_cast<A>(from[c * stride.c]);
      to += op.shape.C;
    }
  }
}

// Elements of scratch for that, with a vector's slack.
template <typename T>
int64_t channel_rows_size(const DdfOperands<T>& op) {
  return op.live_taps() * op.shape.C + kLanes<Accumulator<T>>;
}

// How results of a row read the map, and the filters in scratch.
template <typename T>
struct LanesInput {
  const T* map;
  int64_t step;  // of the map, from one result to the next
  const Accumulator<T>*filter, *channel;
  FilterRows layout;
  int64_t C, members, inner;
};

// out[m][i] = sum_j (channel_j[m][i] o filter_j[i]) * map_j[m][i] for MEMBERS channels of n groups.
template <typename T, Combine COMBINE, int MEMBERS, bool WHOLE>
INLINE void sum_members(T* out, const T* map, const Accumulator<T>* filter,
                        const Accumulator<T>* channel, const LanesInput<T>& in, const RowTap* taps,
                        int64_t count, int64_t n) {
  using A = Accumulator<T>;
  if (WHOLE) n = kLanes<A>;
  Vec<A> sums[MEMBERS] = {};
  for (int64_t j = 0; j < count; ++j) {
    const Vec<A> f = load<A>(filter + taps[j].filter);
    if constexpr (COMBINE == Combine::kAlone) {
      load_each<MEMBERS>(map + taps[j].map, in.inner,
                         [&](int m, const T* p) { sums[m] += f * load<A>(p, n); });
    } else {
      const T* const at = map + taps[j].map;
      const A* const c = channel + taps[j].slot * in.C;
#pragma GCC unroll 8
      for (int m = 0; m < MEMBERS; ++m)
        sums[m] += combine<COMBINE>(load<A>(c + m * in.inner), f) * load<A>(at + m * in.inner, n);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MEMBERS; ++m) store<A>(out + m * in.inner, sums[m], n);
}

template <typename T, Combine COMBINE, bool WHOLE>
INLINE void sum_lanes_of(T* out, const T* map, const Accumulator<T>* filter,
                         const Accumulator<T>* channel, const LanesInput<T>& in, const RowTap* taps,
                         int64_t count, int64_t n) {
  int64_t m = 0;
  const auto run = [&](auto size) {
    constexpr int kMembers = decltype(size)::value;
    for (; m + kMembers <= in.members; m += kMembers)
      sum_members<T, COMBINE, kMembers, WHOLE>(out + m * in.inner, map + m * in.inner, filter,
                                               channel + m * in.inner, in, taps, count, n);
  };
  run(std::integral_constant<int, 8>());
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 1>());
}

// Results [x, x + pixels) of a row, which have the same taps; `filter_step` from one to the next.
template <typename T, Combine COMBINE>
void sum_pixels(T* out, int64_t out_step, const LanesInput<T>& in, const std::vector<RowTap>& taps,
                int64_t x, int64_t pixels) {
  constexpr int64_t kStep = kLanes<Accumulator<T>>;
  const int64_t count = taps.size(), size = in.members * in.inner;
  for (int64_t p = x; p < x + pixels; ++p, out += out_step) {
    const T* const map = in.map + p * in.step;
    const Accumulator<T>* const filter = in.filter + p * in.layout.pixel;
    for (int64_t c = 0, part = 0; c < in.C; c += size, part += in.layout.part) {
      for (int64_t i = 0; i < in.inner; i += kStep) {
        const auto sum = i + kStep <= in.inner ? sum_lanes_of<T, COMBINE, true>
                                               : sum_lanes_of<T, COMBINE, false>;
        sum(out + c + i, map + c + i, filter + part + i, in.channel + c + i, in, taps.data(), count,
            in.inner - i);
      }
    }
  }
}

// out[m] = sum_j filter_j * map_j[at + m] for all channels of n groups, whose filters of nine taps,
// `step` apart, are transposed in registers.
template <typename T, bool WHOLE>
INLINE void sum_nine(T* out, const T* const* maps, int64_t at, const T* filter, int64_t step,
                     const LanesInput<T>& in, int64_t n) {
  using A = Accumulator<T>;
  constexpr int64_t kStep = kLanes<A>;
  if (WHOLE) n = kStep;
  A rows[9 * kStep];
  copy_strip<WHOLE>(rows, kStep, filter, step, n, 9, kStep);
  Vec<A> filters[9];
#pragma GCC unroll 9
  for (int j = 0; j < 9; ++j) filters[j] = load<A>(rows + j * kStep);
  for (const int64_t end = at + in.members * in.inner; at < end; at += in.inner, out += in.inner) {
    Vec<A> sum = {};
#pragma GCC unroll 9
    for (int j = 0; j < 9; ++j) sum += filters[j] * load<A>(maps[j] + at, n);
    store<A>(out, sum, n);
  }
}

// Results [x, x + pixels) of a row with nine taps, which are neighbours in memory. Filters are
// transposed while the results before them are summed: 1.04 times a depthwise convolution's time,
// 1.27 if a run's are first (8 x 128 x 56 x 56, 16 groups, AVX2, one thread, November 2026).
template <typename T>
void sum_nine_pixels(T* out, int64_t out_step, const LanesInput<T>& in, const RowTap* taps,
                     const T* filter, const SpatialFilterStrides& stride, int64_t x,
                     int64_t pixels) {
  constexpr int64_t kStep = kLanes<Accumulator<T>>;
  const T* maps[9];
  for (int j = 0; j < 9; ++j) maps[j] = in.map + taps[j].map;
  for (int64_t p = x; p < x + pixels; ++p, out += out_step) {
    const T* from = filter + p * stride.x;
    const int64_t size = in.members * in.inner, g = stride.g;
    for (int64_t c = 0; c < in.C; c += size, from += in.inner * g) {
      const int64_t at = p * in.step + c;
      int64_t i = 0;
      for (; i + kStep <= in.inner; i += kStep)
        sum_nine<T, true>(out + c + i, maps, at + i, from + i * g, g, in, kStep);
      if (i < in.inner)
        sum_nine<T, false>(out + c + i, maps, at + i, from + i * g, g, in, in.inner - i);
    }
  }
}

template <typename T, Combine COMBINE>
void forward_lanes(const DdfForward<T>& op, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const DdfShape& s = op.shape;
  const MapStrides &from = op.features_strides, &to = op.out_strides;
  const SpatialFilterStrides& stride = op.spatial_strides;
  const FilterRows layout(op);
  const int64_t size = kRun<A> * layout.pixel;  // the filters of a run, which stay in the cache
  Scratch<A> scratch(size + channel_rows_size(op));
  A *filters = scratch.take(size), *channel = scratch.take(channel_rows_size(op));
  std::vector<RowTap> taps;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t y = unit % s.Ho, b = unit / s.Ho;
    if (unit == begin || y == 0) load_channel_rows(channel, op, b);
    output_taps(taps, op, y, {0, layout.lanes, 0, layout.pixel});
    LanesInput<T> in{op.features + b * from.b,
                     s.stride * from.x,
                     filters,
                     channel,
                     layout,
                     s.C,
                     s.members(),
                     s.inner};
    T* const out = op.out + b * to.b + y * to.y;
    Runs<T> runs(taps, s.Wo);
    while (const auto* run = runs.next()) {
      if (COMBINE == Combine::kAlone && s.K == 3 && run->size() == 9 && stride.k == 1) {
        sum_nine_pixels(out + runs.x * to.x, to.x, in, run->data(),
                        op.spatial_filter + b * stride.b + y * stride.y, stride, runs.x,
                        runs.pixels);
        continue;
      }
      load_filters(filters, layout, op, b, y, runs.x, runs.pixels);
      in.filter = filters - runs.x * layout.pixel;
      sum_pixels<T, COMBINE>(out + runs.x * to.x, to.x, in, *run, runs.x, runs.pixels);
    }
  }
}

}  // namespace timm_dynamic::ISA
