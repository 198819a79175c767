// Attention in the windows of an image, each with the image's prompts, read and written where they lie; and its backward. Included
// once for each target.
//
// Of [prompts; tokens of the window] row n < P is prompt n, row P + y * W + x the token at (y, x) of the window. Scores are held
// keys by queries, as in attention.h.

// So many windows are one task. Not so many as there are threads: the order of sums would depend on it.
inline constexpr int64_t kWindows = 8;

// What scores of each kind of window are raised by, keys by queries: the position bias of one head, and -100 between tokens that a
// shift brings together from afar. A window is cut below if it is in the last row of windows, and on the right in the last column.
class WindowBias {
 public:
  explicit WindowBias(const WindowAttention& op)
      : op_(op), stride_(Scratch::padded(op.rows())), apart_(op.shift ? 4 * op.rows() * stride_ : 0), bias_(op.rows() * stride_) {
    for (int64_t kind = 1; kind < 4 && op.shift; ++kind)
      for (int64_t key = op.P; key < op.rows(); ++key)
        for (int64_t query = op.P; query < op.rows(); ++query)
          if ((cut(key) & kind) != (cut(query) & kind)) apart_[(kind * op.rows() + key) * stride_ + query] = -100.0f;
  }

  void take_head(int64_t h) {
    const int64_t tokens = op_.W * op_.W;
    for (int64_t key = 0; key < tokens; ++key)
      for (int64_t query = 0; query < tokens; ++query)
        bias_[(op_.P + key) * stride_ + op_.P + query] = op_.bias[(h * tokens + query) * tokens + key];
  }

  // Adds to the scores of `count` queries from `first` on.
  void add(int64_t window, int64_t first, int64_t count, float* scores) const {
    const int64_t side = op_.R / op_.W, kind = (window / side == side - 1) + 2 * (window % side == side - 1);
    const float* bias = bias_.data() + first;
    const float* apart = op_.shift && kind ? apart_.data() + kind * op_.rows() * stride_ + first : nullptr;
    for (int64_t key = 0; key < op_.rows(); ++key, bias += stride_, scores += kQueries) {
      MOPE_SIMD for (int64_t i = 0; i < count; ++i) scores[i] += bias[i];
      if (!apart) continue;
      MOPE_SIMD for (int64_t i = 0; i < count; ++i) scores[i] += apart[i];
      apart += stride_;
    }
  }

 private:
  int64_t cut(int64_t row) const {
    const int64_t token = row - op_.P;
    return (token / op_.W >= op_.W - op_.shift) + 2 * (token % op_.W >= op_.W - op_.shift);
  }

  const WindowAttention& op_;
  const int64_t stride_;
  std::vector<float> apart_, bias_;
};

// What the windows of one thread work in.
struct WindowWorkspace {
  WindowWorkspace(const WindowAttention& op, bool backward)
      : width(vectors(op.D) * kLanes),
        scratch(size(op, backward)),
        queries(rows(op.rows() + kLanes)),
        keys(rows(op.rows())),
        values(rows(op.rows())),
        by_width(scratch.take(width * kQueries)),
        scores(scratch.take(op.rows() * kQueries)),
        out(rows(kQueries)),
        place(op.rows()),
        bias(op) {
    if (!backward) return;
    grad_out = rows(op.rows() + kLanes);
    grad_queries = rows(op.rows());
    grad_keys = rows(op.rows());
    grad_values = rows(op.rows());
    grad_scores = scratch.take(op.rows() * kQueries);
  }

  // Finds the rows of a window in an image of (P + R*R) rows.
  void find(const WindowAttention& op, int64_t window) {
    const int64_t side = op.R / op.W, top = window / side * op.W + op.shift, left = window % side * op.W + op.shift;
    for (int64_t n = 0; n < op.P; ++n) place[n] = n;
    for (int64_t y = 0; y < op.W; ++y)
      for (int64_t x = 0; x < op.W; ++x) place[op.P + y * op.W + x] = op.P + (top + y) % op.R * op.R + (left + x) % op.R;
  }

  const int64_t width;
  Scratch scratch;
  float *queries, *keys, *values, *by_width, *scores, *out;
  float *grad_out = nullptr, *grad_queries = nullptr, *grad_keys = nullptr, *grad_values = nullptr, *grad_scores = nullptr;
  std::vector<int64_t> place;
  WindowBias bias;

 private:
  float* rows(int64_t count) { return scratch.take(count * width); }

  int64_t size(const WindowAttention& op, bool backward) const {
    const int64_t all = Scratch::padded((op.rows() + kLanes) * width), scores = Scratch::padded(op.rows() * kQueries);
    const int64_t forward = 3 * all + 2 * Scratch::padded(width * kQueries) + scores;
    return backward ? forward + 4 * all + scores : forward;
  }
};

// Copies the rows of a window, of one head of one of [query | key | value], times `scale`.
inline void gather_window(
    const WindowAttention& op, const AnyInput<3>& from, int64_t column, int64_t owner, int64_t item, const WindowWorkspace& work,
    float scale, float* to) {
  from.visit([&](auto view) {
    for (int64_t n = 0; n < op.rows(); ++n)
      pack(view.row(n < op.P ? owner : item, work.place[n]) + column, 0, 1, op.D, to + n * work.width, work.width, scale);
  });
}

// Scores of `count` queries from `first` on.
inline void score_window(const WindowAttention& op, int64_t window, int64_t first, int64_t count, WindowWorkspace& work) {
  const int64_t width = work.width;
  float* queries = work.queries + first * width;
  // The rows behind the last are no query's: filling them up overwrites none that comes later.
  transpose_queries(queries, count, width, work.by_width);
  product<false>(op.rows(), count, op.D, {work.keys, width, 1}, work.by_width, kQueries, work.scores, kQueries);
  work.bias.add(window, first, count, work.scores);
}

// Calls f(owner, head, chunk, part, workspace) for each chunk of the windows that use the prompts of one image; part counts them.
template <class F>
inline void over_windows(const WindowAttention& op, bool backward, const F& f) {
  const int64_t chunks = op.chunks(kWindows);
  parallel_for(0, op.B * op.H * chunks, 1, [&](int64_t begin, int64_t end) {
    WindowWorkspace work(op, backward);
    // Heads outermost, as each has a bias of its own.
    int64_t head = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i / (op.B * chunks), owner = i / chunks % op.B, chunk = i % chunks;
      if (h != head) work.bias.take_head(head = h);
      f(owner, h, chunk, (owner * op.H + h) * chunks + chunk, work);
    }
  });
}

// Calls f(item, window) for the windows of a chunk, after their rows have been found.
template <class F>
inline void over_chunk(const WindowAttention& op, int64_t owner, int64_t chunk, WindowWorkspace& work, const F& f) {
  for (int64_t j = chunk * kWindows; j < std::min((chunk + 1) * kWindows, op.windows()); ++j) {
    const int64_t i = op.owner_is_instance ? owner * op.windows() + j : j * op.B + owner;
    work.find(op, i % op.windows());
    f(i / op.windows(), i % op.windows());
  }
}

// Sums parts (B, H, chunks, P, D) over the chunks, in order, times `scale`, into prompts of one of [query | key | value].
inline void sum_chunks(
    const WindowAttention& op, const std::vector<float>& parts, float scale, int64_t column, const AnyOutput<3>& to) {
  const int64_t chunks = op.chunks(kWindows), size = op.P * op.D;
  parallel_for(0, op.B * op.H, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(op.D);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t p = 0; p < op.P; ++p) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t c = 0; c < chunks; ++c) add_scaled(sum.data(), 1.0f, parts.data() + (i * chunks + c) * size + p * op.D, op.D);
        to.visit([&](auto view) { convert(sum.data(), op.D, view.row(i / op.H, p) + column + i % op.H * op.D, scale); });
      }
  });
}

inline void window_attention(const WindowAttention& op, AnyOutput<3> out) {
  const int64_t C = op.H * op.D;
  std::vector<float> parts(op.B * op.H * op.chunks(kWindows) * op.P * op.D);
  over_windows(op, false, [&](int64_t owner, int64_t h, int64_t chunk, int64_t part, WindowWorkspace& work) {
    alignas(64) float sums[kQueries], highest[kQueries];
    float* prompts = parts.data() + part * op.P * op.D;
    over_chunk(op, owner, chunk, work, [&](int64_t item, int64_t window) {
      gather_window(op, op.qkv, h * op.D, owner, item, work, op.scale, work.queries);
      gather_window(op, op.qkv, C + h * op.D, owner, item, work, 1.0f, work.keys);
      gather_window(op, op.qkv, 2 * C + h * op.D, owner, item, work, 1.0f, work.values);
      for (int64_t first = 0; first < op.rows(); first += kQueries) {
        const int64_t count = std::min(kQueries, op.rows() - first);
        score_window(op, window, first, count, work);
        in_blocks<4>(vectors(count), [&](auto block, int64_t n) {
          exponentials<block()>(work.scores + n * kLanes, op.rows(), sums + n * kLanes, highest + n * kLanes);
        });
        product<false>(count, op.D, op.rows(), {work.scores, 1, kQueries}, work.values, work.width, work.out, work.width);
        out.visit([&](auto to) {
          for (int64_t i = 0; i < count; ++i) {
            const int64_t n = first + i;
            const float factor = 1.0f / sums[i];
            const float* from = work.out + i * work.width;
            if (n < op.P)
              add_scaled(prompts + n * op.D, factor, from, op.D);
            else
              convert(from, op.D, to.row(item, work.place[n]) + h * op.D, factor);
          }
        });
      }
    });
  });
  sum_chunks(op, parts, 1.0f / op.windows(), 0, out);
}

// The highest score of each query.
inline void highest_scores(const float* scores, int64_t keys, int64_t count, float* highest) {
  for (int64_t n = 0; n < vectors(count) * kLanes; n += kLanes) {
    Vec top = splat(std::numeric_limits<float>::lowest());
    for (int64_t i = 0; i < keys; ++i) top = max(load(scores + i * kQueries + n), top);
    store(highest + n, top);
  }
}

inline void window_attention_backward(const WindowAttention& op, const WindowAttentionBackward& back) {
  const int64_t C = op.H * op.D, tokens = op.W * op.W, size = op.P * op.D, count_parts = op.B * op.H * op.chunks(kWindows);
  const bool need_qkv = bool(back.qkv);
  std::vector<float> query_parts(need_qkv ? count_parts * size : 0), key_parts(query_parts), value_parts(query_parts);
  std::vector<float> bias_parts(back.bias ? count_parts * tokens * tokens : 0);
  over_windows(op, true, [&](int64_t owner, int64_t h, int64_t chunk, int64_t part, WindowWorkspace& work) {
    alignas(64) float highest[kQueries];
    const int64_t width = work.width;
    over_chunk(op, owner, chunk, work, [&](int64_t item, int64_t window) {
      gather_window(op, op.qkv, h * op.D, owner, item, work, op.scale, work.queries);
      gather_window(op, op.qkv, C + h * op.D, owner, item, work, 1.0f, work.keys);
      gather_window(op, op.qkv, 2 * C + h * op.D, owner, item, work, 1.0f, work.values);
      gather_window(op, back.grad_out, h * op.D, owner, item, work, 1.0f, work.grad_out);
      // A prompt's output is a mean.
      MOPE_SIMD for (int64_t i = 0; i < op.P * width; ++i) work.grad_out[i] /= op.windows();
      std::fill_n(work.grad_keys, op.rows() * width, 0.0f);
      std::fill_n(work.grad_values, op.rows() * width, 0.0f);
      for (int64_t first = 0; first < op.rows(); first += kQueries) {
        const int64_t count = std::min(kQueries, op.rows() - first);
        score_window(op, window, first, count, work);
        highest_scores(work.scores, op.rows(), count, highest);
        transpose_queries(work.grad_out + first * width, count, width, work.by_width);
        product<false>(op.rows(), count, op.D, {work.values, width, 1}, work.by_width, kQueries, work.grad_scores, kQueries);
        in_blocks<4>(vectors(count), [&](auto block, int64_t n) {
          const int64_t at = n * kLanes, keys = op.rows();
          softmax_backward<block()>(work.scores + at, work.grad_scores + at, keys, keys, keys, highest + at, nullptr);
        });
        if (back.bias) {
          float* to = bias_parts.data() + part * tokens * tokens;
          for (int64_t i = std::max<int64_t>(op.P - first, 0); i < count; ++i)
            for (int64_t key = 0; key < tokens; ++key)
              to[(first + i - op.P) * tokens + key] += work.grad_scores[(op.P + key) * kQueries + i];
        }
        if (!need_qkv) continue;
        float* queries = work.queries + first * width;
        float* grad_out = work.grad_out + first * width;
        product<true>(op.rows(), op.D, count, {work.scores, kQueries, 1}, grad_out, width, work.grad_values, width);
        product<true>(op.rows(), op.D, count, {work.grad_scores, kQueries, 1}, queries, width, work.grad_keys, width);
        float* grad_queries = work.grad_queries + first * width;
        product<false>(count, op.D, op.rows(), {work.grad_scores, 1, kQueries}, work.keys, width, grad_queries, width);
      }
      if (!need_qkv) return;
      const auto put = [&](const float* gradient, float scale, int64_t column, std::vector<float>& parts) {
        back.qkv.visit([&](auto to) {
          for (int64_t n = 0; n < op.rows(); ++n) {
            const float* from = gradient + n * width;
            if (n < op.P)
              add_scaled(parts.data() + part * size + n * op.D, scale, from, op.D);
            else
              convert(from, op.D, to.row(item, work.place[n]) + column + h * op.D, scale);
          }
        });
      };
      put(work.grad_queries, op.scale, 0, query_parts);
      // The packed queries are scaled already.
      put(work.grad_keys, 1.0f, C, key_parts);
      put(work.grad_values, 1.0f, 2 * C, value_parts);
    });
  });
  if (need_qkv) {
    sum_chunks(op, query_parts, 1.0f, 0, back.qkv);
    sum_chunks(op, key_parts, 1.0f, C, back.qkv);
    sum_chunks(op, value_parts, 1.0f, 2 * C, back.qkv);
  }
  if (!back.bias) return;
  const int64_t chunks = op.chunks(kWindows), area = tokens * tokens;
  parallel_for(0, op.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      std::fill_n(back.bias + h * area, area, 0.0f);
      for (int64_t b = 0; b < op.B; ++b)
        for (int64_t c = 0; c < chunks; ++c)
          add_scaled(back.bias + h * area, 1.0f, bias_parts.data() + ((b * op.H + h) * chunks + c) * area, area);
    }
  });
}
