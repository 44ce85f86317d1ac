// The gradients of dynamic_filter on NCHW tensors. Included once per instruction set, after
// planes.h.

namespace timm_dynamic::ISA {

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
                 const Axis& rows, const Axis& columns, int64_t upsample, A* row) {
  const int64_t stride = rows.stride;
  if (upsample > 1) {
    const int64_t size = columns.size / upsample;
    for (int64_t y = out_rows.begin; y < out_rows.end; y += upsample) {
      std::fill_n(row, size, A(0));
      for (int64_t i = 0; i < upsample; ++i, planes += band.pitch)
        for (int64_t x = 0; x < columns.size; ++x) row[x / upsample] += planes[x];
      store_rows(to + y / upsample * stride_y, 0, row, 0, 1, size);
    }
    return;
  }
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

// What one vector of positions, of which n count, adds to the gradients of the filters: with
// t_j[p] = grad[p] * map_j[p],
//   grad_channel_j += t_j[p] * spatial_j[p]      (t_j[p] alone if the filters are added)
//   grad_spatial_j[p] += t_j[p] * channel_j      (likewise)
template <typename A, Combine COMBINE, bool CHANNEL, bool SPATIAL, int TAPS>
INLINE void correlate_block(Vec<A>* grad_channel, A* grad_spatial, const A* grad,
                            const A* const* maps, const A* spatial, const Vec<A>* channel,
                            int64_t p, int64_t n) {
  const Vec<A> g = load<A>(grad + p, n);
#pragma GCC unroll 9
  for (int j = 0; j < TAPS; ++j) {
    const Vec<A> t = g * load<A>(maps[j] + p, n);
    if constexpr (CHANNEL)
      grad_channel[j] += weighted<COMBINE>(t, load<A>(spatial + j * kLanes<A>));
    if constexpr (SPATIAL) {
      A* const total = grad_spatial + j * kLanes<A>;
      store<A>(total, load<A>(total) + weighted<COMBINE>(t, channel[j]));
    }
  }
}

// The above for n positions. `spatial` and `grad_spatial` hold `count` taps a vector.
template <typename A, Combine COMBINE, bool CHANNEL, bool SPATIAL, int TAPS>
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
    correlate_block<A, COMBINE, CHANNEL, SPATIAL, TAPS>(sums, grad_spatial, grad, maps, spatial, c,
                                                        p, kLanes<A>);
  if (p < n)  // the scratch beyond n holds other rows
    correlate_block<A, COMBINE, CHANNEL, SPATIAL, TAPS>(sums, grad_spatial, grad, maps, spatial, c,
                                                        p, n - p);
  if constexpr (CHANNEL)
    for (int j = 0; j < TAPS; ++j) grad_channel[taps[j].k] = sum_lanes(sums[j]);
}

// grad_spatial_j[p] += sum_c grad_c[p] * map_c[p + distance_j] over `channels` of them.
template <typename A, int TAPS>
void correlate_channels(A* grad_spatial, const A* grad, int64_t grad_plane, const A* map,
                        int64_t map_plane, const FlatTap* taps, int64_t count, int64_t channels,
                        int64_t n) {
  const A* maps[TAPS];
  for (int j = 0; j < TAPS; ++j) maps[j] = map + taps[j].distance;
  for (int64_t p = 0; p < n; p += kLanes<A>, grad_spatial += count * kLanes<A>) {
    Vec<A> sums[TAPS];
#pragma GCC unroll 9
    for (int j = 0; j < TAPS; ++j) sums[j] = load<A>(grad_spatial + j * kLanes<A>);
    for (int64_t c = 0; c < channels; ++c) {
      const Vec<A> g = load<A>(grad + c * grad_plane + p, n - p);
#pragma GCC unroll 9
      for (int j = 0; j < TAPS; ++j) sums[j] += g * load<A>(maps[j] + c * map_plane + p);
    }
#pragma GCC unroll 9
    for (int j = 0; j < TAPS; ++j) store<A>(grad_spatial + j * kLanes<A>, sums[j]);
  }
}

// In groups of 9, 3 or 1 taps, whose sums fit the registers.
template <typename A, Combine COMBINE, bool CHANNEL, bool SPATIAL>
void correlate_taps(A* grad_channel, A* grad_spatial, const A* grad, const A* map, const A* spatial,
                    const std::vector<FlatTap>& taps, const A* channel, int64_t n) {
  const int64_t count = taps.size();
  int64_t j = 0;
  const auto run = [&](auto correlate, int64_t size) {
    for (; j + size <= count; j += size)
      correlate(grad_channel, grad_spatial + j * kLanes<A>, grad, map, spatial + j * kLanes<A>,
                taps.data() + j, count, channel, n);
  };
  run(correlate_group<A, COMBINE, CHANNEL, SPATIAL, 9>, 9);
  run(correlate_group<A, COMBINE, CHANNEL, SPATIAL, 3>, 3);
  run(correlate_group<A, COMBINE, CHANNEL, SPATIAL, 1>, 1);
}

// The backward pass of one band: its scratch and what is done with it.
template <typename T, Combine COMBINE>
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
        group(channel_group(layout, COMBINE)),
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

  void load_filters(int64_t b, int64_t g, Range rows) {
    if (op.grad_features)
      for (int64_t i = 0; i < phases; ++i)
        load_spatial(shifted_of(i), layout, op, b, g, rows, taps.input[i], true, grad);
    if (filters_wanted() && COMBINE != Combine::kAlone)
      load_spatial(spatial, layout, op, b, g, rows, taps.output, false, grad);
    std::fill_n(sums, spatial_size, A(0));
  }

  void load_maps(int64_t i, int64_t b, int64_t c, Range rows) {
    const MapStrides &from = op.features_strides, &g = op.grad_strides;
    load_map(grad + i * layout.plane, layout, op.grad + b * g.b + c * g.c, g.y, g.x, rows,
             op.shape.Ho, op.shape.Wo);
    if (filters_wanted())
      load_input(input + i * input_size, layout, op.features + b * from.b + c * from.c, from.y,
                 from.x, rows, op.rows, op.columns, op.shape.upsample);
  }

  void correlate_all(int64_t channels, int64_t n) {
    const int64_t count = taps.output.size();
    int64_t j = 0;
    const auto run = [&](auto correlate, int64_t size) {
      for (; j + size <= count; j += size)
        correlate(sums + j * kLanes<A>, grad + layout.origin, layout.plane, input + layout.origin,
                  input_size, taps.output.data() + j, count, channels, n);
    };
    run(correlate_channels<A, 9>, 9);
    run(correlate_channels<A, 3>, 3);
    run(correlate_channels<A, 1>, 1);
  }

  void correlate(int64_t i, A* grad_channel, int64_t n) {
    const auto run = !op.partial_channel   ? correlate_taps<A, COMBINE, false, true>
                     : !op.partial_spatial ? correlate_taps<A, COMBINE, true, false>
                                           : correlate_taps<A, COMBINE, true, true>;
    run(grad_channel, sums, grad + i * layout.plane + layout.origin,
        input + i * input_size + layout.origin, spatial, taps.output, channel, n);
  }

  // The `n` channels of a group from `first`.
  void run_channels(int64_t b, int64_t band, int64_t first, int64_t n) {
    const DdfShape& s = op.shape;
    const Range rows = op.bands.of(band, s.Ho);
    const int64_t span = layout.span(rows);
    for (int64_t i = 0; i < n; ++i) load_maps(i, b, first + i * s.inner, rows);
    if constexpr (COMBINE == Combine::kAlone) {
      if (op.grad_features)
        for (int64_t phase = 0; phase < phases; ++phase)
          sum_channels<A>(grad_input + phase * layout.plane, input_size, grad + layout.origin,
                          layout.plane, shifted_of(phase), taps.input[phase], n, span);
      if (filters_wanted()) correlate_all(n, span);
    } else {
      for (int64_t i = 0; i < n; ++i) run_channel(i, b, band, first + i * s.inner, span);
    }
    if (!op.grad_features) return;
    const MapStrides& to = op.grad_features_strides;
    for (int64_t i = 0; i < n; ++i)
      store_input(op.grad_features + b * to.b + (first + i * s.inner) * to.c, to.y,
                  grad_input + i * input_size, layout, rows, op.rows, op.columns, s.upsample, row);
  }

  void run_channel(int64_t i, int64_t b, int64_t band, int64_t c, int64_t span) {
    const DdfShape& s = op.shape;
    load_channel(channel, op, b, c);
    if (op.grad_features)
      for (int64_t phase = 0; phase < phases; ++phase)
        sum_taps<A, COMBINE>(grad_input + i * input_size + phase * layout.plane,
                             grad + i * layout.plane + layout.origin, shifted_of(phase),
                             taps.input[phase], channel, span);
    A* grad_channel = nullptr;
    if (op.partial_channel) {
      grad_channel = op.channel_sums(b, band) + c * s.taps();
      std::fill_n(grad_channel, s.taps(), A(0));  // dead taps
    }
    if (filters_wanted()) correlate(i, grad_channel, span);
  }

  void flush(int64_t b, int64_t band, int64_t g, int64_t block) {
    const int64_t count = taps.output.size();
    std::fill_n(grad, layout.plane, A(0));
    for (int64_t k = 0; count < op.shape.taps() && k < op.shape.taps(); ++k)  // dead taps
      flush_tap(grad, 0, op, b, band, block, g, k);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t v = 0; v < layout.vectors; ++v)
        store<A>(grad + v * kLanes<A>, load<A>(sums + (v * count + j) * kLanes<A>));
      flush_tap(grad, layout.pitch, op, b, band, block, g, taps.output[j].k);
    }
    std::fill_n(grad, layout.plane, A(0));  // its padding must be zero again
  }
};

template <typename T, Combine COMBINE>
void backward_planes(const DdfBackward<T>& op, int64_t begin, int64_t end) {
  BackwardPlanes<T, COMBINE> planes(op);
  const DdfShape& s = op.shape;
  const int64_t blocks = op.channel_blocks, members = s.members();
  const int64_t block_size = ceil_div(members, blocks);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % blocks, g = unit / blocks % s.groups;
    const int64_t band = unit / blocks / s.groups % op.bands.count;
    const int64_t b = unit / blocks / s.groups / op.bands.count;
    const int64_t last = std::min((block + 1) * block_size, members);
    planes.load_filters(b, g, op.bands.of(band, s.Ho));
    for (int64_t m = block * block_size; m < last; m += planes.group)
      planes.run_channels(b, band, s.channel(g) + m * s.inner, std::min(planes.group, last - m));
    if (op.partial_spatial) planes.flush(b, band, g, block);
  }
}

}  // namespace timm_dynamic::ISA
