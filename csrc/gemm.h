// Small matrix products on packed scratch memory, the only heavy arithmetic in this library. Included once per target.

// Rows x vectors of accumulators that fit in 32 or 16 registers, together with a row of B and a broadcast.
inline constexpr int kRows = 6, kVecs = MOPE_VECS;

// The left factor of C[m][n] = sum_k A(m, k) B[k][n]. It is read one float at a time, so either index may be the contiguous one.
struct Left {
  const float* data;
  int64_t row, depth;  // the strides of m and of k
};

// Element type of a product's factors and their multiplication. Other types may store kDepth elements in the place of one float.
struct Floats {
  static constexpr int64_t kDepth = 1;
  static float left(const float* p) { return *p; }
  static Vec right(const float* p) { return load(p); }
  static Vec multiply_add(float a, Vec b, Vec sum) { return sum + a * b; }
};

template <int kM, int kN, bool kAdd, class Factors>
inline void product_tile(
    int64_t depth, Left a, const float* MOPE_RESTRICT b, int64_t b_stride, float* MOPE_RESTRICT c, int64_t c_stride) {
  Vec sum[kM][kN];
  MOPE_UNROLL for (int m = 0; m < kM; ++m)
    MOPE_UNROLL for (int n = 0; n < kN; ++n) sum[m][n] = splat(0.0f);
  const float* row[kM];
  MOPE_UNROLL for (int m = 0; m < kM; ++m) row[m] = a.data + m * a.row;
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    decltype(Factors::right(b)) right[kN];
    MOPE_UNROLL for (int n = 0; n < kN; ++n) right[n] = Factors::right(b + n * kLanes);
    MOPE_UNROLL for (int m = 0; m < kM; ++m) {
      const auto left = Factors::left(row[m] + k * a.depth);
      MOPE_UNROLL for (int n = 0; n < kN; ++n) sum[m][n] = Factors::multiply_add(left, right[n], sum[m][n]);
    }
  }
  // Read C here rather than before the loop: with initially loaded sums, GCC's loop for 16 registers is half as fast.
  MOPE_UNROLL for (int m = 0; m < kM; ++m)
    MOPE_UNROLL for (int n = 0; n < kN; ++n) {
      float* to = c + m * c_stride + n * kLanes;
      store(to, kAdd ? load(to) + sum[m][n] : sum[m][n]);
    }
}

// C (+)= A B for `rows` rows. Columns are rounded up to whole vectors, so B and C must be accessible up to a multiple of kLanes.
template <bool kAdd, class Factors = Floats>
inline void product(
    int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  // This many rows of B stay in the L1 cache while all rows of A are processed.
  constexpr int64_t kDepth = 128;
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
    const int64_t part = depth - k < kDepth ? depth - k : kDepth;
    in_blocks<kVecs>(vectors(columns), [&](auto n_count, int64_t n) {
      // Narrow tiles have more rows, because registers suffice and more independent sums hide the latency.
      in_blocks<n_count() <= kVecs / 2 ? 2 * kRows : kRows>(rows, [&](auto m_count, int64_t m) {
        const Left left{a.data + m * a.row + k * a.depth, a.row, a.depth};
        const float* right = b + k * b_stride + n * kLanes;
        float* to = c + m * c_stride + n * kLanes;
        if (kAdd || k > 0)
          product_tile<m_count(), n_count(), true, Factors>(part, left, right, b_stride, to, c_stride);
        else
          product_tile<m_count(), n_count(), false, Factors>(part, left, right, b_stride, to, c_stride);
      });
    });
  }
}
