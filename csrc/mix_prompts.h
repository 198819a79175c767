// The weighted sum of selected experts, and its backward. Included once for each target.

// Columns that a thread works on at a time: an output and the experts' parts stay in the first-level cache.
inline constexpr int64_t kColumns = 512;

inline void mix_prompts(const MixPrompts& op, float* out) {
  const int64_t blocks = (op.width + kColumns - 1) / kColumns;
  parallel_for(0, blocks * op.B, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i % op.B, first = i / op.B * kColumns, columns = std::min(kColumns, op.width - first);
      float* to = out + b * op.width + first;
      std::fill_n(to, columns, 0.0f);
      for (int64_t j = 0; j < op.k; ++j)
        add_scaled(to, op.weights.row(b)[j], op.experts + op.indices.row(b)[j] * op.width + first, columns);
    }
  });
}

inline void mix_prompts_backward(const MixPrompts& op, const float* grad_out, float* grad_experts, float* grad_weights) {
  if (grad_weights)
    parallel_for(0, op.B, 4, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t j = 0; j < op.k; ++j)
          grad_weights[b * op.k + j] = dot(grad_out + b * op.width, op.experts + op.indices.row(b)[j] * op.width, op.width);
    });
  if (grad_experts)
    // Each thread has columns of its own, so that items are added up in the same order whatever the number of threads.
    parallel_for(0, (op.width + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kColumns, columns = std::min(kColumns, op.width - first);
        for (int64_t j = 0; j < op.K; ++j) std::fill_n(grad_experts + j * op.width + first, columns, 0.0f);
        for (int64_t b = 0; b < op.B; ++b)
          for (int64_t j = 0; j < op.k; ++j)
            add_scaled(
                grad_experts + op.indices.row(b)[j] * op.width + first, op.weights.row(b)[j], grad_out + b * op.width + first, columns);
      }
    });
}
