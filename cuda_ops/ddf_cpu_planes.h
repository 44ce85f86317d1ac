// DDF on NCHW tensors. Included once per instruction set, after ddf_cpu_bands.h.
//
// Rows of a band are copied to scratch with zeros around them, one plane per stride phase. A tap is
// then a constant distance within the plane, a row's padding is also that of the row before it, and
// the whole band is one loop over consecutive elements, without branches and in full vectors even
// for 7 x 7 maps. Values computed for the padding columns are dropped when rows are copied out.
// The spatial filter, which all channels share, is rearranged once per band to
// [vector of positions][tap][lane], so that it is read in order and aligned.

namespace timm_dynamic::ISA {

// A row of a strided operator's input, split into its column phases, which are `plane` apart.
template <typename A, typename T>
void load_phases(A* to, int64_t plane, const T* from, int64_t stride_x, const Axis& columns) {
  if (columns.stride == 2 && columns.phases.size() == 2 && stride_x == 1) {
    for (int64_t x = 0; x < columns.size; x += 2 * kLanes<A>) {
      Vec<A> a = load<A>(from + x, columns.size - x);
      Vec<A> b = load<A>(from + x + kLanes<A>, columns.size - x - kLanes<A>);
      deinterleave<A>(a, b, AllLanes<A>());
      store<A>(to + x / 2, a);
      store<A>(to + plane + x / 2, b);
    }
    return;
  }
  for (size_t i = 0; i < columns.phases.size(); ++i) {
    const int64_t phase = columns.phases[i];
    load_rows(to + i * plane, 0, from + phase * stride_x, 0, stride_x * columns.stride, 1,
              columns.phase_size(phase));
  }
}

// The rows of one channel's input that the outputs of a band read, as rows.phases.size() times
// columns.phases.size() planes.
template <typename A, typename T>
void load_input(A* to, const Band& band, const T* from, int64_t stride_y, int64_t stride_x,
                Range out_rows, const Axis& rows, const Axis& columns) {
  if (rows.stride == 1)
    return load_map(to, band, from, stride_y, stride_x, out_rows, rows.size, columns.size);
  for (const int64_t phase : rows.phases) {
    for (int64_t y = out_rows.begin - band.halo; y < out_rows.end + band.halo; ++y) {
      A* row = to + band.origin + (y - out_rows.begin) * band.pitch;
      const int64_t input = y * rows.stride + phase;
      if (input >= 0 && input < rows.size) {
        load_phases(row, band.plane, from + input * stride_y, stride_x, columns);
      } else {
        for (size_t i = 0; i < columns.phases.size(); ++i)
          zero_row(row + i * band.plane, columns.outputs);
      }
    }
    to += columns.phases.size() * band.plane;
  }
}

// A row of a strided operator's input from its column phases, the reverse of `load_phases`. `row`
// is a zeroed buffer: phases that no tap uses stay zero.
template <typename T, typename A>
void store_phases(T* to, const A* from, int64_t plane, const Axis& columns, A* row) {
  if (columns.stride == 2 && columns.phases.size() == 2) {
    for (int64_t x = 0; x < columns.size; x += 2 * kLanes<A>) {
      Vec<A> a = load<A>(from + x / 2), b = load<A>(from + plane + x / 2);
      interleave<A>(a, b, AllLanes<A>());
      store<A>(to + x, a, columns.size - x);
      store<A>(to + x + kLanes<A>, b, columns.size - x - kLanes<A>);
    }
    return;
  }
  for (const int64_t phase : columns.phases) {
    for (int64_t i = 0; i < columns.phase_size(phase); ++i)
      row[i * columns.stride + phase] = from[i];
    from += plane;
  }
  store_rows(to, 0, row, 0, 1, columns.size);
}

// Writes the input rows of a band from their phase planes.
template <typename T, typename A>
void store_input(T* to, int64_t stride_y, const A* planes, const Band& band, Range out_rows,
                 const Axis& rows, const Axis& columns, A* row) {
  const int64_t stride = rows.stride;
  if (stride == 1)
    return store_rows(to + out_rows.begin * stride_y, stride_y, planes, band.pitch,
                      out_rows.end - out_rows.begin, columns.size);
  for (int64_t y = out_rows.begin * stride; y < std::min(out_rows.end * stride, rows.size); ++y) {
    const auto phase = std::find(rows.phases.begin(), rows.phases.end(), y % stride);
    const int64_t plane = (phase - rows.phases.begin()) * columns.phases.size() * band.plane;
    const A* from = planes + plane + (y / stride - out_rows.begin) * band.pitch;
    if (phase == rows.phases.end())
      std::fill_n(to + y * stride_y, columns.size, T(0));
    else
      store_phases(to + y * stride_y, from, band.plane, columns, row);
  }
}

// A live tap: where it is in the filters, and what it adds to a position in the scratch plane of
// the map that it reads.
struct FlatTap {
  int64_t k, distance;
};

// The taps of the output, which reads the input's phase planes, and of each phase plane of the
// input's gradient, which reads the output's gradient.
struct FlatTaps {
  std::vector<FlatTap> output;
  std::vector<std::vector<FlatTap>> input;

  FlatTaps(const Axis& rows, const Axis& columns, const Band& band, int64_t K)
      : input(rows.phases.size() * columns.phases.size()) {
    for (const Shift& row : rows.shifts) {
      for (const Shift& column : columns.shifts) {
        const int64_t slot =
            rows.phase_slot(row.phase) * columns.phases.size() + columns.phase_slot(column.phase);
        const int64_t distance = row.offset * band.pitch + column.offset;
        const int64_t k = row.tap * K + column.tap;
        output.push_back({k, slot * band.plane + distance});
        input[slot].push_back({k, -distance});
      }
    }
  }
};

// The band's spatial filters for `taps`, rearranged. For the input's gradient (`shifted`) a
// position's filter value is the one at the output that the tap leads to.
template <typename A, typename T>
void load_spatial(A* to, const Band& band, const DdfOperands<T>& op, int64_t b, Range rows,
                  const std::vector<FlatTap>& taps, bool shifted, A* plane) {
  const SpatialFilterStrides& stride = op.spatial_strides;
  const int64_t n = band.span(rows), count = taps.size();
  for (const FlatTap& tap : taps) {
    load_map(plane, band, op.spatial_filter + b * stride.b + tap.k * stride.k, stride.y, stride.x,
             rows, op.shape.Ho, op.shape.Wo);
    const A* from = plane + band.origin + (shifted ? tap.distance : 0);
    for (int64_t p = 0; p < n; p += kLanes<A>) store<A>(to + p * count, load<A>(from + p, n - p));
    to += kLanes<A>;
  }
}

// The filter of channel c, all K*K taps of it.
template <typename A, typename T>
INLINE void load_channel(A* to, const DdfOperands<T>& op, int64_t b, int64_t c) {
  const ChannelFilterStrides& stride = op.channel_strides;
  const T* const from = op.channel_filter + b * stride.b + c * stride.c;
  const int64_t K = op.shape.K;
  if (stride.ky == K * stride.kx)
    load_rows(to, 0, from, 0, stride.kx, 1, K * K);
  else
    load_rows(to, K, from, stride.ky, stride.kx, K, K);
}

// out[p] = sum_j (channel[k_j] o spatial_j[p]) * map[p + distance_j] for p in [0, n), rounded up
// to whole vectors. With nine taps these addresses and filter values stay in registers.
template <typename A, bool MULTIPLY>
void sum_nine_taps(A* out, const A* map, const A* spatial, const FlatTap* taps, const A* channel,
                   int64_t n) {
  Vec<A> c[9];
  const A* maps[9];
  for (int j = 0; j < 9; ++j) {
    c[j] = broadcast(channel[taps[j].k]);
    maps[j] = map + taps[j].distance;
  }
  for (int64_t p = 0; p < n; p += kLanes<A>, spatial += 9 * kLanes<A>) {
    Vec<A> sum = {};
#pragma GCC unroll 9
    for (int j = 0; j < 9; ++j)
      sum += combine<MULTIPLY>(c[j], load<A>(spatial + j * kLanes<A>)) * load<A>(maps[j] + p);
    store<A>(out + p, sum);
  }
}

template <typename A, bool MULTIPLY, int VECTORS>
INLINE void sum_any_taps_block(A* out, const A* map, const A* spatial,
                               const std::vector<FlatTap>& taps, const A* channel) {
  const int64_t count = taps.size();
  Vec<A> sums[VECTORS] = {};
  for (int64_t j = 0; j < count; ++j, spatial += kLanes<A>) {
    const Vec<A> c = broadcast(channel[taps[j].k]);
    const A* const at = map + taps[j].distance;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
      sums[v] += combine<MULTIPLY>(c, load<A>(spatial + v * count * kLanes<A>)) *
                 load<A>(at + v * kLanes<A>);
  }
  for (int v = 0; v < VECTORS; ++v) store<A>(out + v * kLanes<A>, sums[v]);
}

template <typename A, bool MULTIPLY>
void sum_taps(A* out, const A* map, const A* spatial, const std::vector<FlatTap>& taps,
              const A* channel, int64_t n) {
  if (taps.size() == 9)
    return sum_nine_taps<A, MULTIPLY>(out, map, spatial, taps.data(), channel, n);
  constexpr int64_t kStep = 4 * kLanes<A>;
  const int64_t count = taps.size();
  int64_t p = 0;
  for (; p + kStep <= n; p += kStep)
    sum_any_taps_block<A, MULTIPLY, 4>(out + p, map + p, spatial + p * count, taps, channel);
  for (; p < n; p += kLanes<A>)
    sum_any_taps_block<A, MULTIPLY, 1>(out + p, map + p, spatial + p * count, taps, channel);
}

// What one vector of positions, of which n count, adds to the gradients of the filters: with
// t_j[p] = grad[p] * map_j[p],
//   grad_channel_j += t_j[p] * spatial_j[p]      (t_j[p] alone if the filters are added)
//   grad_spatial_j[p] += t_j[p] * channel_j      (likewise)
template <typename A, bool MULTIPLY, bool CHANNEL, bool SPATIAL, int TAPS>
INLINE void correlate_block(Vec<A>* grad_channel, A* grad_spatial, const A* grad,
                            const A* const* maps, const A* spatial, const Vec<A>* channel,
                            int64_t p, int64_t n) {
  const Vec<A> g = load<A>(grad + p, n);
#pragma GCC unroll 9
  for (int j = 0; j < TAPS; ++j) {
    const Vec<A> t = g * load<A>(maps[j] + p, n);
    if constexpr (CHANNEL) grad_channel[j] += MULTIPLY ? t * load<A>(spatial + j * kLanes<A>) : t;
    if constexpr (SPATIAL) {
      A* const total = grad_spatial + j * kLanes<A>;
      store<A>(total, load<A>(total) + (MULTIPLY ? t * channel[j] : t));
    }
  }
}

// The above for n positions. `spatial` and `grad_spatial` hold `count` taps a vector.
template <typename A, bool MULTIPLY, bool CHANNEL, bool SPATIAL, int TAPS>
void correlate_group(A* grad_channel, A* grad_spatial, const A* grad, const A* map,
                     const A* spatial, const FlatTap* taps, int64_t count, const A* channel,
                     int64_t n) {
  Vec<A> sums[TAPS] = {}, c[TAPS];
  const A* maps[TAPS];
  for (int j = 0; j < TAPS; ++j) {
    c[j] = broadcast(channel[taps[j].k]);
    maps[j] = map + taps[j].distance;
  }
  const int64_t step = count * kLanes<A>;
  int64_t p = 0;
  for (; p + kLanes<A> <= n; p += kLanes<A>, spatial += step, grad_spatial += step)
    correlate_block<A, MULTIPLY, CHANNEL, SPATIAL, TAPS>(sums, grad_spatial, grad, maps, spatial, c,
                                                         p, kLanes<A>);
  if (p < n)  // the scratch beyond n holds other rows
    correlate_block<A, MULTIPLY, CHANNEL, SPATIAL, TAPS>(sums, grad_spatial, grad, maps, spatial, c,
                                                         p, n - p);
  if constexpr (CHANNEL)
    for (int j = 0; j < TAPS; ++j) grad_channel[taps[j].k] = sum_lanes(sums[j]);
}

// In groups of 9, 3 or 1 taps, whose sums fit the registers.
template <typename A, bool MULTIPLY, bool CHANNEL, bool SPATIAL>
void correlate_taps(A* grad_channel, A* grad_spatial, const A* grad, const A* map, const A* spatial,
                    const std::vector<FlatTap>& taps, const A* channel, int64_t n) {
  const int64_t count = taps.size();
  int64_t j = 0;
  const auto run = [&](auto correlate, int64_t size) {
    for (; j + size <= count; j += size)
      correlate(grad_channel, grad_spatial + j * kLanes<A>, grad, map, spatial + j * kLanes<A>,
                taps.data() + j, count, channel, n);
  };
  run(correlate_group<A, MULTIPLY, CHANNEL, SPATIAL, 9>, 9);
  run(correlate_group<A, MULTIPLY, CHANNEL, SPATIAL, 3>, 3);
  run(correlate_group<A, MULTIPLY, CHANNEL, SPATIAL, 1>, 1);
}

// Channels whose scratch planes are filled before any is worked on: loads from just written
// scratch, at other boundaries than the stores', would wait for these.
inline int64_t channel_group(const Band& layout) {
  return std::clamp<int64_t>(4096 / layout.plane, 1, 16);
}

template <typename T, bool MULTIPLY>
void forward_planes(const DdfForward<T>& op, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const DdfShape& s = op.shape;
  const MapStrides &from = op.features_strides, &to = op.out_strides;
  const Band layout(op.rows.reach, op.columns.reach, s.Wo, op.bands.rows, kLanes<A>);
  const Band filters(0, op.columns.reach, s.Wo, op.bands.rows, kLanes<A>);
  const FlatTaps taps(op.rows, op.columns, layout, s.K);
  const int64_t input_size = taps.input.size() * layout.plane, group = channel_group(layout);
  const int64_t spatial_size = taps.output.size() * filters.vectors * kLanes<A>;
  const int64_t channel_size = s.taps() + kLanes<A>;
  Scratch<A> scratch(spatial_size + group * (input_size + layout.plane) + channel_size);
  A *spatial = scratch.take(spatial_size), *input = scratch.take(group * input_size);
  A *out = scratch.take(group * layout.plane), *channel = scratch.take(channel_size);
  for (int64_t unit = begin; unit < end;) {
    const int64_t c = unit % s.C, band = unit / s.C % op.bands.count;
    const int64_t b = unit / s.C / op.bands.count, n = std::min({group, s.C - c, end - unit});
    const Range rows = op.bands.of(band, s.Ho);
    if (unit == begin || c == 0)
      load_spatial(spatial, filters, op, b, rows, taps.output, false, out);
    for (int64_t i = 0; i < n; ++i)
      load_input(input + i * input_size, layout, op.features + b * from.b + (c + i) * from.c,
                 from.y, from.x, rows, op.rows, op.columns);
    for (int64_t i = 0; i < n; ++i) {
      load_channel(channel, op, b, c + i);
      sum_taps<A, MULTIPLY>(out + i * layout.plane, input + i * input_size + layout.origin, spatial,
                            taps.output, channel, layout.span(rows));
    }
    for (int64_t i = 0; i < n; ++i)
      store_rows(op.out + b * to.b + (c + i) * to.c + rows.begin * to.y, to.y,
                 out + i * layout.plane, layout.pitch, rows.end - rows.begin, s.Wo);
    unit += n;
  }
}

// The backward pass of one band: its scratch and what is done with it.
template <typename T, bool MULTIPLY>
struct BackwardPlanes {
  using A = Accumulator<T>;
  const DdfBackward<T>& op;
  const Band layout;
  const FlatTaps taps;
  const int64_t group, phases, input_size, spatial_size;
  Scratch<A> scratch;
  A *spatial, *shifted, *sums;  // rearranged filters, and the spatial gradient in the same order
  A *grad, *input, *grad_input, *channel, *row;

  explicit BackwardPlanes(const DdfBackward<T>& op)
      : op(op),
        layout(op.rows.reach, op.columns.reach, op.shape.Wo, op.bands.rows, kLanes<A>),
        taps(op.rows, op.columns, layout, op.shape.K),
        group(channel_group(layout)),
        phases(taps.input.size()),
        input_size(phases * layout.plane),
        spatial_size(taps.output.size() * layout.vectors * kLanes<A>),
        scratch(3 * spatial_size + group * (2 * input_size + layout.plane) + op.shape.taps() +
                op.shape.W + 2 * kLanes<A>) {
    spatial = scratch.take(spatial_size), shifted = scratch.take(spatial_size);
    sums = scratch.take(spatial_size), grad = scratch.take(group * layout.plane);
    input = scratch.take(group * input_size), grad_input = scratch.take(group * input_size);
    channel = scratch.take(op.shape.taps() + kLanes<A>), row = scratch.take(op.shape.W + kLanes<A>);
  }

  bool filters_wanted() const { return op.partial_channel || op.partial_spatial; }

  // The order of taps in `shifted`: those of the first phase plane, then of the second, ...
  A* shifted_of(int64_t phase) const {
    A* at = shifted;
    for (int64_t i = 0; i < phase; ++i) at += taps.input[i].size() * layout.vectors * kLanes<A>;
    return at;
  }

  void load_filters(int64_t b, Range rows) {
    if (op.grad_features)
      for (int64_t i = 0; i < phases; ++i)
        load_spatial(shifted_of(i), layout, op, b, rows, taps.input[i], true, grad);
    if (filters_wanted()) load_spatial(spatial, layout, op, b, rows, taps.output, false, grad);
    std::fill_n(sums, spatial_size, A(0));
  }

  void load_maps(int64_t i, int64_t b, int64_t c, Range rows) {
    const MapStrides &from = op.features_strides, &g = op.grad_strides;
    load_map(grad + i * layout.plane, layout, op.grad + b * g.b + c * g.c, g.y, g.x, rows,
             op.shape.Ho, op.shape.Wo);
    if (filters_wanted())
      load_input(input + i * input_size, layout, op.features + b * from.b + c * from.c, from.y,
                 from.x, rows, op.rows, op.columns);
  }

  void correlate(int64_t i, A* grad_channel, int64_t n) {
    const auto run = !op.partial_channel   ? correlate_taps<A, MULTIPLY, false, true>
                     : !op.partial_spatial ? correlate_taps<A, MULTIPLY, true, false>
                                           : correlate_taps<A, MULTIPLY, true, true>;
    run(grad_channel, sums, grad + i * layout.plane + layout.origin,
        input + i * input_size + layout.origin, spatial, taps.output, channel, n);
  }

  void run_channels(int64_t b, int64_t band, int64_t c, int64_t n) {
    const DdfShape& s = op.shape;
    const Range rows = op.bands.of(band, s.Ho);
    const int64_t span = layout.span(rows);
    for (int64_t i = 0; i < n; ++i) load_maps(i, b, c + i, rows);
    for (int64_t i = 0; i < n; ++i) {
      load_channel(channel, op, b, c + i);
      if (op.grad_features)
        for (int64_t phase = 0; phase < phases; ++phase)
          sum_taps<A, MULTIPLY>(grad_input + i * input_size + phase * layout.plane,
                                grad + i * layout.plane + layout.origin, shifted_of(phase),
                                taps.input[phase], channel, span);
      A* grad_channel = nullptr;
      if (op.partial_channel) {
        grad_channel = op.partial_channel + ((b * op.bands.count + band) * s.C + c + i) * s.taps();
        std::fill_n(grad_channel, s.taps(), A(0));  // dead taps
      }
      if (filters_wanted()) correlate(i, grad_channel, span);
    }
    if (!op.grad_features) return;
    const MapStrides& to = op.grad_features_strides;
    for (int64_t i = 0; i < n; ++i)
      store_input(op.grad_features + b * to.b + (c + i) * to.c, to.y, grad_input + i * input_size,
                  layout, rows, op.rows, op.columns, row);
  }

  void flush(int64_t b, int64_t band, int64_t block) {
    const int64_t count = taps.output.size();
    std::fill_n(grad, layout.plane, A(0));
    for (int64_t k = 0; count < op.shape.taps() && k < op.shape.taps(); ++k)  // dead taps
      flush_tap(grad, 0, op, b, band, block, k);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t v = 0; v < layout.vectors; ++v)
        store<A>(grad + v * kLanes<A>, load<A>(sums + (v * count + j) * kLanes<A>));
      flush_tap(grad, layout.pitch, op, b, band, block, taps.output[j].k);
    }
    std::fill_n(grad, layout.plane, A(0));  // its padding must be zero again
  }
};

template <typename T, bool MULTIPLY>
void backward_planes(const DdfBackward<T>& op, int64_t begin, int64_t end) {
  BackwardPlanes<T, MULTIPLY> planes(op);
  const int64_t blocks = op.channel_blocks, block_size = ceil_div(op.shape.C, blocks);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % blocks, band = unit / blocks % op.bands.count;
    const int64_t b = unit / blocks / op.bands.count;
    const int64_t last = std::min((block + 1) * block_size, op.shape.C);
    planes.load_filters(b, op.bands.of(band, op.shape.Ho));
    for (int64_t c = block * block_size; c < last; c += planes.group)
      planes.run_channels(b, band, c, std::min(planes.group, last - c));
    if (op.partial_spatial) planes.flush(b, band, block);
  }
}

}  // namespace timm_dynamic::ISA
