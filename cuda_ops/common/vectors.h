// Vectors of the accumulation type: loads and stores with conversion, for one instruction set.
// Included once per instruction set, so no include guard: the includer defines ISA (a namespace
// name), VECTOR_BYTES and, for what the compiler does not find by itself, ISA_LEVEL (0 portable,
// 2 AVX2 + F16C, 4 AVX-512). The includer also brings in the standard headers.

#define INLINE inline __attribute__((always_inline))

namespace timm_dynamic::ISA {

template <typename E, int BYTES>
struct VectorType {
  typedef E type __attribute__((vector_size(BYTES)));
};
template <typename A>
using Vec = typename VectorType<A, VECTOR_BYTES>::type;
template <typename A>
constexpr int kLanes = VECTOR_BYTES / sizeof(A);

template <typename V>
INLINE V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V>
INLINE void store_bits(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// The n < lanes first elements at p, then zeros; nothing beyond them is touched.
template <typename V, typename E>
INLINE V load_first_bits(const E* p, int64_t n) {
#if ISA_LEVEL == 4
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(V) == 64 && sizeof(E) == 4) return (V)_mm512_maskz_loadu_ps(mask, p);
  if constexpr (sizeof(V) == 64 && sizeof(E) == 8) return (V)_mm512_maskz_loadu_pd(mask, p);
  if constexpr (sizeof(V) == 32 && sizeof(E) == 2) return (V)_mm256_maskz_loadu_epi16(mask, p);
#elif ISA_LEVEL == 2
  if constexpr (sizeof(V) == 32 && sizeof(E) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
    return (V)_mm256_maskload_ps(reinterpret_cast<const float*>(p), mask);
  }
#endif
  E elements[sizeof(V) / sizeof(E)] = {};
  for (int64_t i = 0; i < n; ++i) elements[i] = p[i];
  return load_bits<V>(elements);
}

template <typename V, typename E>
INLINE void store_first_bits(E* p, V v, int64_t n) {
#if ISA_LEVEL == 4
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(V) == 64 && sizeof(E) == 4) return _mm512_mask_storeu_ps(p, mask, (__m512)v);
  if constexpr (sizeof(V) == 64 && sizeof(E) == 8)
    return _mm512_mask_storeu_pd(p, mask, (__m512d)v);
  if constexpr (sizeof(V) == 32 && sizeof(E) == 2)
    return _mm256_mask_storeu_epi16(p, mask, (__m256i)v);
#endif
  E elements[sizeof(V) / sizeof(E)];
  store_bits(elements, v);
  for (int64_t i = 0; i < n; ++i) p[i] = elements[i];
}

// How a storage type becomes a vector of the accumulation type and back. `Bits` is what memory
// holds, `Packed` a vector's worth of it.
template <typename T>
struct Storage {  // float, double
  using Bits = T;
  using Packed = Vec<T>;
  static INLINE Vec<T> unpack(Packed v) { return v; }
  static INLINE Packed pack(Vec<T> v) { return v; }
};

template <>
struct Storage<c10::BFloat16> {  // the upper half of a float
  using Bits = uint16_t;
  using Packed = typename VectorType<uint16_t, VECTOR_BYTES / 2>::type;
  using Word = Vec<uint32_t>;
  static INLINE Vec<float> unpack(Packed v) {
    return (Vec<float>)(__builtin_convertvector(v, Word) << 16);
  }
  static INLINE Word round(Vec<float> v) {  // to nearest even; the result is the upper half
    const Word bits = (Word)v, nan = (Word)(v != v);
    return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~nan) | (0x7fc00000 & nan);
  }
  static INLINE Packed pack(Vec<float> v) {
    return __builtin_convertvector(round(v) >> 16, Packed);
  }
};

template <>
struct Storage<c10::Half> {
  using Bits = uint16_t;
  using Packed = typename VectorType<uint16_t, VECTOR_BYTES / 2>::type;
#if ISA_LEVEL == 4
  static INLINE Vec<float> unpack(Packed v) {
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v);
  }
  static INLINE Packed pack(Vec<float> v) {
    return (Packed)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0);
  }
#elif ISA_LEVEL == 2
  static INLINE Vec<float> unpack(Packed v) { return (Vec<float>)_mm256_cvtph_ps((__m128i)v); }
  static INLINE Packed pack(Vec<float> v) { return (Packed)_mm256_cvtps_ph((__m256)v, 0); }
#else
  static INLINE Vec<float> unpack(Packed v) {
    Vec<float> result;
    for (int i = 0; i < kLanes<float>; ++i) result[i] = c10::Half(v[i], c10::Half::from_bits());
    return result;
  }
  static INLINE Packed pack(Vec<float> v) {
    Packed result;
    for (int i = 0; i < kLanes<float>; ++i) result[i] = c10::Half(v[i]).x;
    return result;
  }
#endif
};

// The vector of the min(n, lanes) elements at p, zero beyond them; n may be negative.
template <typename A, typename T>
INLINE Vec<A> load(const T* p, int64_t n = kLanes<A>) {
  using S = Storage<T>;
  const auto bits = reinterpret_cast<const typename S::Bits*>(p);
  if (n >= kLanes<A>) return S::unpack(load_bits<typename S::Packed>(bits));
  if (n <= 0) return Vec<A>{};
  return S::unpack(load_first_bits<typename S::Packed>(bits, n));
}

template <typename A, typename T>
INLINE void store(T* p, Vec<A> v, int64_t n = kLanes<A>) {
  using S = Storage<T>;
  const auto bits = reinterpret_cast<typename S::Bits*>(p);
  if (n >= kLanes<A>) return store_bits(bits, S::pack(v));
  if (n > 0) store_first_bits(bits, S::pack(v), n);
}

// Even and odd elements of (a, b) into a and b, and back.
template <typename A, size_t... I>
INLINE void deinterleave(Vec<A>& a, Vec<A>& b, std::index_sequence<I...>) {
  const Vec<A> even = __builtin_shufflevector(a, b, (2 * I)...);
  b = __builtin_shufflevector(a, b, (2 * I + 1)...);
  a = even;
}

template <typename A, size_t... I>
INLINE void interleave(Vec<A>& a, Vec<A>& b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
  const Vec<A> low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * n)...);
  b = __builtin_shufflevector(a, b, (I / 2 + n / 2 + (I % 2) * n)...);
  a = low;
}

template <typename A>
using AllLanes = std::make_index_sequence<kLanes<A>>;

// Two vectors of consecutive elements, in the order of lanes that costs least; `order_pair` puts a
// pair of accumulation type vectors into the same order, `store_pair` undoes it.
template <typename A, typename T>
INLINE void load_pair(const T* p, Vec<A>& a, Vec<A>& b) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {  // the even elements, then the odd ones
    const auto bits = load_bits<Vec<uint32_t>>(p);
    a = (Vec<A>)(bits << 16);
    b = (Vec<A>)(bits & 0xffff0000);
  } else {
    a = load<A>(p);
    b = load<A>(p + kLanes<A>);
  }
}

template <typename A, typename T>
INLINE void order_pair(Vec<A>& a, Vec<A>& b) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) deinterleave<A>(a, b, AllLanes<A>());
}

template <typename A, typename T>
INLINE void store_pair(T* p, Vec<A> a, Vec<A> b) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    store_bits(p, (Storage<T>::round(a) >> 16) | (Storage<T>::round(b) & 0xffff0000));
  } else {
    store<A>(p, a);
    store<A>(p + kLanes<A>, b);
  }
}

template <typename A>
INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

template <typename V>
INLINE auto sum_lanes(V v) {
  constexpr int kHalf = sizeof(V) / 2;
  using E = std::remove_cvref_t<decltype(v[0])>;
  if constexpr (kHalf < 16) {
    E sum = v[0];
    for (unsigned i = 1; i < sizeof(V) / sizeof(E); ++i) sum += v[i];
    return sum;
  } else {
    typename VectorType<E, kHalf>::type halves[2];
    __builtin_memcpy(halves, &v, sizeof(V));
    return sum_lanes(halves[0] + halves[1]);
  }
}

// Of n elements.
INLINE float sum_of(const float* p, int64_t n) {
  Vec<float> sums[4] = {};
  int64_t at = 0;
  for (; at + 4 * kLanes<float> <= n; at += 4 * kLanes<float>)
    for (int v = 0; v < 4; ++v) sums[v] += load<float>(p + at + v * kLanes<float>);
  for (; at < n; at += kLanes<float>) sums[0] += load<float>(p + at, n - at);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec<float> sums[2] = {};
  int64_t at = 0;
  for (; at + 2 * kLanes<float> <= n; at += 2 * kLanes<float>)
    for (int v = 0; v < 2; ++v)
      sums[v] += load<float>(a + at + v * kLanes<float>) * load<float>(b + at + v * kLanes<float>);
  for (; at < n; at += kLanes<float>)
    sums[0] += load<float>(a + at, n - at) * load<float>(b + at, n - at);
  return sum_lanes(sums[0] + sums[1]);
}

// Lane i of the result is the sum of the lanes of vectors[i]; `vectors` is overwritten.
template <typename A>
INLINE Vec<A> sum_each(Vec<A>* vectors) {
  for (int n = kLanes<A>; n > 1; n /= 2) {
    for (int i = 0; i < n / 2; ++i) {
      Vec<A> a = vectors[2 * i], b = vectors[2 * i + 1];
      deinterleave<A>(a, b, AllLanes<A>());
      vectors[i] = a + b;
    }
  }
  return vectors[0];
}

// The rows of a square become its columns.
template <typename A>
INLINE void transpose(Vec<A>* rows) {
  constexpr int n = kLanes<A>;
#if ISA_LEVEL == 2
  if constexpr (n == 8) {  // with half the shuffles of what follows
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
      a[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = (Vec<A>)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      rows[i + 4] = (Vec<A>)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
    return;
  }
#endif
  for (int step = 1; step < n; step *= 2) {  // each interleaves the first half with the second
    Vec<A> next[n];
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = rows[i], next[2 * i + 1] = rows[i + n / 2];
      interleave<A>(next[2 * i], next[2 * i + 1], AllLanes<A>());
    }
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// Columns of `rows` rows, `step` apart, as rows of vectors `to_step` apart, of which n count.
template <bool WHOLE, typename A, typename T>
INLINE void copy_strip(A* to, int64_t to_step, const T* from, int64_t step, int64_t rows,
                       int64_t columns, int64_t n) {
  constexpr int64_t kStep = kLanes<A>;
  int64_t left = columns;
  if (columns % kStep == 1) {  // that one is cheaper than a square
    Vec<A> column = {};
#pragma GCC unroll 16
    for (int64_t r = 0; r < kStep; ++r)
      if (WHOLE || r < rows) column[r] = static_cast<A>(from[r * step + columns - 1]);
    store<A>(to + --left * to_step, column, n);
  }
  for (int64_t j = 0; j < left; j += kStep) {
    // The last squares overlap; a single one may be cut off.
    const int64_t first = columns < kStep ? 0 : std::min(j, left - kStep);
    Vec<A> square[kStep];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kStep; ++r)
      square[r] = WHOLE || r < rows ? load<A>(from + r * step + first, columns) : Vec<A>{};
    transpose<A>(square);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kStep; ++r)
      if (columns >= kStep || r < columns) store<A>(to + (first + r) * to_step, square[r], n);
  }
}

// to[j*to_step + i] = from[i*step_i + j*step_j] for i < n and j < m. PADDED: and zeros beyond n up
// to whole vectors.
template <bool PADDED, typename A, typename T>
void copy_transposed(A* to, int64_t to_step, const T* from, int64_t step_i, int64_t step_j,
                     int64_t n, int64_t m) {
  constexpr int64_t kStep = kLanes<A>;
  if (step_j != 1 || m < kStep) {
    const int64_t padded = PADDED ? (n + kStep - 1) / kStep * kStep : n;
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t i = 0; i < n; ++i)
        to[j * to_step + i] = static_cast<A>(from[i * step_i + j * step_j]);
      for (int64_t i = n; i < padded; ++i) to[j * to_step + i] = A(0);
    }
    return;
  }
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep, from += kStep * step_i)
    copy_strip<true>(to + i, to_step, from, step_i, kStep, m, kStep);
  if (i < n) copy_strip<false>(to + i, to_step, from, step_i, n - i, m, PADDED ? kStep : n - i);
}

// A vector's worth of zeros and more at `to`, n >= 1 elements at least.
template <typename A>
INLINE void zero_row(A* to, int64_t n) {
  for (int64_t x = 0; x < n - kLanes<A>; x += kLanes<A>) store<A>(to + x, Vec<A>{});
  store<A>(to + std::max<int64_t>(n - kLanes<A>, 0), Vec<A>{});
}

// `rows` rows of n elements to scratch. Rows shorter than a vector leave zeros behind them, so rows
// are written in ascending order and the last one is followed by slack.
template <typename A, typename T>
INLINE void load_rows(A* to, int64_t pitch, const T* from, int64_t stride_y, int64_t stride_x,
                      int64_t rows, int64_t n) {
  constexpr int64_t kStep = kLanes<A>;
  for (int64_t y = 0; y < rows; ++y, to += pitch, from += stride_y) {
    if (stride_x != 1) {
      for (int64_t x = 0; x < n; ++x) to[x] = static_cast<A>(from[x * stride_x]);
    } else if (n < kStep) {
      store<A>(to, load<A>(from, n));
    } else {
      for (int64_t x = 0; x < n - kStep; x += kStep) store<A>(to + x, load<A>(from + x));
      store<A>(to + n - kStep, load<A>(from + n - kStep));  // overlaps
    }
  }
}

template <typename A, typename T>
INLINE void store_rows(T* to, int64_t stride_y, const A* from, int64_t pitch, int64_t rows,
                       int64_t n) {
  constexpr int64_t kStep = kLanes<A>;
  for (int64_t y = 0; y < rows; ++y, to += stride_y, from += pitch) {
    if (n < kStep) {
      store<A>(to, load<A>(from), n);
    } else {
      for (int64_t x = 0; x < n - kStep; x += kStep) store<A>(to + x, load<A>(from + x));
      store<A>(to + n - kStep, load<A>(from + n - kStep));
    }
  }
}

}  // namespace timm_dynamic::ISA
