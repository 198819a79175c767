// Attention of one head over its prompts and visible tokens. Included once per target.
//
// Queries are processed in blocks of kQueries, and scores are stored keys by queries. A vector holds several queries, so the
// softmax needs no sums across lanes and the keys need no padding. All keys of a head are scored before the softmax of a block.

inline constexpr int64_t kQueries = 64;

class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : storage_(new float[floats + kAlignment]),
        next_(storage_.get() + (-reinterpret_cast<uintptr_t>(storage_.get()) / sizeof(float)) % kAlignment) {}

  static constexpr int64_t padded(int64_t floats) { return (floats + kAlignment - 1) / kAlignment * kAlignment; }

  float* take(int64_t floats) {
    float* taken = next_;
    next_ += padded(floats);
    return taken;
  }

 private:
  static constexpr int64_t kAlignment = 16;  // floats, one cache line
  std::unique_ptr<float[]> storage_;
  float* next_;
};

// Scratch memory for the heads of one thread. Rows of D floats are padded with zeros to whole vectors.
struct Workspace {
  Workspace(const MopeAttention& op, bool backward)
      : width(vectors(op.D) * kLanes),
        scratch(size(op, backward)),
        keys(rows(op.prompts() + op.Lk)),
        values(rows(op.prompts() + op.Lk)),
        queries(rows(kQueries)),
        queries_by_width(scratch.take(width * kQueries)),
        scores(scratch.take((op.prompts() + op.Lk) * kQueries)),
        out(rows(kQueries)) {
    if (!backward) return;
    grad_keys = rows(op.prompts() + op.Lk);
    grad_values = rows(op.prompts() + op.Lk);
    grad_out_by_width = scratch.take(width * kQueries);
    grad_scores = scratch.take((op.prompts() + op.Lk) * kQueries);
    row = rows(1);
  }

  const int64_t width;
  Scratch scratch;
  float *keys, *values, *queries, *queries_by_width, *scores, *out;
  float *grad_keys = nullptr, *grad_values = nullptr, *grad_out_by_width = nullptr, *grad_scores = nullptr, *row = nullptr;

 private:
  float* rows(int64_t count) { return scratch.take(count * width); }

  int64_t size(const MopeAttention& op, bool backward) const {
    const int64_t keys = op.prompts() + op.Lk, block = Scratch::padded(width * kQueries);
    const int64_t forward = 2 * Scratch::padded(keys * width) + 3 * block + Scratch::padded(keys * kQueries);
    if (!backward) return forward;
    return forward + 2 * Scratch::padded(keys * width) + block + Scratch::padded(keys * kQueries) + Scratch::padded(width);
  }
};

// Copies rows of `columns` elements, multiplied by `scale`, to rows of `width` floats.
template <class T>
inline void pack(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t width, float scale = 1.0f) {
  for (int64_t i = 0; i < rows; ++i, from += from_stride, to += width) {
    convert(from, columns, to, scale);
    for (int64_t d = columns; d < width; ++d) to[d] = 0.0f;
  }
}

// The same for the rows of a head from `first` on.
inline void pack(
    const AnyInput<4>& from, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t columns, float* to, int64_t width,
    float scale = 1.0f) {
  from.visit([&](auto view) { pack(view.row(b, h, first), view.stride[2], rows, columns, to, width, scale); });
}

// Transposes up to kQueries packed rows, zero-padded to a multiple of kLanes rows.
inline void transpose_queries(float* rows, int64_t count, int64_t width, float* to) {
  std::fill(rows + count * width, rows + vectors(count) * kLanes * width, 0.0f);
  for (int64_t i = 0; i < count; i += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) transpose(rows + i * width + d, width, to + d * kQueries + i, kQueries);
}

// to[p] = inverse_std[p] * sum_j w_j bank[j][h][p] + offset[h]
inline void mix_bank(
    const MopeAttention& op, const Selection& selection, int64_t h, const float* inverse_std, Input<4> bank, Input<2> offset,
    float* to, int64_t width) {
  for (int64_t p = 0; p < op.P; ++p, to += width) {
    std::fill_n(to, width, 0.0f);
    for (int64_t j = 0; j < selection.k; ++j)
      add_scaled(to, selection.weights[j], bank.row(selection.task * op.K + selection.expert(j), h, p), op.D);
    const float factor = inverse_std ? inverse_std[p] : 1.0f;
    const float* shift = offset ? offset.row(h) : nullptr;
    MOPE_SIMD for (int64_t d = 0; d < op.D; ++d) to[d] = to[d] * factor + (shift ? shift[d] : 0.0f);
  }
}

// Gathers the rows that a head attends to: [static; instance; routed prompts; visible tokens]. Returns their number.
inline int64_t gather_rows(
    const MopeAttention& op, int64_t b, int64_t h, const Selection& selection, const float* inverse_std, Input<4> fixed,
    Input<4> instance, Input<4> bank, Input<2> offset, const AnyInput<4>& tokens, float* to, int64_t width) {
  if (op.S) pack(fixed.row(selection.task, h, 0), fixed.stride[2], op.S, op.D, to, width);
  if (op.M) pack(instance.row(b, h, 0), instance.stride[2], op.M, op.D, to + op.S * width, width);
  mix_bank(op, selection, h, inverse_std, bank, offset, to + (op.S + op.M) * width, width);
  const int64_t visible = op.lengths.visible(b, op.Lk);
  pack(tokens, b, h, 0, visible, op.D, to + op.prompts() * width, width);
  return op.prompts() + visible;
}

inline int64_t gather(
    const MopeAttention& op, int64_t b, int64_t h, const Selection& selection, const float* inverse_std, Workspace& work) {
  gather_rows(
      op, b, h, selection, inverse_std, op.static_key, op.instance_key, op.bank_key, op.key_offset, op.key, work.keys, work.width);
  return gather_rows(
      op, b, h, selection, inverse_std, op.static_value, op.instance_value, op.bank_value, op.value_offset, op.value, work.values,
      work.width);
}

// Computes `rows` rows of scores, prompts before tokens, of `count` queries from `first` on. The queries are packed and scaled.
inline void score(
    const MopeAttention& op, int64_t b, int64_t h, int64_t first, int64_t count, int64_t rows, const Workspace& work) {
  transpose_queries(work.queries, count, work.width, work.queries_by_width);
  product<false>(rows, count, op.D, {work.keys, work.width, 1}, work.queries_by_width, kQueries, work.scores, kQueries);
  for (int64_t row = op.prompts(); row < rows && op.bias.data; ++row) {
    const auto [of_item, of_head, of_query, of_token] = op.bias.stride;
    const float* bias = op.bias.data + b * of_item + h * of_head + first * of_query + (row - op.prompts()) * of_token;
    float* scores = work.scores + row * kQueries;
    if (of_query == 0) {
      MOPE_SIMD for (int64_t i = 0; i < count; ++i) scores[i] += *bias;
    } else {
      for (int64_t i = 0; i < count; ++i) scores[i] += bias[i * of_query];
    }
  }
  // Token t is visible to queries from t on.
  for (int64_t row = op.prompts() + first + 1; row < rows && op.is_causal; ++row)
    std::fill_n(
        work.scores + row * kQueries, std::min(count, row - op.prompts() - first), -std::numeric_limits<float>::infinity());
}

// Replaces kN vectors of score columns by e^(score - highest) and computes the sum of each column. As a factor of Pairs, two keys
// share one row, and an odd number of keys is padded with 0.
template <int kN, class Factors>
inline void exponentials(float* scores, int64_t keys, const float* highest, float* sums) {
  Vec top[kN], sum[kN];
  MOPE_UNROLL for (int n = 0; n < kN; ++n) {
    // Use a finite maximum if every score is -inf, so that the exponentials are 0 and not NaN.
    top[n] = max(load(highest + n * kLanes), splat(std::numeric_limits<float>::lowest()));
    sum[n] = splat(0.0f);
  }
  const auto exponential = [&](int64_t key, int n) {
    const Vec e = exp(load(scores + key * kQueries + n * kLanes) - top[n]);
    sum[n] += e;
    return e;
  };
  int64_t key = 0;
  if constexpr (Factors::kDepth == 2)
    for (float* to = scores; key < keys; key += 2, to += kQueries)
      MOPE_UNROLL for (int n = 0; n < kN; ++n) {
        const Vec first = exponential(key, n);
        store(to + n * kLanes, Factors::join(first, key + 1 < keys ? exponential(key + 1, n) : splat(0.0f)));
      }
  else
    for (; key < keys; ++key)
      MOPE_UNROLL for (int n = 0; n < kN; ++n) store(scores + key * kQueries + n * kLanes, exponential(key, n));
  MOPE_UNROLL for (int n = 0; n < kN; ++n) store(sums + n * kLanes, sum[n]);
}

// Finds the maximum of each column in kN vectors of columns.
template <int kN>
inline void highest_scores(const float* scores, int64_t keys, float* highest) {
  Vec top[kN];
  MOPE_UNROLL for (int n = 0; n < kN; ++n) top[n] = splat(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < keys; ++i)
    MOPE_UNROLL for (int n = 0; n < kN; ++n) top[n] = max(load(scores + i * kQueries + n * kLanes), top[n]);
  MOPE_UNROLL for (int n = 0; n < kN; ++n) store(highest + n * kLanes, top[n]);
}

inline void attend(
    const MopeAttention& op, int64_t b, int64_t h, int64_t keys, Workspace& work, const MopeAttentionForward& result) {
  alignas(64) float sums[kQueries], highest[kQueries];
  const int64_t width = work.width;
  for (int64_t first = 0; first < op.Lq; first += kQueries) {
    const int64_t count = std::min(kQueries, op.Lq - first);
    pack(op.query, b, h, first, count, op.D, work.queries, width, op.scale);
    score(op, b, h, first, count, keys, work);
    in_blocks<4>(vectors(count), [&](auto block, int64_t n) {
      float* scores = work.scores + n * kLanes;
      highest_scores<block()>(scores, keys, highest + n * kLanes);
      exponentials<block(), Floats>(scores, keys, highest + n * kLanes, sums + n * kLanes);
    });
    product<false>(count, op.D, keys, {work.scores, 1, kQueries}, work.values, width, work.out, width);
    for (int64_t i = 0; i < count; ++i) {
      // Without a visible key, the output is 0 and lse = inf makes every recomputed probability 0.
      const bool nothing = sums[i] == 0.0f;
      const float factor = nothing ? 0.0f : 1.0f / sums[i];
      float& lse = result.lse[(b * op.H + h) * op.Lq + first + i];
      lse = nothing ? std::numeric_limits<float>::infinity() : highest[i] + std::log(sums[i]);
      result.out.visit([&](auto out) { convert(work.out + i * width, op.D, out.row(b, h, first + i), factor); });
    }
  }
}

// The gradients that a head must compute, and hence the number of its keys that must be processed.
struct Needed {
  int64_t grad_keys, grad_values;  // rows
  bool query;

  // Number of rows needed of the gradient of the scores, and of the scores.
  int64_t grad_scores(int64_t keys) const { return query ? keys : grad_keys; }
  int64_t scores(int64_t keys) const { return std::max(grad_scores(keys), grad_values); }
};

// Replaces `rows` rows of scores by probabilities, and `grad_rows` rows of the gradient of the probabilities by that of the scores.
// `mean` is the expectation of the gradient of the probabilities, sum(out * grad_out). If all keys are available, sums and
// expectations are recomputed, because rounding errors of the log-sum-exp and the output would affect all keys of a query alike.
template <int kN>
inline void softmax_backward(
    float* scores, float* grad, int64_t keys, int64_t rows, int64_t grad_rows, const float* lse, const float* mean) {
  Vec shift[kN], sum[kN], center[kN], factor[kN];
  MOPE_UNROLL for (int n = 0; n < kN; ++n) {
    shift[n] = load(lse + n * kLanes);
    sum[n] = center[n] = splat(0.0f);
  }
  for (int64_t i = 0; i < rows; ++i)
    MOPE_UNROLL for (int n = 0; n < kN; ++n) {
      const int64_t at = i * kQueries + n * kLanes;
      const Vec probability = exp(load(scores + at) - shift[n]);
      store(scores + at, probability);
      sum[n] += probability;
      if (i < grad_rows) center[n] += probability * load(grad + at);
    }
  MOPE_UNROLL for (int n = 0; n < kN; ++n) {
    factor[n] = grad_rows == keys ? reciprocal_or_zero(sum[n]) : splat(1.0f);
    center[n] = grad_rows == keys ? factor[n] * center[n] : load(mean + n * kLanes);
  }
  for (int64_t i = 0; i < rows; ++i)
    MOPE_UNROLL for (int n = 0; n < kN; ++n) {
      const int64_t at = i * kQueries + n * kLanes;
      const Vec probability = factor[n] * load(scores + at);
      store(scores + at, probability);
      if (i < grad_rows) store(grad + at, probability * (load(grad + at) - center[n]));
    }
}

// Computes the gradients of the head's keys and values in the workspace, and stores the gradient of its queries.
inline void attend_backward(
    const MopeAttention& op, const MopeAttentionBackward& back, int64_t b, int64_t h, int64_t keys, const Needed& needed,
    Workspace& work) {
  alignas(64) float lse[kQueries], mean[kQueries];
  const int64_t width = work.width, rows = needed.scores(keys), grad_rows = needed.grad_scores(keys);
  std::fill_n(work.grad_keys, needed.grad_keys * width, 0.0f);
  std::fill_n(work.grad_values, needed.grad_values * width, 0.0f);
  for (int64_t first = 0; first < op.Lq; first += kQueries) {
    const int64_t count = std::min(kQueries, op.Lq - first);
    std::fill_n(mean, kQueries, 0.0f);
    std::fill_n(lse, kQueries, std::numeric_limits<float>::infinity());
    std::copy_n(back.lse + (b * op.H + h) * op.Lq + first, count, lse);

    pack(op.query, b, h, first, count, op.D, work.queries, width, op.scale);
    score(op, b, h, first, count, rows, work);

    float* grad_out = work.out;
    pack(back.grad_out, b, h, first, count, op.D, grad_out, width);
    if (grad_rows) {
      if (grad_rows < keys)
        for (int64_t i = 0; i < count; ++i)
          mean[i] = dot(grad_out + i * width, floats(back.out, op.D, work.row, b, h, first + i), op.D);
      transpose_queries(grad_out, count, width, work.grad_out_by_width);
      product<false>(grad_rows, count, op.D, {work.values, width, 1}, work.grad_out_by_width, kQueries, work.grad_scores, kQueries);
    }
    in_blocks<4>(vectors(count), [&](auto block, int64_t n) {
      const int64_t at = n * kLanes;
      // No scale here: the packed queries include it, and the gradient of the queries is scaled at the end.
      softmax_backward<block()>(work.scores + at, work.grad_scores + at, keys, rows, grad_rows, lse + at, mean + at);
    });

    product<true>(needed.grad_values, op.D, count, {work.scores, kQueries, 1}, grad_out, width, work.grad_values, width);
    product<true>(needed.grad_keys, op.D, count, {work.grad_scores, kQueries, 1}, work.queries, width, work.grad_keys, width);
    if (needed.query) {
      float* grad_query = work.queries;
      product<false>(count, op.D, keys, {work.grad_scores, 1, kQueries}, work.keys, width, grad_query, width);
      back.query.visit([&](auto to) {
        for (int64_t i = 0; i < count; ++i) convert(grad_query + i * width, op.D, to.row(b, h, first + i), op.scale);
      });
    }
  }
}
