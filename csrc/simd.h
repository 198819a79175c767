// A vector register of MOPE_LANES floats, and operations on it. Included once per target.

inline constexpr int kLanes = MOPE_LANES;

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline void put(float* p, float x) { *p = x; }
// Rounds to nearest, ties to even. NaN stays NaN.
inline void put(BFloat16* p, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  p->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#if defined(__GNUC__)

typedef float Vec __attribute__((vector_size(4 * MOPE_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * MOPE_LANES)));
typedef uint32_t BitsVec __attribute__((vector_size(4 * MOPE_LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * MOPE_LANES)));

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline Vec load(const BFloat16* p) {
  HalfVec halves;
  std::memcpy(&halves, p, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, BitsVec) << 16);
}
inline void store(BFloat16* p, Vec x) {
  const BitsVec bits = (BitsVec)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const HalfVec halves = __builtin_convertvector(x != x ? BitsVec{} + 0x7fc0 : rounded, HalfVec);
  std::memcpy(p, &halves, sizeof halves);
}
inline Vec splat(float x) { return x - Vec{}; }

// The result is b where a is NaN.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline Vec reciprocal_or_zero(Vec x) { return x == 0.0f ? Vec{} : 1.0f / x; }

// e^x to 1 ulp for x <= 88, inf above that, 0 if the result would be denormal. NaN stays NaN.
inline Vec exp(Vec x) {
  // x = n ln 2 + r with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  const Vec shift = splat(12582912.0f), clamped = x > 88.4f ? splat(88.4f) : x;
  const Vec shifted = clamped * 1.44269504f + shift, n = shifted - shift;
  // Split ln 2 into two parts, such that n times the first is exact.
  const Vec r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
  // e^r = 1 + r + r^2 q(r), with a minimax fit of the relative error.
  Vec q = r * 0.00138145988f + 0.00836871658f;
  q = q * r + 0.041668389f;
  q = q * r + 0.166665211f;
  q = q * r + 0.49999994f;
  const Vec power = q * (r * r) + r + 1.0f;
  const IntVec exponent = ((IntVec)shifted << 23) + 0x3f800000;
  const Vec result = power * (Vec)exponent;
  return x < -87.33f ? Vec{} : result;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MOPE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(MOPE_SHUFFLE)
#define MOPE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

template <int... kLane>
inline Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return MOPE_SHUFFLE(a, b, (kLane / 2 + kLane % 2 * kLanes)...);
}
template <int... kLane>
inline Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return MOPE_SHUFFLE(a, b, (kLane / 2 + kLane % 2 * kLanes + kLanes / 2)...);
}
#undef MOPE_SHUFFLE

// to[j][i] = from[i][j] for a square of kLanes rows and columns.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  Vec row[kLanes], next[kLanes];
  MOPE_UNROLL for (int i = 0; i < kLanes; ++i) row[i] = load(from + i * from_stride);
  // Interleaving the two halves of the rows log2(kLanes) times transposes the square.
  MOPE_UNROLL for (int width = 1; width < kLanes; width *= 2) {
    MOPE_UNROLL for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(row[i], row[i + kLanes / 2], lanes);
      next[2 * i + 1] = interleave_high(row[i], row[i + kLanes / 2], lanes);
    }
    MOPE_UNROLL for (int i = 0; i < kLanes; ++i) row[i] = next[i];
  }
  MOPE_UNROLL for (int i = 0; i < kLanes; ++i) store(to + i * to_stride, row[i]);
}

#else  // Without vector extensions, use arrays, which the compiler may vectorise.

struct Vec {
  float lane[kLanes];
};

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

template <class F>
inline Vec map(F f) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x.lane[i] = f(i);
  return x;
}
inline Vec load(const BFloat16* p) {
  return map([&](int i) { return to_float(p[i]); });
}
inline void store(BFloat16* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) put(p + i, x.lane[i]);
}
inline Vec splat(float x) {
  return map([&](int) { return x; });
}
inline Vec operator+(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec operator*(float a, Vec b) { return splat(a) * b; }
inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec max(Vec a, Vec b) {
  return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec reciprocal_or_zero(Vec x) {
  return map([&](int i) { return x.lane[i] == 0.0f ? 0.0f : 1.0f / x.lane[i]; });
}
inline Vec exp(Vec x) {
  return map([&](int i) { return std::exp(x.lane[i]); });
}
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int j = 0; j < kLanes; ++j)
    for (int i = 0; i < kLanes; ++i) to[j * to_stride + i] = from[i * from_stride + j];
}

#endif

inline int64_t vectors(int64_t floats) { return (floats + kLanes - 1) / kLanes; }

// Calls f(count, first) for blocks of at most kMost of `total` elements, with the count as a compile-time constant.
template <int kMost, class F>
inline void in_blocks(int64_t total, const F& f, int64_t first = 0) {
  for (; first + kMost <= total; first += kMost) f(std::integral_constant<int, kMost>(), first);
  if constexpr (kMost > 1)
    if (first < total) in_blocks<kMost == 6 ? 4 : kMost / 2>(total, f, first);
}

// Adds halves recursively: adding one lane after the other would take longer than summing a short row.
inline float sum_lanes(Vec x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  MOPE_UNROLL for (int half = kLanes / 2; half > 0; half /= 2)
    MOPE_UNROLL for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float dot(const float* a, const float* b, int64_t n) {
  Vec sum[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    MOPE_UNROLL for (int j = 0; j < 4; ++j) sum[j] += load(a + i + j * kLanes) * load(b + i + j * kLanes);
  for (; i + kLanes <= n; i += kLanes) sum[0] += load(a + i) * load(b + i);
  float total = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// to = scale * from. Either type may be float or BFloat16.
template <class From, class To>
inline void convert(const From* MOPE_RESTRICT from, int64_t n, To* MOPE_RESTRICT to, float scale = 1.0f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, scale * load(from + i));
  for (; i < n; ++i) put(to + i, scale * to_float(from[i]));
}

// Returns a row of n elements as floats: in place if its type is float, else converted to `scratch`.
template <int kDims, class... Index>
inline const float* floats(const AnyInput<kDims>& from, int64_t n, float* scratch, Index... index) {
  if (!from.is_bfloat16) return from.template as<float>().row(index...);
  convert(from.template as<BFloat16>().row(index...), n, scratch);
  return scratch;
}

// Stores n floats to a row of either type.
template <int kDims, class... Index>
inline void put_row(const float* from, int64_t n, const AnyOutput<kDims>& to, Index... index) {
  to.visit([&](auto view) { convert(from, n, view.row(index...)); });
}

// to += scale * from
inline void add_scaled(float* MOPE_RESTRICT to, float scale, const float* MOPE_RESTRICT from, int64_t n) {
  MOPE_SIMD for (int64_t i = 0; i < n; ++i) to[i] += scale * from[i];
}
