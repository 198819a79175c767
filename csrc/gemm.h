// Small matrix products on packed scratch, the only heavy arithmetic here. Included once for each target.

// Rows x vectors of accumulators that fit into the registers beside a row of B and a broadcast: 32 registers or 16.
inline constexpr int kRows = 6, kVecs = MOPE_VECS;

// The left factor of C[m][n] = sum_k A(m, k) B[k][n]; it is read float by float, so that either index may be the contiguous one.
struct Left {
  const float* data;
  int64_t row, depth;  // the strides of m and of k
};

template <int kM, int kN, bool kAdd>
inline void product_tile(
    int64_t depth, Left a, const float* MOPE_RESTRICT b, int64_t b_stride, float* MOPE_RESTRICT c, int64_t c_stride) {
  Vec sum[kM][kN];
  MOPE_UNROLL for (int m = 0; m < kM; ++m)
    MOPE_UNROLL for (int n = 0; n < kN; ++n) sum[m][n] = splat(0.0f);
  const float* row[kM];
  MOPE_UNROLL for (int m = 0; m < kM; ++m) row[m] = a.data + m * a.row;
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Vec right[kN];
    MOPE_UNROLL for (int n = 0; n < kN; ++n) right[n] = load(b + n * kLanes);
    MOPE_UNROLL for (int m = 0; m < kM; ++m) {
      const float left = row[m][k * a.depth];
      MOPE_UNROLL for (int n = 0; n < kN; ++n) sum[m][n] += left * right[n];
    }
  }
  // C is read here and not at first: from sums that were loaded, GCC makes a loop of half the speed for 16 registers.
  MOPE_UNROLL for (int m = 0; m < kM; ++m)
    MOPE_UNROLL for (int n = 0; n < kN; ++n) {
      float* to = c + m * c_stride + n * kLanes;
      store(to, kAdd ? load(to) + sum[m][n] : sum[m][n]);
    }
}

// C (+)= A B for `rows` rows and whole vectors of columns: B and C are readable and writable up to a multiple of kLanes.
template <bool kAdd>
inline void product(
    int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  // So many rows of B stay in the first-level cache while the rows of A pass.
  constexpr int64_t kDepth = 128;
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
    const int64_t part = depth - k < kDepth ? depth - k : kDepth;
    in_blocks<kVecs>(vectors(columns), [&](auto n_count, int64_t n) {
      in_blocks<kRows>(rows, [&](auto m_count, int64_t m) {
        const Left left{a.data + m * a.row + k * a.depth, a.row, a.depth};
        const float* right = b + k * b_stride + n * kLanes;
        float* to = c + m * c_stride + n * kLanes;
        if (kAdd || k > 0)
          product_tile<m_count(), n_count(), true>(part, left, right, b_stride, to, c_stride);
        else
          product_tile<m_count(), n_count(), false>(part, left, right, b_stride, to, c_stride);
      });
    });
  }
}
