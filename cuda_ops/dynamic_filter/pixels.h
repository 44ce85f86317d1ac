// dynamic_filter on channels_last tensors, where neighbouring channels share a filter. Included
// once per instruction set, after bands.h.
//
// Vectors run along the channels, so the maps are read in place, whatever the stride; taps in the
// padding are left out. Work goes in runs of neighbouring pixels that have the same taps, one
// vector of channels after the other, so that channel filters and their gradients stay in registers
// for the whole run. The channel filter is rearranged, once per image, to
// [vector of channels][tap][lane].

namespace timm_dynamic::ISA {

// One tap along a row of results: result x reads the pixel at map + x*step and the filter value at
// filter + x, if x is in `valid`.
struct RowTap {
  int64_t map, filter;
  int64_t slot;  // index among the live taps
  Range valid;
};

// What the taps of a row index.
template <typename T>
struct RowInput {
  const T* map;
  int64_t step, next_row;  // of the map: from one result, or row of results, to the next
  const Accumulator<T>*filter, *channel;
  int64_t live_taps, channels;
};

// A run is at most a vector's lanes long.
template <typename A>
constexpr int kRun = kLanes<A>;

// TAPS of the taps of a run, gathered from the row.
template <typename T, int TAPS>
struct RunTaps {
  using A = Accumulator<T>;
  const T* maps[TAPS];
  int64_t channel[TAPS];  // offset in a vector's channel filters
  A filters[kRun<A>][TAPS];
  uintptr_t next_row;  // what the run below this one will be the first to read

  INLINE RunTaps(const RowInput<T>& in, const RowTap* taps, int64_t x, int64_t pixels) {
    int64_t last = taps[0].map;
    for (int j = 0; j < TAPS; ++j) {
      maps[j] = in.map + taps[j].map + x * in.step;
      channel[j] = taps[j].slot * kLanes<A>;
      last = std::max(last, taps[j].map);
    }
    for (int64_t p = 0; p < pixels; ++p)
      for (int j = 0; j < TAPS; ++j) filters[p][j] = in.filter[taps[j].filter + x + p];
    next_row = reinterpret_cast<uintptr_t>(in.map) + (last + x * in.step + in.next_row) * sizeof(T);
  }

  // A run goes through memory in jumps of a pixel, which the processor does not foresee well.
  INLINE void prefetch(int64_t offset, int64_t elements) const {
    constexpr int64_t kCacheLine = 64 / sizeof(T);
    for (int64_t i = offset; i < offset + elements; i += kCacheLine)
      __builtin_prefetch(reinterpret_cast<const void*>(next_row + i * sizeof(T)), 0, 2);
  }
};

// out[p][c] = sum_j (channel_j[c] o filter_j[p]) * map_j[p][c] for n channels of a run.
template <typename T, Combine COMBINE, int TAPS>
INLINE void sum_run_channels(T* out, int64_t out_step, const RunTaps<T, TAPS>& taps, int64_t step,
                             const Accumulator<T>* channel, int64_t pixels, int64_t first,
                             int64_t n) {
  using A = Accumulator<T>;
  Vec<A> c[TAPS];
  for (int j = 0; j < TAPS; ++j) c[j] = load<A>(channel + taps.channel[j]);
  for (int64_t p = 0; p < pixels; ++p) {
    Vec<A> sum = {};
#pragma GCC unroll 9
    for (int j = 0; j < TAPS; ++j)
      sum += combine<COMBINE>(c[j], broadcast(taps.filters[p][j])) *
             load<A>(taps.maps[j] + p * step + first, n);
    store<A>(out + p * out_step + first, sum, n);
  }
}

// The same for two vectors of channels, which share the filter values.
template <typename T, Combine COMBINE, int TAPS>
INLINE void sum_run_pair(T* out, int64_t out_step, const RunTaps<T, TAPS>& taps, int64_t step,
                         const Accumulator<T>* channel, int64_t vector, int64_t pixels,
                         int64_t first) {
  using A = Accumulator<T>;
  Vec<A> c[TAPS], d[TAPS];
  for (int j = 0; j < TAPS; ++j) {
    c[j] = load<A>(channel + taps.channel[j]);
    d[j] = load<A>(channel + vector + taps.channel[j]);
    order_pair<A, T>(c[j], d[j]);
  }
  for (int64_t p = 0; p < pixels; ++p) {
    taps.prefetch(p * step + first, 2 * kLanes<A>);
    Vec<A> sum_c = {}, sum_d = {};
#pragma GCC unroll 9
    for (int j = 0; j < TAPS; ++j) {
      const Vec<A> s = broadcast(taps.filters[p][j]);
      Vec<A> a, b;
      load_pair<A>(taps.maps[j] + p * step + first, a, b);
      sum_c += combine<COMBINE>(c[j], s) * a;
      sum_d += combine<COMBINE>(d[j], s) * b;
    }
    store_pair<A>(out + p * out_step + first, sum_c, sum_d);
  }
}

template <typename T, Combine COMBINE, int TAPS>
void sum_run(T* out, int64_t out_step, const RowInput<T>& in, const RowTap* row_taps, int64_t x,
             int64_t pixels) {
  constexpr int64_t kStep = kLanes<Accumulator<T>>;
  const RunTaps<T, TAPS> taps(in, row_taps, x, pixels);
  const int64_t step = in.step, channels = in.channels, vector = in.live_taps * kStep;
  const Accumulator<T>* channel = in.channel;
  int64_t first = 0;
  for (; first + 2 * kStep <= channels; first += 2 * kStep, channel += 2 * vector)
    sum_run_pair<T, COMBINE>(out, out_step, taps, step, channel, vector, pixels, first);
  for (; first + kStep <= channels; first += kStep, channel += vector)
    sum_run_channels<T, COMBINE>(out, out_step, taps, step, channel, pixels, first, kStep);
  if (first < channels)
    sum_run_channels<T, COMBINE>(out, out_step, taps, step, channel, pixels, first,
                                 channels - first);
}

// The same for any number of taps and up to PIXELS pixels, which share the loads of a tap.
template <typename T, Combine COMBINE, int PIXELS>
INLINE void sum_any_channels(T* out, int64_t out_step, const RowInput<T>& in, const RowTap* taps,
                             int64_t count, int64_t x, int64_t first, int64_t n) {
  using A = Accumulator<T>;
  const A* const channel = in.channel + first * in.live_taps;
  Vec<A> sums[PIXELS] = {};
  for (int64_t j = 0; j < count; ++j) {
    const Vec<A> c = load<A>(channel + taps[j].slot * kLanes<A>);
    const T* const map = in.map + taps[j].map + x * in.step + first;
    const A* const filter = in.filter + taps[j].filter + x;
#pragma GCC unroll 4
    for (int p = 0; p < PIXELS; ++p)
      sums[p] += combine<COMBINE>(c, broadcast(filter[p])) * load<A>(map + p * in.step, n);
  }
  for (int p = 0; p < PIXELS; ++p) store<A>(out + p * out_step + first, sums[p], n);
}

template <typename T, Combine COMBINE, int PIXELS>
void sum_any_taps(T* out, int64_t out_step, const RowInput<T>& in, const RowTap* taps,
                  int64_t count, int64_t x) {
  constexpr int64_t kStep = kLanes<Accumulator<T>>;
  int64_t first = 0;
  for (; first + kStep <= in.channels; first += kStep)
    sum_any_channels<T, COMBINE, PIXELS>(out, out_step, in, taps, count, x, first, kStep);
  if (first < in.channels)
    sum_any_channels<T, COMBINE, PIXELS>(out, out_step, in, taps, count, x, first,
                                         in.channels - first);
}

template <typename T, Combine COMBINE>
void sum_taps(T* out, int64_t out_step, const RowInput<T>& in, const std::vector<RowTap>& taps,
              int64_t x, int64_t pixels) {
  const RowTap* const first = taps.data();
  const int64_t count = taps.size();
  switch (count) {  // the inside, the border and the corners of a map for K = 3
    case 9:
      return sum_run<T, COMBINE, 9>(out, out_step, in, first, x, pixels);
    case 6:
      return sum_run<T, COMBINE, 6>(out, out_step, in, first, x, pixels);
    case 4:
      return sum_run<T, COMBINE, 4>(out, out_step, in, first, x, pixels);
  }
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4)
    sum_any_taps<T, COMBINE, 4>(out + p * out_step, out_step, in, first, count, x + p);
  for (; p < pixels; ++p)
    sum_any_taps<T, COMBINE, 1>(out + p * out_step, out_step, in, first, count, x + p);
}

// The runs of a row of n results, one after the other: those with all taps, and single
// results at the ends, which lack some.
template <typename T>
struct Runs {
  const std::vector<RowTap>& all;
  const int64_t n;
  Range inner;
  std::vector<RowTap> some;
  int64_t x = 0, pixels = 0;

  Runs(const std::vector<RowTap>& taps, int64_t n) : all(taps), n(n), inner{0, n} {
    for (const RowTap& tap : taps) {
      inner.begin = std::max(inner.begin, tap.valid.begin);
      inner.end = std::min(inner.end, tap.valid.end);
    }
  }
  // The taps of the next run [x, x + pixels); null at the end.
  const std::vector<RowTap>* next() {
    x += pixels;
    if (x >= n) return nullptr;
    if (inner.begin <= x && x < inner.end) {
      pixels = std::min<int64_t>(inner.end - x, kRun<Accumulator<T>>);
      return &all;
    }
    pixels = 1;
    some.clear();
    for (const RowTap& tap : all)
      if (tap.valid.begin <= x && x < tap.valid.end) some.push_back(tap);
    return &some;
  }
};

// Where the filters of outputs lie in scratch: live tap `slot` of output (y, x) at origin +
// slot*tap
// + y*row + x*pixel.
struct FilterPlace {
  int64_t origin, tap, row, pixel;
};

// How output row y reads the features.
template <typename T>
void output_taps(std::vector<RowTap>& to, const DdfOperands<T>& op, int64_t y,
                 const FilterPlace& place) {
  to.clear();
  int64_t slot = 0;
  for (const Shift& row : op.rows.shifts) {
    const bool inside = row.outputs.begin <= y && y < row.outputs.end;
    for (const Shift& column : op.columns.shifts) {
      if (inside)
        to.push_back({(y * op.rows.stride + row.shift) * op.features_strides.y +
                          column.shift * op.features_strides.x,
                      place.origin + slot * place.tap + y * place.row, slot, column.outputs});
      ++slot;
    }
  }
}

// How the pixels of a column phase of input row `input` read the output's gradient.
template <typename T>
void input_taps(std::vector<RowTap>& to, const DdfBackward<T>& op, int64_t input, int64_t phase,
                const FilterPlace& place) {
  to.clear();
  int64_t slot = 0;
  for (const Shift& row : op.rows.shifts) {
    const int64_t y = input / op.rows.stride - row.offset;
    const bool reaches = input % op.rows.stride == row.phase && y >= 0 && y < op.rows.outputs;
    for (const Shift& column : op.columns.shifts) {
      if (reaches && column.phase == phase)
        to.push_back({y * op.grad_strides.y - column.offset * op.grad_strides.x,
                      place.origin + slot * place.tap + y * place.row - column.offset * place.pixel,
                      slot,
                      {column.offset, op.columns.outputs + column.offset}});
      ++slot;
    }
  }
}

// The channel filters of an image's group, rearranged.
template <typename A, typename T>
void load_channels(A* to, const DdfOperands<T>& op, int64_t b, int64_t g) {
  if (op.shape.alone) return;
  const ChannelFilterStrides stride = op.channel_strides;
  const int64_t members = op.shape.members();
  for (int64_t first = 0; first < members; first += kLanes<A>) {
    const T* const from =
        op.channel_filter + b * stride.b + (op.shape.channel(g) + first) * stride.c;
    const int64_t n = std::min<int64_t>(members - first, kLanes<A>);
    for (const Shift& row : op.rows.shifts) {
      for (const Shift& column : op.columns.shifts) {
        const T* const tap = from + row.tap * stride.ky + column.tap * stride.kx;
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(tap[i * stride.c]);
        to += kLanes<A>;
      }
    }
  }
}

// The spatial filters of a band's rows, one scratch plane per live tap.
template <typename A, typename T>
void load_spatial_planes(A* to, const Band& band, const DdfOperands<T>& op, int64_t b, int64_t g,
                         Range rows) {
  const SpatialFilterStrides& stride = op.spatial_strides;
  const T* const from = op.spatial_filter + b * stride.b + g * stride.g;
  if (stride.k == 1 && op.live_taps() == op.shape.taps()) {
    const int64_t first = std::max<int64_t>(rows.begin - band.halo, 0);
    const int64_t last = std::min(rows.end + band.halo, op.shape.Ho);  // no tap leads beyond
    for (int64_t y = first; y < last; ++y)
      copy_transposed<false>(to + band.origin + (y - rows.begin) * band.pitch, band.plane,
                             from + y * stride.y, stride.x, 1, op.shape.Wo, op.shape.taps());
    return;
  }
  for (const Shift& row : op.rows.shifts) {
    for (const Shift& column : op.columns.shifts) {
      const int64_t k = row.tap * op.shape.K + column.tap;
      load_map(to, band, from + k * stride.k, stride.y, stride.x, rows, op.shape.Ho, op.shape.Wo);
      to += band.plane;
    }
  }
}

// The elements of a group's rearranged channel filters.
template <typename T>
int64_t channels_size(const DdfOperands<T>& op) {
  constexpr int64_t lanes = kLanes<Accumulator<T>>;
  return ceil_div(op.shape.members(), lanes) * lanes * op.live_taps();
}

template <typename T, Combine COMBINE>
void forward_pixels(const DdfForward<T>& op, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const DdfShape& s = op.shape;
  const MapStrides &from = op.features_strides, &to = op.out_strides;
  const Band layout(0, 0, s.Wo, 1, kLanes<A>);  // of the spatial filters of one row
  const int64_t count = op.live_taps();
  Scratch<A> scratch(count * layout.plane + channels_size(op));
  A *spatial = scratch.take(count * layout.plane), *channel = scratch.take(channels_size(op));
  std::vector<RowTap> taps;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t y = unit % s.Ho, g = unit / s.Ho % s.groups, b = unit / s.Ho / s.groups;
    if (unit == begin || y == 0) load_channels(channel, op, b, g);
    load_spatial_planes(spatial, layout, op, b, g, {y, y + 1});
    output_taps(taps, op, y, {layout.origin, layout.plane, 0, 1});
    const RowInput<T> in{op.features + b * from.b + s.channel(g) * from.c,
                         s.stride * from.x,
                         s.stride * from.y,
                         spatial,
                         channel,
                         count,
                         s.members()};
    T* const out = op.out + b * to.b + y * to.y + s.channel(g) * to.c;
    Runs<T> runs(taps, s.Wo);
    while (const auto* run = runs.next())
      sum_taps<T, COMBINE>(out + runs.x * to.x, to.x, in, *run, runs.x, runs.pixels);
  }
}

}  // namespace timm_dynamic::ISA
