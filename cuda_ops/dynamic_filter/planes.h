// dynamic_filter on NCHW tensors. Included once per instruction set, after bands.h.
//
// Rows of a band are copied to scratch with zeros around them, one plane per stride phase. A tap is
// then a constant distance within the plane, a row's padding is also that of the row before it, and
// the whole band is one loop over consecutive elements, without branches and in full vectors even
// for 7 x 7 maps. Values computed for the padding columns are dropped when rows are copied out.
// The spatial filter, which the channels of a group share, is rearranged once per band to
// [vector of positions][tap][lane], so that it is read in order and aligned. To upsample, rows and
// columns are copied several times: the taps of the enlarged map are as far apart as `upsample`
// times those of the map.

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
                Range out_rows, const Axis& rows, const Axis& columns, int64_t upsample) {
  if (upsample > 1)
    return load_enlarged(to, band, from, stride_y, stride_x, out_rows, rows.size, columns.size,
                         upsample);
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
void load_spatial(A* to, const Band& band, const DdfOperands<T>& op, int64_t b, int64_t g,
                  Range rows, const std::vector<FlatTap>& taps, bool shifted, A* plane) {
  const SpatialFilterStrides& stride = op.spatial_strides;
  const T* const filter = op.spatial_filter + b * stride.b + g * stride.g;
  const int64_t n = band.span(rows), count = taps.size();
  for (const FlatTap& tap : taps) {
    load_map(plane, band, filter + tap.k * stride.k, stride.y, stride.x, rows, op.shape.Ho,
             op.shape.Wo);
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
template <typename A, Combine COMBINE>
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
      sum += combine<COMBINE>(c[j], load<A>(spatial + j * kLanes<A>)) * load<A>(maps[j] + p);
    store<A>(out + p, sum);
  }
}

template <typename A, Combine COMBINE, int VECTORS>
INLINE void sum_any_taps_block(A* out, const A* map, const A* spatial,
                               const std::vector<FlatTap>& taps, const A* channel) {
  const int64_t count = taps.size();
  Vec<A> sums[VECTORS] = {};
  for (int64_t j = 0; j < count; ++j, spatial += kLanes<A>) {
    const Vec<A> c = broadcast(channel[taps[j].k]);
    const A* const at = map + taps[j].distance;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
      sums[v] += combine<COMBINE>(c, load<A>(spatial + v * count * kLanes<A>)) *
                 load<A>(at + v * kLanes<A>);
  }
  for (int v = 0; v < VECTORS; ++v) store<A>(out + v * kLanes<A>, sums[v]);
}

template <typename A, Combine COMBINE>
void sum_taps(A* out, const A* map, const A* spatial, const std::vector<FlatTap>& taps,
              const A* channel, int64_t n) {
  if (taps.size() == 9)
    return sum_nine_taps<A, COMBINE>(out, map, spatial, taps.data(), channel, n);
  constexpr int64_t kStep = 4 * kLanes<A>;
  const int64_t count = taps.size();
  int64_t p = 0;
  for (; p + kStep <= n; p += kStep)
    sum_any_taps_block<A, COMBINE, 4>(out + p, map + p, spatial + p * count, taps, channel);
  for (; p < n; p += kLanes<A>)
    sum_any_taps_block<A, COMBINE, 1>(out + p, map + p, spatial + p * count, taps, channel);
}

// out_c[p] = sum_j spatial_j[p] * map_c[p + distance_j] for some channels c, which share the loads
// of the filters.
template <typename A, int CHANNELS>
INLINE void sum_channels_block(A* out, int64_t out_plane, const A* map, int64_t map_plane,
                               const A* spatial, const std::vector<FlatTap>& taps) {
  const int64_t count = taps.size();
  Vec<A> sums[CHANNELS] = {};
  for (int64_t j = 0; j < count; ++j, spatial += kLanes<A>) {
    const Vec<A> s = load<A>(spatial);
    load_each<CHANNELS>(map + taps[j].distance, map_plane,
                        [&](int c, const A* p) { sums[c] += s * load<A>(p); });
  }
#pragma GCC unroll 8
  for (int c = 0; c < CHANNELS; ++c) store<A>(out + c * out_plane, sums[c]);
}

// The same for `channels` of them and p in [0, n), rounded up to whole vectors.
template <typename A>
void sum_channels(A* out, int64_t out_plane, const A* map, int64_t map_plane, const A* spatial,
                  const std::vector<FlatTap>& taps, int64_t channels, int64_t n) {
  const int64_t count = taps.size();
  int64_t c = 0;
  const auto run = [&](auto size) {
    constexpr int kChannels = decltype(size)::value;
    for (; c + kChannels <= channels; c += kChannels)
      for (int64_t p = 0; p < n; p += kLanes<A>)
        sum_channels_block<A, kChannels>(out + c * out_plane + p, out_plane,
                                         map + c * map_plane + p, map_plane, spatial + p * count,
                                         taps);
  };
  run(std::integral_constant<int, 8>());
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 1>());
}

// Channels whose scratch planes are filled before any is worked on: loads from just written
// scratch, at other boundaries than the stores', would wait for these. Without channel filters
// channels share what they load.
inline int64_t channel_group(const Band& layout, Combine combine) {
  return std::clamp<int64_t>(4096 / layout.plane, combine == Combine::kAlone ? 8 : 1, 16);
}

// Loads the inputs of units [begin, end), up to `group` channels of a group at a time, and calls
// f(b, g, first channel, number of channels, rows, whether these have other filters).
template <typename T, typename A, typename F>
void each_channels(const DdfForward<T>& op, const Band& layout, A* input, int64_t input_size,
                   int64_t group, int64_t begin, int64_t end, const F& f) {
  const DdfShape& s = op.shape;
  const MapStrides& from = op.features_strides;
  const int64_t members = s.members();
  for (int64_t unit = begin, n; unit < end; unit += n) {
    const int64_t member = unit % members, g = unit / members % s.groups;
    const int64_t band = unit / s.C % op.bands.count, b = unit / s.C / op.bands.count;
    const int64_t first = s.channel(g) + member * s.inner;
    const Range rows = op.bands.of(band, s.Ho);
    n = std::min({group, members - member, end - unit});
    for (int64_t i = 0; i < n; ++i)
      load_input(input + i * input_size, layout,
                 op.features + b * from.b + (first + i * s.inner) * from.c, from.y, from.x, rows,
                 op.rows, op.columns, s.upsample);
    f(b, g, first, n, rows, unit == begin || member == 0);
  }
}

template <typename T, Combine COMBINE>
void forward_planes(const DdfForward<T>& op, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const DdfShape& s = op.shape;
  const MapStrides& to = op.out_strides;
  const Band layout(op.rows.reach, op.columns.reach, s.Wo, op.bands.rows, kLanes<A>);
  const Band filters(0, op.columns.reach, s.Wo, op.bands.rows, kLanes<A>);
  const FlatTaps taps(op.rows, op.columns, layout, s.K);
  const int64_t group = channel_group(layout, COMBINE);
  const int64_t input_size = taps.input.size() * layout.plane;
  const int64_t spatial_size = taps.output.size() * filters.vectors * kLanes<A>;
  const int64_t channel_size = s.taps() + kLanes<A>;
  Scratch<A> scratch(spatial_size + group * (input_size + layout.plane) + channel_size);
  A *spatial = scratch.take(spatial_size), *input = scratch.take(group * input_size);
  A *out = scratch.take(group * layout.plane), *channel = scratch.take(channel_size);
  const auto run = [&](int64_t b, int64_t g, int64_t first, int64_t n, Range rows, bool other) {
    if (other) load_spatial(spatial, filters, op, b, g, rows, taps.output, false, out);
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (COMBINE != Combine::kAlone) load_channel(channel, op, b, first + i * s.inner);
      sum_taps<A, COMBINE>(out + i * layout.plane, input + i * input_size + layout.origin, spatial,
                           taps.output, channel, layout.span(rows));
    }
    for (int64_t i = 0; i < n; ++i)
      store_rows(op.out + b * to.b + (first + i * s.inner) * to.c + rows.begin * to.y, to.y,
                 out + i * layout.plane, layout.pitch, rows.end - rows.begin, s.Wo);
  };
  each_channels(op, layout, input, input_size, group, begin, end, run);
}

}  // namespace timm_dynamic::ISA
