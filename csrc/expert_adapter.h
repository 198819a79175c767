// The adapter with up-projections that are routed per row, and its backward. Included once per target.
//
// Each row is multiplied by the down-projection and by the router, which gives the mixed row [w_1 h ... w_E h | w_1 ... w_E]. The
// mixed row is multiplied by the up-projections stacked on their biases. The backward pass uses the transposed matrices.

// Rows per block, minimum rows per chunk, and maximum number of chunks. Parameter gradients are summed per chunk, so the order of
// summation depends on the number of rows, not on the number of threads.
inline constexpr int64_t kAdapterRows = 48, kAdapterChunk = 4 * kAdapterRows, kAdapterChunks = 64;

// Widths of a row before the mixture, [down | logits], and after it, exact and rounded up to whole vectors.
struct AdapterSizes {
  explicit AdapterSizes(const ExpertAdapter& op)
      : in(op.r + (op.router_weight ? op.E : 0)),
        hidden(op.E * op.r),
        out(hidden + op.E),
        in_padded(vectors(in) * kLanes),
        out_padded(vectors(out) * kLanes),
        d_padded(vectors(op.d) * kLanes) {}
  int64_t in, hidden, out, in_padded, out_padded, d_padded;
};

// These functions pack the right factors of the products: the down-projection (d, r) and [up-projections; biases] (out, d) for the
// forward pass, [down-projection; router] (in, d) and the up-projections (d, hidden) for the backward pass.
inline void pack_down(const ExpertAdapter& op, const AdapterSizes& size, float* down) {
  for (int64_t c = 0; c < op.d; ++c, down += size.in_padded) {
    for (int64_t k = 0; k < op.r; ++k) down[k] = op.down_weight[k * op.d + c];
    std::fill(down + op.r, down + size.in_padded, 0.0f);
  }
}
inline void pack_up(const ExpertAdapter& op, const AdapterSizes& size, float* out) {
  for (int64_t e = 0; e < op.E; ++e)
    for (int64_t c = 0; c < op.d; ++c)
      for (int64_t k = 0; k < op.r; ++k) out[(e * op.r + k) * size.d_padded + c] = op.up_weight[(e * op.d + c) * op.r + k];
  pack(op.up_bias, op.d, op.E, op.d, out + op.E * op.r * size.d_padded, size.d_padded);
}
inline void pack_back(const ExpertAdapter& op, const AdapterSizes& size, float* in) {
  pack(op.down_weight, op.d, op.r, op.d, in, size.d_padded);
  if (op.router_weight) pack(op.router_weight, op.d, op.E, op.d, in + op.r * size.d_padded, size.d_padded);
}
inline void pack_up_back(const ExpertAdapter& op, const AdapterSizes& size, float* up) {
  for (int64_t c = 0; c < op.d; ++c, up += size.out_padded) {
    for (int64_t e = 0; e < op.E; ++e) std::copy_n(op.up_weight + (e * op.d + c) * op.r, op.r, up + e * op.r);
    std::fill(up + size.hidden, up + size.out_padded, 0.0f);
  }
}

template <int kM, int kN>
inline void dot_tile(int64_t n, Input<2> a, Input<2> b, float* to, int64_t to_stride) {
  Vec sum[kM][kN];
  MOPE_UNROLL for (int i = 0; i < kM; ++i)
    MOPE_UNROLL for (int j = 0; j < kN; ++j) sum[i][j] = splat(0.0f);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    Vec right[kN];
    MOPE_UNROLL for (int j = 0; j < kN; ++j) right[j] = load(b.row(j) + k);
    MOPE_UNROLL for (int i = 0; i < kM; ++i) {
      const Vec left = load(a.row(i) + k);
      MOPE_UNROLL for (int j = 0; j < kN; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < kM; ++i)
    for (int j = 0; j < kN; ++j) {
      alignas(64) float lanes[kLanes];
      store(lanes, sum[i][j]);
      float total = 0.0f;
      for (const float lane : lanes) total += lane;
      for (int64_t rest = k; rest < n; ++rest) total += a.row(i)[rest] * b.row(j)[rest];
      to[i * to_stride + j] = total;
    }
}

// to[i][j] = dot product of rows a[i] and b[j] of n elements. For few columns, which `product` would round up to whole vectors.
inline void dots(int64_t rows, int64_t columns, int64_t n, Input<2> a, Input<2> b, float* to, int64_t to_stride) {
  in_blocks<kVecs>(columns, [&](auto j_count, int64_t j) {
    in_blocks<4>(rows, [&](auto i_count, int64_t i) {
      const Input<2> left{a.row(i), {a.stride[0]}}, right{b.row(j), {b.stride[0]}};
      dot_tile<i_count(), j_count()>(n, left, right, to + i * to_stride + j, to_stride);
    });
  });
}

inline float activation(const ExpertAdapter& op, float x) {
  // Written so that NaN stays NaN.
  return op.is_gelu ? 0.5f * x * (1.0f + std::erf(x * 0.70710678f)) : x < 0.0f ? 0.0f : x;
}

inline float activation_gradient(const ExpertAdapter& op, float x) {
  if (!op.is_gelu) return x <= 0.0f ? 0.0f : 1.0f;
  return 0.5f * (1.0f + std::erf(x * 0.70710678f)) + x * 0.39894228f * std::exp(-0.5f * x * x);
}

// Turns a row of the first product, [down | logits], into [down | weights] in place, and adds the biases.
inline void route_row(const ExpertAdapter& op, float* row) {
  for (int64_t k = 0; k < op.r; ++k) row[k] += op.down_bias[k];
  if (!op.router_weight) return;
  float* weights = row + op.r;
  float highest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
  for (int64_t e = 0; e < op.E; ++e) {
    weights[e] = (weights[e] + op.router_bias[e]) / op.temperature;
    highest = std::max(highest, weights[e]);
  }
  for (int64_t e = 0; e < op.E; ++e) sum += weights[e] = std::exp(weights[e] - highest);
  for (int64_t e = 0; e < op.E; ++e) weights[e] /= sum;
}

// Turns [down | weights] into [w_1 h ... w_E h | w_1 ... w_E].
inline void mix_row(const ExpertAdapter& op, const float* row, float* mixed) {
  for (int64_t k = 0; k < op.r; ++k) mixed[k] = activation(op, row[k]);
  if (!op.router_weight) {
    mixed[op.r] = 1.0f;
    return;
  }
  const float* weights = row + op.r;
  for (int64_t e = op.E - 1; e >= 0; --e)
    for (int64_t k = 0; k < op.r; ++k) mixed[e * op.r + k] = weights[e] * mixed[k];
  std::copy_n(weights, op.E, mixed + op.E * op.r);
}

// Returns `count` rows of d elements from `first` on as floats in whole vectors, in place if possible, else copied to `scratch`.
inline Input<2> block_of(
    const ExpertAdapter& op, const AdapterSizes& size, const AnyInput<2>& from, int64_t first, int64_t count, float* scratch) {
  if (!from.is_bfloat16 && op.d == size.d_padded) return {from.as<float>().row(first), {from.stride[0]}};
  from.visit([&](auto view) { pack(view.row(first), view.stride[0], count, op.d, scratch, size.d_padded); });
  return {scratch, {size.d_padded}};
}

// Number of product steps for a depth.
template <class Factors>
inline int64_t steps(int64_t depth) {
  return (depth + Factors::kDepth - 1) / Factors::kDepth;
}

// Conversion to factors. `left_factor` makes a left factor of `count` rows of n floats, in place or in `scratch`. `factor_in_place`
// converts rows in place if the product sums over rows.
inline Left left_factor(Floats, Input<2> rows, int64_t, int64_t, float*) { return {rows.data, rows.stride[0], 1}; }
inline void factor_in_place(Floats, float*, int64_t, int64_t) {}
#if MOPE_PAIRS
inline Left left_factor(Pairs, Input<2> rows, int64_t count, int64_t n, float* scratch) {
  const int64_t width = steps<Pairs>(n);
  for (int64_t i = 0; i < count; ++i) {
    BFloat16* to = reinterpret_cast<BFloat16*>(scratch + i * width);
    if (n % 2) to[n] = {};
    convert(rows.row(i), n, to);
  }
  return {scratch, width, 1};
}
inline void factor_in_place(Pairs, float* rows, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec second = i + 1 < count ? load(rows + (i + 1) * width + c) : splat(0.0f);
      store(rows + i / 2 * width + c, Pairs::join(load(rows + i * width + c), second));
    }
}
#endif

// Computes `inner`, [down | weights], and `mixed`, the result of mix_row, for `count` rows x.
template <class Factors>
inline void mix_rows(
    const ExpertAdapter& op, const AdapterSizes& size, const float* down, Input<2> x, int64_t count, float* left, float* inner,
    float* mixed) {
  product<false, Factors>(
      count, op.r, steps<Factors>(op.d), left_factor(Factors(), x, count, op.d, left), down, size.in_padded, inner,
      size.in_padded);
  if (op.router_weight) dots(count, op.E, op.d, x, {op.router_weight, {op.d}}, inner + op.r, size.in_padded);
  for (int64_t i = 0; i < count; ++i) {
    route_row(op, inner + i * size.in_padded);
    mix_row(op, inner + i * size.in_padded, mixed + i * size.out_padded);
  }
}

// Sums the product separately before adding the residual, because the product may be much smaller.
template <class Factors, int kM, int kN, class T>
inline void residual_tile(int64_t depth, Left a, const float* b, int64_t b_stride, Input<2> residual, View<T, 2> to) {
  Vec sum[kM][kN];
  MOPE_UNROLL for (int m = 0; m < kM; ++m)
    MOPE_UNROLL for (int n = 0; n < kN; ++n) sum[m][n] = splat(0.0f);
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    decltype(Factors::right(b)) right[kN];
    MOPE_UNROLL for (int n = 0; n < kN; ++n) right[n] = Factors::right(b + n * kLanes);
    MOPE_UNROLL for (int m = 0; m < kM; ++m) {
      const auto left = Factors::left(a.data + m * a.row + k * a.depth);
      MOPE_UNROLL for (int n = 0; n < kN; ++n) sum[m][n] = Factors::multiply_add(left, right[n], sum[m][n]);
    }
  }
  MOPE_UNROLL for (int m = 0; m < kM; ++m)
    MOPE_UNROLL for (int n = 0; n < kN; ++n) store(to.row(m) + n * kLanes, load(residual.row(m) + n * kLanes) + sum[m][n]);
}

// to = residual + left * right, for `count` rows of whole vectors.
template <class Factors, class T>
inline void add_product(
    const AdapterSizes& size, int64_t count, int64_t depth, Left left, const float* right, Input<2> residual, View<T, 2> to) {
  in_blocks<kVecs>(size.d_padded / kLanes, [&](auto n_count, int64_t n) {
    in_blocks<kRows>(count, [&](auto m_count, int64_t m) {
      const int64_t column = n * kLanes;
      const Input<2> add{residual.row(m) + column, {residual.stride[0]}};
      residual_tile<Factors, m_count(), n_count()>(
          steps<Factors>(depth), {left.data + m * left.row, left.row, left.depth}, right + column, size.d_padded, add,
          View<T, 2>{to.row(m) + column, {to.stride[0]}});
    });
  });
}

// The same, written to `to` from row `first` on. Rows that are not whole vectors are computed in `scratch`.
template <class Factors>
inline void add_product(
    const ExpertAdapter& op, const AdapterSizes& size, int64_t first, int64_t count, int64_t depth, Left left, const float* right,
    Input<2> residual, float* scratch, const AnyOutput<2>& to) {
  to.visit([&](auto view) {
    if (op.d == size.d_padded) {
      view.data = view.row(first);
      add_product<Factors>(size, count, depth, left, right, residual, view);
    } else {
      add_product<Factors>(size, count, depth, left, right, residual, Output<2>{scratch, {size.d_padded}});
      for (int64_t i = 0; i < count; ++i) convert(scratch + i * size.d_padded, op.d, view.row(first + i));
    }
  });
}

template <class Factors>
inline void adapt(const ExpertAdapter& op, AnyOutput<2> out, float* weights) {
  const AdapterSizes size(op);
  std::vector<float> down(op.d * size.in_padded), up(size.out * size.d_padded);
  pack_down(op, size, down.data());
  factor_in_place(Factors(), down.data(), op.d, size.in_padded);
  pack_up(op, size, up.data());
  factor_in_place(Factors(), up.data(), size.out, size.d_padded);
  parallel_for(0, (op.T + kAdapterRows - 1) / kAdapterRows, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(kAdapterRows * (size.in_padded + 2 * size.out_padded + 3 * size.d_padded));
    float* inner = scratch.take(kAdapterRows * size.in_padded);
    float* mixed = scratch.take(kAdapterRows * size.out_padded);
    float* rows_of_x = scratch.take(kAdapterRows * size.d_padded);
    float* rows = scratch.take(kAdapterRows * size.d_padded);
    float* left = scratch.take(kAdapterRows * std::max(size.d_padded, size.out_padded));
    for (int64_t first = begin * kAdapterRows; first < std::min(end * kAdapterRows, op.T); first += kAdapterRows) {
      const int64_t count = std::min(kAdapterRows, op.T - first);
      const Input<2> x = block_of(op, size, op.x, first, count, rows_of_x);
      mix_rows<Factors>(op, size, down.data(), x, count, left, inner, mixed);
      if (weights)
        for (int64_t i = 0; i < count; ++i)
          std::copy_n(mixed + i * size.out_padded + size.hidden, op.E, weights + (first + i) * op.E);
      const Left factor = left_factor(Factors(), {mixed, {size.out_padded}}, count, size.out, left);
      add_product<Factors>(op, size, first, count, size.out, factor, up.data(), x, rows, out);
    }
  });
}

inline void expert_adapter(const ExpertAdapter& op, AnyOutput<2> out, float* weights) {
#if MOPE_PAIRS
  if (op.x.is_bfloat16) return adapt<Pairs>(op, out, weights);
#endif
  adapt<Floats>(op, out, weights);
}

// Computes the gradient of a row [down | logits] from the gradients of the mixed row and of the weights.
inline void mix_row_backward(
    const ExpertAdapter& op, const float* row, const float* grad_mixed, const float* grad_weights, float* grad) {
  if (!op.router_weight) {
    for (int64_t k = 0; k < op.r; ++k) grad[k] = grad_mixed[k] * activation_gradient(op, row[k]);
    return;
  }
  const float* weights = row + op.r;
  float* grad_logits = grad + op.r;
  for (int64_t e = 0; e < op.E; ++e) grad_logits[e] = grad_mixed[op.E * op.r + e] + (grad_weights ? grad_weights[e] : 0.0f);
  for (int64_t k = 0; k < op.r; ++k) {
    const float hidden = activation(op, row[k]);
    float sum = 0.0f;
    for (int64_t e = 0; e < op.E; ++e) {
      sum += weights[e] * grad_mixed[e * op.r + k];
      grad_logits[e] += hidden * grad_mixed[e * op.r + k];
    }
    grad[k] = sum * activation_gradient(op, row[k]);
  }
  float mean = 0.0f;
  for (int64_t e = 0; e < op.E; ++e) mean += weights[e] * grad_logits[e];
  for (int64_t e = 0; e < op.E; ++e) grad_logits[e] = weights[e] * (grad_logits[e] - mean) / op.temperature;
}

template <class Factors>
inline void adapt_backward(const ExpertAdapter& op, const ExpertAdapterBackward& back) {
  const AdapterSizes size(op);
  // Rows with a gradient in the second matrix (out, d) and in the first (in, d).
  const int64_t up_begin = back.up_weight ? 0 : size.hidden, up_end = back.up_bias ? size.out : size.hidden;
  const int64_t in_begin = back.down_weight ? 0 : op.r, in_end = back.router_weight ? size.in : op.r;
  const bool need_inner = back.x || in_begin < in_end || back.down_bias || back.router_bias;
  std::vector<float> down(op.d * size.in_padded), up(need_inner ? op.d * size.out_padded : 0);
  std::vector<float> to_x(back.x ? size.in * size.d_padded : 0);
  pack_down(op, size, down.data());
  factor_in_place(Factors(), down.data(), op.d, size.in_padded);
  if (need_inner) {
    pack_up_back(op, size, up.data());
    factor_in_place(Factors(), up.data(), op.d, size.out_padded);
  }
  if (back.x) {
    pack_back(op, size, to_x.data());
    factor_in_place(Factors(), to_x.data(), size.in, size.d_padded);
  }

  const int64_t blocks = (op.T + kAdapterRows - 1) / kAdapterRows;
  const int64_t blocks_of_chunk = std::max(kAdapterChunk / kAdapterRows, (blocks + kAdapterChunks - 1) / kAdapterChunks);
  const int64_t chunks = (blocks + blocks_of_chunk - 1) / blocks_of_chunk;
  // Each chunk stores gradients of the second matrix, of the first matrix, and of the first one's biases.
  const int64_t up_size = up_begin < up_end ? size.out * size.d_padded : 0;
  const int64_t in_size = in_begin < in_end ? size.in * size.d_padded : 0, part_size = up_size + in_size + size.in;
  std::vector<float> parts(chunks * part_size);

  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(kAdapterRows * (3 * size.in_padded + 2 * size.out_padded + 4 * size.d_padded));
    float* inner = scratch.take(kAdapterRows * size.in_padded);
    float* grad_inner = scratch.take(kAdapterRows * size.in_padded);
    float* mixed = scratch.take(kAdapterRows * size.out_padded);
    float* grad_mixed = scratch.take(kAdapterRows * size.out_padded);
    float* rows_of_x = scratch.take(kAdapterRows * size.d_padded);
    float* rows_of_grad = scratch.take(kAdapterRows * size.d_padded);
    float* rows = scratch.take(kAdapterRows * size.d_padded);
    float* left = scratch.take(kAdapterRows * std::max(size.d_padded, size.in_padded));
    for (int64_t block = begin * blocks_of_chunk; block < std::min(end * blocks_of_chunk, blocks); ++block) {
      const int64_t first = block * kAdapterRows, count = std::min(kAdapterRows, op.T - first);
      float* grad_up = parts.data() + block / blocks_of_chunk * part_size;
      float *grad_in = grad_up + up_size, *grad_biases = grad_in + in_size;
      const Input<2> x = block_of(op, size, op.x, first, count, rows_of_x);
      const Input<2> grad_out = block_of(op, size, back.grad_out, first, count, rows_of_grad);
      mix_rows<Factors>(op, size, down.data(), x, count, left, inner, mixed);
      if (need_inner) {
        product<false, Factors>(
            count, size.hidden, steps<Factors>(op.d), left_factor(Factors(), grad_out, count, op.d, left), up.data(),
            size.out_padded, grad_mixed, size.out_padded);
        if (op.router_weight)
          dots(count, op.E, op.d, grad_out, {op.up_bias, {op.d}}, grad_mixed + size.hidden, size.out_padded);
      }
      for (int64_t i = 0; need_inner && i < count; ++i) {
        float* grad = grad_inner + i * size.in_padded;
        const float* grad_weights = back.grad_weights ? back.grad_weights + (first + i) * op.E : nullptr;
        mix_row_backward(op, inner + i * size.in_padded, grad_mixed + i * size.out_padded, grad_weights, grad);
        add_scaled(grad_biases, 1.0f, grad, size.in);
      }
      if (back.x) {
        const Left factor = left_factor(Factors(), {grad_inner, {size.in_padded}}, count, size.in, left);
        add_product<Factors>(op, size, first, count, size.in, factor, to_x.data(), grad_out, rows, back.x);
      }
      // Pairs overwrite the float rows, which are no longer needed: with bfloat16 they are copies.
      if (in_begin < in_end) {
        factor_in_place(Factors(), grad_inner, count, size.in_padded);
        factor_in_place(Factors(), rows_of_x, count, size.d_padded);
        product<true, Factors>(
            in_end - in_begin, op.d, steps<Factors>(count), {grad_inner + in_begin, 1, size.in_padded}, x.data, x.stride[0],
            grad_in + in_begin * size.d_padded, size.d_padded);
      }
      if (up_begin < up_end) {
        factor_in_place(Factors(), mixed, count, size.out_padded);
        factor_in_place(Factors(), rows_of_grad, count, size.d_padded);
        product<true, Factors>(
            up_end - up_begin, op.d, steps<Factors>(count), {mixed + up_begin, 1, size.out_padded}, grad_out.data,
            grad_out.stride[0], grad_up + up_begin * size.d_padded, size.d_padded);
      }
    }
  });

  // Sums the row at `place` in the parts over the chunks, in order.
  const auto sum_row = [&](int64_t place, int64_t n, float* to) {
    std::fill_n(to, n, 0.0f);
    for (int64_t c = 0; c < chunks; ++c) add_scaled(to, 1.0f, parts.data() + c * part_size + place, n);
  };
  parallel_for(up_begin, up_end, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(op.d);
    for (int64_t i = begin; i < end; ++i) {
      if (i >= size.hidden) {
        sum_row(i * size.d_padded, op.d, back.up_bias + (i - size.hidden) * op.d);
        continue;
      }
      sum_row(i * size.d_padded, op.d, row.data());
      float* to = back.up_weight + i / op.r * op.d * op.r + i % op.r;
      for (int64_t c = 0; c < op.d; ++c) to[c * op.r] = row[c];
    }
  });
  parallel_for(in_begin, in_end, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sum_row(
          up_size + i * size.d_padded, op.d, i < op.r ? back.down_weight + i * op.d : back.router_weight + (i - op.r) * op.d);
  });
  if (back.down_bias) sum_row(up_size + in_size, op.r, back.down_bias);
  if (back.router_bias) sum_row(up_size + in_size + op.r, op.E, back.router_bias);
}

inline void expert_adapter_backward(const ExpertAdapter& op, const ExpertAdapterBackward& back) {
#if MOPE_PAIRS
  if (op.x.is_bfloat16 && back.grad_out.is_bfloat16) return adapt_backward<Pairs>(op, back);
#endif
  adapt_backward<Floats>(op, back);
}
