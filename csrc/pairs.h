// Products of pairs of bfloat16s with float sums. A pair holds two adjacent elements in a row of a left factor, or elements from
// two adjacent rows of a right factor. Included for targets with an instruction for this.

// Each pair is stored in the place of one float, with the first element in the lower half.
struct Pairs {
  static constexpr int64_t kDepth = 2;
  static __m512bh left(const float* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
  }
  static __m512bh right(const float* p) { return (__m512bh)load(p); }
  static Vec multiply_add(__m512bh a, __m512bh b, Vec sum) { return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b); }

  // Rounds to nearest.
  static Vec join(Vec first, Vec second) { return join(first, second, std::make_integer_sequence<int, kLanes>()); }

 private:
  template <int... kLane>
  static Vec join(Vec first, Vec second, std::integer_sequence<int, kLane...>) {
    const IntVec order{(kLane | (kLane + kLanes) << 16)...};
    return (Vec)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
};

// Copies the n elements of a row as pairs, zero-padded to `pairs`.
inline void pair_columns(const BFloat16* from, int64_t n, float* to, int64_t pairs) {
  std::memcpy(to, from, n * sizeof *from);
  std::memset(reinterpret_cast<BFloat16*>(to) + n, 0, (2 * pairs - n) * sizeof *from);
}

// Pairs the n elements of one row with those of the next, zero-padded to `pairs`.
inline void pair_rows(const BFloat16* first, const BFloat16* second, int64_t n, float* to, int64_t pairs) {
  MOPE_SIMD for (int64_t i = 0; i < n; ++i)
    to[i] = std::bit_cast<float>(uint32_t{first[i].bits} | uint32_t{second[i].bits} << 16);
  std::fill(to + n, to + pairs, 0.0f);
}
