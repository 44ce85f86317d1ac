// The gradients of dynamic_filter on channels_last tensors where neighbouring channels read
// different filters. Included once per instruction set, after lanes.h.

namespace timm_dynamic::ISA {

// With t_j[m][i] = grad[m][i] * map_j[m][i]:
//   grad_filter_j[i] = sum_m t_j[m][i] * channel_j[m][i]       (t_j alone if there is no product)
//   grad_channel_j[m][i] += t_j[m][i] * filter_j[i]            (likewise)
// for TAPS taps and n groups.
template <typename T, Combine COMBINE, bool CHANNEL, int TAPS>
INLINE void correlate_members(Accumulator<T>* grad_filter, Accumulator<T>* grad_channel,
                              const T* grad, const T* map, const Accumulator<T>* filter,
                              const Accumulator<T>* channel, const LanesInput<T>& in,
                              const RowTap* taps, int64_t n) {
  using A = Accumulator<T>;
  Vec<A> sums[TAPS] = {};
  const T* maps[TAPS];
#pragma GCC unroll 9
  for (int j = 0; j < TAPS; ++j) maps[j] = map + taps[j].map;
  for (int64_t at = 0; at < in.members * in.inner; at += in.inner) {
    const Vec<A> g = load<A>(grad + at, n);
#pragma GCC unroll 9
    for (int j = 0; j < TAPS; ++j) {
      const Vec<A> t = g * load<A>(maps[j] + at, n);
      if constexpr (COMBINE == Combine::kMultiply)
        sums[j] += t * load<A>(channel + taps[j].slot * in.C + at, n);
      else
        sums[j] += t;
      if constexpr (CHANNEL) {
        A* const total = grad_channel + taps[j].slot * in.C + at;
        store<A>(total, load<A>(total, n) + weighted<COMBINE>(t, load<A>(filter + taps[j].filter)),
                 n);
      }
    }
  }
#pragma GCC unroll 9
  for (int j = 0; j < TAPS; ++j) store<A>(grad_filter + taps[j].filter, sums[j]);
}

// The backward pass of one band: its scratch and what is done with it.
template <typename T, Combine COMBINE>
struct BackwardLanes {
  using A = Accumulator<T>;
  const DdfBackward<T>& op;
  const FilterRows layout;
  const int64_t halo, rows_size, sums_size;
  Scratch<A> scratch;
  A *filters, *sums;  // the spatial filters, with a halo of rows, and their gradient
  A *channel, *grad_channel;
  std::vector<RowTap> taps;

  explicit BackwardLanes(const DdfBackward<T>& op)
      : op(op),
        layout(op),
        halo(op.rows.reach),
        rows_size((op.bands.rows + 2 * halo) * layout.row),
        sums_size(op.bands.rows * layout.row),
        scratch(rows_size + sums_size + 2 * channel_rows_size(op)) {
    filters = scratch.take(rows_size), sums = scratch.take(sums_size);
    channel = scratch.take(channel_rows_size(op)),
    grad_channel = scratch.take(channel_rows_size(op));
  }

  LanesInput<T> input(const T* map, int64_t step) const {
    return {map, step, filters, channel, layout, op.shape.C, op.shape.members(), op.shape.inner};
  }

  // Row `input_y` of the features' gradient; the filters in scratch begin, after the halo, with row
  // `first`.
  void input_row(int64_t b, int64_t input_y, int64_t first) {
    const MapStrides &from = op.grad_strides, &to = op.grad_features_strides;
    const LanesInput<T> in = input(op.grad + b * from.b, from.x);
    const int64_t stride = op.columns.stride;
    for (int64_t phase = 0; phase < std::min(stride, op.columns.size); ++phase) {
      input_taps(taps, op, input_y, phase,
                 {(halo - first) * layout.row, layout.lanes, layout.row, layout.pixel});
      T* const out = op.grad_features + b * to.b + input_y * to.y + phase * to.x;
      Runs<T> runs(taps, op.columns.phase_size(phase));
      while (const auto* run = runs.next())
        sum_pixels<T, COMBINE>(out + runs.x * stride * to.x, stride * to.x, in, *run, runs.x,
                               runs.pixels);
    }
  }

  template <bool CHANNEL>
  void correlate(const T* grad, const T* map, int64_t x, int64_t row, const LanesInput<T>& in,
                 const std::vector<RowTap>& run) {
    const A* const filter = filters + (row + halo) * layout.row + x * layout.pixel;
    A* const grad_filter = sums + row * layout.row + x * layout.pixel;
    const int64_t size = in.members * in.inner;
    for (int64_t c = 0, part = 0; c < in.C; c += size, part += layout.part) {
      for (int64_t i = 0; i < in.inner; i += kLanes<A>) {
        const RowTap *tap = run.data(), *end = tap + run.size();
        const auto group = [&](auto count) {
          constexpr int kTaps = decltype(count)::value;
          for (; tap + kTaps <= end; tap += kTaps)
            correlate_members<T, COMBINE, CHANNEL, kTaps>(
                grad_filter + part + i, grad_channel + c + i, grad + c + i, map + c + i,
                filter + part + i, channel + c + i, in, tap,
                std::min<int64_t>(in.inner - i, kLanes<A>));
        };
        group(std::integral_constant<int, 9>());
        group(std::integral_constant<int, 6>());
        group(std::integral_constant<int, 4>());
        group(std::integral_constant<int, 1>());
      }
    }
  }

  // The filters' gradients from output row y.
  void output_row(int64_t b, int64_t y, int64_t first) {
    const MapStrides &from = op.features_strides, &g = op.grad_strides;
    const int64_t step = op.shape.stride * from.x;
    const LanesInput<T> in = input(op.features + b * from.b, step);
    const T* const grad = op.grad + b * g.b + y * g.y;
    output_taps(taps, op, y, {0, layout.lanes, 0, layout.pixel});
    Runs<T> runs(taps, op.shape.Wo);
    while (const auto* run = runs.next()) {
      for (int64_t x = runs.x; x < runs.x + runs.pixels; ++x) {
        if (op.partial_channel)
          correlate<true>(grad + x * g.x, in.map + x * step, x, y - first, in, *run);
        else
          correlate<false>(grad + x * g.x, in.map + x * step, x, y - first, in, *run);
      }
    }
  }

  void run(int64_t b, int64_t band) {
    const DdfShape& s = op.shape;
    const Range rows = op.bands.of(band, s.Ho);
    const int64_t begin = std::max<int64_t>(rows.begin - halo, 0);
    for (int64_t y = begin; y < std::min(rows.end + halo, s.Ho); ++y)
      load_filters(filters + (y - rows.begin + halo) * layout.row, layout, op, b, y, 0, s.Wo);
    std::fill_n(grad_channel, channel_rows_size(op), A(0));
    std::fill_n(sums, sums_size, A(0));
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      if (op.grad_features)
        for (int64_t input = y * s.stride; input < std::min((y + 1) * s.stride, s.H); ++input)
          input_row(b, input, rows.begin);
      if (op.partial_channel || op.partial_spatial) output_row(b, y, rows.begin);
    }
    if (op.partial_channel) flush_channels(b, band);
    if (op.partial_spatial) flush(b, band);
  }

  void flush_channels(int64_t b, int64_t band) {
    const DdfShape& s = op.shape;
    A* const to = op.channel_sums(b, band);
    std::fill_n(to, s.C * s.taps(), A(0));  // dead taps
    const A* from = grad_channel;
    for (const Shift& row : op.rows.shifts) {
      for (const Shift& column : op.columns.shifts) {
        std::copy_n(from, s.C, to + (row.tap * s.K + column.tap) * s.C);
        from += s.C;
      }
    }
  }

  void flush(int64_t b, int64_t band) {
    const DdfShape& s = op.shape;
    const Range rows = op.bands.of(band, s.Ho);
    const int64_t columns = op.partial_columns(), plane = op.partial_rows() * columns;
    A* const to = op.spatial_sums(b, 0, 0);
    const int64_t first = op.broadcast_rows ? band : rows.begin;
    const int64_t last = op.broadcast_rows ? band + 1 : rows.end;
    if (op.live_taps() < s.taps() || op.broadcast_rows || op.broadcast_columns)
      for (int64_t i = 0; i < s.groups * s.taps(); ++i)
        std::fill_n(to + i * plane + first * columns, (last - first) * columns, A(0));
    int64_t slot = 0;
    for (const Shift& row : op.rows.shifts) {
      for (const Shift& column : op.columns.shifts) {
        for (int64_t y = rows.begin; y < rows.end; ++y) {
          const A* from = sums + (y - rows.begin) * layout.row + slot * layout.lanes;
          A* at =
              to + (row.tap * s.K + column.tap) * plane + (op.broadcast_rows ? band : y) * columns;
          for (int64_t g = 0; g < s.groups; g += s.inner, from += layout.part)
            flush_row(at + g * s.taps() * plane, s.taps() * plane, from);
        }
        ++slot;
      }
    }
  }

  // A row of a tap's gradient in a part to the rows of its groups, `step` apart.
  void flush_row(A* to, int64_t step, const A* from) const {
    if (!op.broadcast_rows && !op.broadcast_columns)
      return copy_transposed<false>(to, step, from, layout.pixel, 1, op.shape.Wo, op.shape.inner);
    for (int64_t x = 0; x < op.shape.Wo; ++x)
      for (int64_t i = 0; i < op.shape.inner; ++i)
        to[i * step + (op.broadcast_columns ? 0 : x)] += from[x * layout.pixel + i];
  }
};

template <typename T, Combine COMBINE>
void backward_lanes(const DdfBackward<T>& op, int64_t begin, int64_t end) {
  BackwardLanes<T, COMBINE> lanes(op);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t band = unit % op.bands.count, b = unit / op.bands.count;
    if (unit == begin || band == 0) load_channel_rows(lanes.channel, op, b);
    lanes.run(b, band);
  }
}

}  // namespace timm_dynamic::ISA
