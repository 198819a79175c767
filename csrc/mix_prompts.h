// The weighted sum of selected experts, and its backward. Included once per target.

// Number of columns that a thread processes at a time: an output and the experts' parts then stay in the L1 cache. In the gradient
// of the experts, each thread has its own columns, so the order of summation over items does not depend on the number of threads.
inline constexpr int64_t kColumns = 256;

// Calls f(first, columns) in parallel for blocks of an expert's columns.
template <class F>
inline void over_columns(int64_t width, const F& f) {
  parallel_for(0, (width + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumns; first < std::min(end * kColumns, width); first += kColumns)
      f(first, std::min(kColumns, width - first));
  });
}

// If every expert is selected, mixing is a matrix product with these weights (B,K). Empty otherwise, or if padding would be needed.
inline std::vector<float> dense_weights(const MixPrompts& op) {
  if (op.k != op.K || op.width % kLanes) return {};
  std::vector<float> dense(op.B * op.K);
  for (int64_t b = 0; b < op.B; ++b)
    for (int64_t j = 0; j < op.k; ++j) dense[b * op.K + op.indices.row(b)[j]] += op.weights.row(b)[j];
  return dense;
}

inline void mix_prompts(const MixPrompts& op, Output<2> out) {
  const std::vector<float> dense = dense_weights(op);
  over_columns(op.width, [&](int64_t first, int64_t columns) {
    if (!dense.empty())
      return product<false>(op.B, columns, op.K, {dense.data(), op.K, 1}, op.experts + first, op.width, out.data + first, out.stride[0]);
    for (int64_t b = 0; b < op.B; ++b) {
      float* to = out.row(b) + first;
      std::fill_n(to, columns, 0.0f);
      for (int64_t j = 0; j < op.k; ++j)
        add_scaled(to, op.weights.row(b)[j], op.experts + op.indices.row(b)[j] * op.width + first, columns);
    }
  });
}

// to[m][n] += the dot product of row m of a and row n of b, for whole vectors of columns.
template <int kM, int kN>
inline void add_dots(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t columns, float* to, int64_t to_stride) {
  Vec sum[kM][kN] = {};
  for (int64_t i = 0; i < columns; i += kLanes) {
    Vec right[kN];
    MOPE_UNROLL for (int n = 0; n < kN; ++n) right[n] = load(b + n * b_stride + i);
    MOPE_UNROLL for (int m = 0; m < kM; ++m) {
      const Vec left = load(a + m * a_stride + i);
      MOPE_UNROLL for (int n = 0; n < kN; ++n) sum[m][n] += left * right[n];
    }
  }
  MOPE_UNROLL for (int m = 0; m < kM; ++m)
    MOPE_UNROLL for (int n = 0; n < kN; ++n) to[m * to_stride + n] += sum_lanes(sum[m][n]);
}

// The gradient of the weights (B,k): the dot product of each selected expert with the gradient of the item.
inline void mix_weights_backward(const MixPrompts& op, Input<2> grad_out, float* grad_weights) {
  // If every expert is selected, process all in order, several items and experts at a time, which reads less memory.
  const bool dense = op.k == op.K && op.width % kLanes == 0;
  parallel_for(0, op.B, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> of_experts(dense ? (end - begin) * op.K : 0);
    std::fill(grad_weights + begin * op.k, grad_weights + end * op.k, 0.0f);
    // Use more columns per lane reduction if only a few rows have to stay in the cache.
    const int64_t block = dense ? 4 * kColumns : kColumns;
    for (int64_t first = 0; first < op.width; first += block) {
      const int64_t columns = std::min(block, op.width - first);
      if (dense) {
        in_blocks<2>(end - begin, [&](auto m_count, int64_t m) {
          in_blocks<4>(op.K, [&](auto n_count, int64_t n) {
            add_dots<m_count(), n_count()>(
                grad_out.row(begin + m) + first, grad_out.stride[0], op.experts + n * op.width + first, op.width, columns,
                of_experts.data() + m * op.K + n, op.K);
          });
        });
        continue;
      }
      for (int64_t b = begin; b < end; ++b)
        for (int64_t j = 0; j < op.k; ++j)
          grad_weights[b * op.k + j] += dot(grad_out.row(b) + first, op.experts + op.indices.row(b)[j] * op.width + first, columns);
    }
    if (dense)
      for (int64_t b = begin; b < end; ++b)
        for (int64_t j = 0; j < op.k; ++j) grad_weights[b * op.k + j] = of_experts[(b - begin) * op.K + op.indices.row(b)[j]];
  });
}

inline void mix_prompts_backward(const MixPrompts& op, Input<2> grad_out, float* grad_experts, float* grad_weights) {
  if (grad_weights) mix_weights_backward(op, grad_out, grad_weights);
  if (!grad_experts) return;
  const std::vector<float> dense = dense_weights(op);
  over_columns(op.width, [&](int64_t first, int64_t columns) {
    float* to = grad_experts + first;
    if (!dense.empty())
      return product<false>(op.K, columns, op.B, {dense.data(), 1, op.K}, grad_out.data + first, grad_out.stride[0], to, op.width);
    for (int64_t j = 0; j < op.K; ++j) std::fill_n(to + j * op.width, columns, 0.0f);
    for (int64_t b = 0; b < op.B; ++b)
      for (int64_t j = 0; j < op.k; ++j)
        add_scaled(to + op.indices.row(b)[j] * op.width, op.weights.row(b)[j], grad_out.row(b) + first, columns);
  });
}
