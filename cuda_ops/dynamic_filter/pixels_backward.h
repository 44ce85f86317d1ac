// The gradients of dynamic_filter on channels_last tensors where neighbouring channels share a
// filter. Included once per instruction set, after pixels.h.

namespace timm_dynamic::ISA {

// With t_j[p][c] = grad[p][c] * map_j[p][c], for n channels of a run:
//   dots[p][j] += t_j[p][c] * channel_j[c]                (t_j alone if the filters are added)
//   grad_channel_j[c] += t_j[p][c] * filter_j[p]          (likewise)
template <typename T, Combine COMBINE, int TAPS>
INLINE void correlate_run_channels(Vec<Accumulator<T>> (*dots)[TAPS], Accumulator<T>* grad_channel,
                                   const T* grad, int64_t grad_step, const RunTaps<T, TAPS>& taps,
                                   int64_t step, const Accumulator<T>* channel, int64_t pixels,
                                   int64_t first, int64_t n) {
  using A = Accumulator<T>;
  Vec<A> c[TAPS], totals[TAPS];
  for (int j = 0; j < TAPS; ++j) {
    c[j] = load<A>(channel + taps.channel[j]);
    totals[j] = load<A>(grad_channel + taps.channel[j]);
  }
  for (int64_t p = 0; p < pixels; ++p) {
    taps.prefetch(p * step + first, kLanes<A>);
    const Vec<A> g = load<A>(grad + p * grad_step + first, n);
#pragma GCC unroll 9
    for (int j = 0; j < TAPS; ++j) {
      const Vec<A> t = g * load<A>(taps.maps[j] + p * step + first, n);
      dots[p][j] += weighted<COMBINE>(t, c[j]);
      totals[j] += weighted<COMBINE>(t, taps.filters[p][j]);
    }
  }
  for (int j = 0; j < TAPS; ++j) store<A>(grad_channel + taps.channel[j], totals[j]);
}

// Both filters' gradients from a run and TAPS taps.
template <typename T, Combine COMBINE, int TAPS>
void correlate_run(Accumulator<T>* grad_channel, Accumulator<T>* grad_filter, const T* grad,
                   int64_t grad_step, const RowInput<T>& in, const RowTap* row_taps, int64_t x,
                   int64_t pixels) {
  using A = Accumulator<T>;
  constexpr int64_t kStep = kLanes<A>;
  const RunTaps<T, TAPS> taps(in, row_taps, x, pixels);
  const int64_t step = in.step, channels = in.channels, vector = in.live_taps * kStep;
  const A* channel = in.channel;
  Vec<A> dots[kRun<A>][TAPS];
  for (int64_t p = 0; p < pixels; ++p)
    for (int j = 0; j < TAPS; ++j) dots[p][j] = Vec<A>{};
  int64_t first = 0;
  for (; first + kStep <= channels; first += kStep, channel += vector, grad_channel += vector)
    correlate_run_channels<T, COMBINE>(dots, grad_channel, grad, grad_step, taps, step, channel,
                                       pixels, first, kStep);
  if (first < channels)
    correlate_run_channels<T, COMBINE>(dots, grad_channel, grad, grad_step, taps, step, channel,
                                       pixels, first, channels - first);
  for (int j = 0; j < TAPS; ++j) {
    A* const to = grad_filter + row_taps[j].filter + x;
    if (pixels == kRun<A>) {
      Vec<A> each[kRun<A>];
      for (int p = 0; p < kRun<A>; ++p) each[p] = dots[p][j];
      store<A>(to, sum_each<A>(each));
    } else {
      for (int64_t p = 0; p < pixels; ++p) to[p] = sum_lanes(dots[p][j]);
    }
  }
}

// In groups whose sums fit the registers. For K = 3 one group: a map's inside, border or corner.
template <typename T, Combine COMBINE>
void correlate_taps(Accumulator<T>* grad_channel, Accumulator<T>* grad_filter, const T* grad,
                    int64_t grad_step, const RowInput<T>& in, const std::vector<RowTap>& taps,
                    int64_t x, int64_t pixels) {
  const RowTap *tap = taps.data(), *end = tap + taps.size();
  const auto run = [&](auto correlate, int64_t size) {
    for (; tap + size <= end; tap += size)
      correlate(grad_channel, grad_filter, grad, grad_step, in, tap, x, pixels);
  };
  run(correlate_run<T, COMBINE, 9>, 9);
  run(correlate_run<T, COMBINE, 6>, 6);
  run(correlate_run<T, COMBINE, 4>, 4);
  run(correlate_run<T, COMBINE, 1>, 1);
}

// A band's gradient of the channel filter, arranged as by `load_channels`, to the partial sums.
template <typename A, typename T>
void flush_channels(const A* from, const DdfBackward<T>& op, int64_t b, int64_t g, int64_t band) {
  const DdfShape& s = op.shape;
  const int64_t step = op.live_taps() * kLanes<A>, members = s.members();
  A* const to = op.channel_sums(b, band) + s.channel(g);
  for (int64_t k = 0; k < s.taps(); ++k) std::fill_n(to + k * s.C, members, A(0));  // dead taps
  for (const Shift& row : op.rows.shifts) {
    for (const Shift& column : op.columns.shifts) {
      A* const tap = to + (row.tap * s.K + column.tap) * s.C;
      for (int64_t c = 0; c < members; c += kLanes<A>)
        store<A>(tap + c, load<A>(from + c / kLanes<A> * step), members - c);
      from += kLanes<A>;
    }
  }
}

// The backward pass of one band: its scratch and what is done with it.
template <typename T, Combine COMBINE>
struct BackwardPixels {
  using A = Accumulator<T>;
  const DdfBackward<T>& op;
  const Band layout;
  const int64_t count;
  Scratch<A> scratch;
  A *spatial, *sums;  // the spatial filter and its gradient
  A *channel, *grad_channel;
  std::vector<RowTap> taps;

  explicit BackwardPixels(const DdfBackward<T>& op)
      : op(op),
        layout(op.rows.reach, op.columns.reach, op.shape.Wo, op.bands.rows, kLanes<A>),
        count(op.live_taps()),
        scratch(2 * (count * layout.plane + channels_size(op))) {
    spatial = scratch.take(count * layout.plane), sums = scratch.take(count * layout.plane);
    channel = scratch.take(channels_size(op)), grad_channel = scratch.take(channels_size(op));
  }

  // The scratch of spatial filters begins, but for its halo, with row `first`.
  FilterPlace place(int64_t first) const {
    return {layout.origin - first * layout.pitch, layout.plane, layout.pitch, 1};
  }

  void input_row(int64_t b, int64_t g, int64_t y, int64_t first) {
    const MapStrides &from = op.grad_strides, &to = op.grad_features_strides;
    const int64_t c = op.shape.channel(g);
    const RowInput<T> in{op.grad + b * from.b + c * from.c,
                         from.x,
                         from.y,
                         spatial,
                         channel,
                         count,
                         op.shape.members()};
    const int64_t stride = op.columns.stride;
    for (int64_t phase = 0; phase < std::min(stride, op.columns.size); ++phase) {
      input_taps(taps, op, y, phase, place(first));
      T* const out = op.grad_features + b * to.b + y * to.y + phase * to.x + c * to.c;
      Runs<T> runs(taps, op.columns.phase_size(phase));
      while (const auto* run = runs.next())
        sum_taps<T, COMBINE>(out + runs.x * stride * to.x, stride * to.x, in, *run, runs.x,
                             runs.pixels);
    }
  }

  void output_row(int64_t b, int64_t group, int64_t y, int64_t first) {
    const MapStrides &from = op.features_strides, &g = op.grad_strides;
    const int64_t c = op.shape.channel(group);
    const RowInput<T> in{op.features + b * from.b + c * from.c,
                         op.shape.stride * from.x,
                         op.shape.stride * from.y,
                         spatial,
                         channel,
                         count,
                         op.shape.members()};
    const T* const grad = op.grad + b * g.b + y * g.y + c * g.c;
    output_taps(taps, op, y, place(first));
    Runs<T> runs(taps, op.shape.Wo);
    while (const auto* run = runs.next())
      correlate_taps<T, COMBINE>(grad_channel, sums, grad + runs.x * g.x, g.x, in, *run, runs.x,
                                 runs.pixels);
  }

  void run(int64_t b, int64_t g, int64_t band) {
    const DdfShape& s = op.shape;
    const Range rows = op.bands.of(band, s.Ho);
    load_spatial_planes(spatial, layout, op, b, g, rows);
    std::fill_n(grad_channel, channels_size(op), A(0));
    std::fill_n(sums, count * layout.plane, A(0));
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      if (op.grad_features)
        for (int64_t input = y * s.stride; input < std::min((y + 1) * s.stride, s.H); ++input)
          input_row(b, g, input, rows.begin);
      if (op.partial_channel || op.partial_spatial) output_row(b, g, y, rows.begin);
    }
    if (op.partial_channel) flush_channels(grad_channel, op, b, g, band);
    if (op.partial_spatial) flush(b, g, band);
  }

  void flush(int64_t b, int64_t g, int64_t band) {
    const DdfShape& s = op.shape;
    if (count < s.taps()) {  // dead taps; the spatial filters serve as zeros
      std::fill_n(spatial, layout.plane, A(0));
      for (int64_t k = 0; k < s.taps(); ++k) flush_tap(spatial, 0, op, b, band, 0, g, k);
    }
    const A* from = sums + layout.origin;
    for (const Shift& row : op.rows.shifts) {
      for (const Shift& column : op.columns.shifts) {
        flush_tap(from, layout.pitch, op, b, band, 0, g, row.tap * s.K + column.tap);
        from += layout.plane;
      }
    }
  }
};

template <typename T, Combine COMBINE>
void backward_pixels(const DdfBackward<T>& op, int64_t begin, int64_t end) {
  BackwardPixels<T, COMBINE> pixels(op);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t band = unit % op.bands.count, g = unit / op.bands.count % op.shape.groups;
    const int64_t b = unit / op.bands.count / op.shape.groups;
    if (unit == begin || band == 0) load_channels(pixels.channel, op, b, g);
    pixels.run(b, g, band);
  }
}

}  // namespace timm_dynamic::ISA
