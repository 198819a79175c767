// Attention in the windows of an image, each extended by prompts, read and written in image order; and its backward. Included once
// per target.
//
// In the rows [prompts; tokens of the window], row n < P is prompt n, and row P + y * W + x is the token at (y, x) of the window.
// Scores are stored keys by queries, as in attention.h.

// Windows and heads per task. Fixed, because if they depended on the number of threads, so would the order of summation.
inline constexpr int64_t kWindows = 8, kHeads = 4;

// The bias of each kind of window, keys by queries: the position bias of a head, and -100 between tokens that are adjacent only
// because of the shift. A window has a horizontal cut in the last row of windows, and a vertical cut in the last column.
class WindowBias {
 public:
  explicit WindowBias(const WindowAttention& op)
      : op_(op),
        stride_(Scratch::padded(op.rows())),
        size_(op.rows() * stride_),
        kinds_(op.shift ? 4 : 1),
        biases_(kHeads * kinds_ * size_) {}

  void take_heads(int64_t first) {
    for (int64_t h = first; h < std::min(first + kHeads, op_.H); ++h) take_head(h, biases_.data() + h % kHeads * kinds_ * size_);
  }
  // Turns kN vectors of columns of products, for the queries from `first` on, into scores, and finds the maximum of each column.
  template <int kN>
  void raise(int64_t h, int64_t window, int64_t first, float scale, float* scores, float* highest) const {
    const int64_t side = op_.R / op_.W, kind = (window / side == side - 1) + 2 * (window % side == side - 1);
    const float* bias = biases_.data() + (h % kHeads * kinds_ + (op_.shift ? kind : 0)) * size_ + first;
    Vec top[kN];
    MOPE_UNROLL for (int n = 0; n < kN; ++n) top[n] = splat(std::numeric_limits<float>::lowest());
    for (int64_t key = 0; key < op_.rows(); ++key, bias += stride_, scores += kQueries)
      MOPE_UNROLL for (int n = 0; n < kN; ++n) {
        const Vec score = scale * load(scores + n * kLanes) + load(bias + n * kLanes);
        store(scores + n * kLanes, score);
        top[n] = max(score, top[n]);
      }
    MOPE_UNROLL for (int n = 0; n < kN; ++n) store(highest + n * kLanes, top[n]);
  }

 private:
  void take_head(int64_t h, float* plain) {
    const int64_t tokens = op_.W * op_.W;
    for (int64_t key = 0; key < tokens; ++key)
      for (int64_t query = 0; query < tokens; ++query)
        plain[(op_.P + key) * stride_ + op_.P + query] = op_.bias[(h * tokens + query) * tokens + key];
    for (int64_t kind = 1; kind < kinds_; ++kind) {
      float* to = plain + kind * size_;
      std::copy_n(plain, size_, to);
      for (int64_t key = op_.P; key < op_.rows(); ++key)
        for (int64_t query = op_.P; query < op_.rows(); ++query)
          if ((cut(key) & kind) != (cut(query) & kind)) to[key * stride_ + query] += -100.0f;
    }
  }

  int64_t cut(int64_t row) const {
    const int64_t token = row - op_.P;
    return (token / op_.W >= op_.W - op_.shift) + 2 * (token % op_.W >= op_.W - op_.shift);
  }

  const WindowAttention& op_;
  const int64_t stride_, size_, kinds_;
  std::vector<float> biases_;
};

// Scratch memory for the windows of one thread.
struct WindowWorkspace {
  WindowWorkspace(const WindowAttention& op, bool backward)
      : width(vectors(op.D) * kLanes),
        pairs(vectors((op.D + 1) / 2) * kLanes),
        scratch(size(op, backward)),
        queries(rows(op.rows() + kLanes)),
        keys(rows(op.rows())),
        values(rows(op.rows())),
        by_width(scratch.take(width * kQueries)),
        scores(scratch.take(op.rows() * kQueries)),
        out(rows(kQueries)),
        place(op.rows()),
        next_place(op.rows()),
        zeros(op.D),
        bias(op) {
    if (!backward) return;
    grad_out = rows(op.rows() + kLanes);
    grad_queries = rows(op.rows());
    grad_keys = rows(op.rows());
    grad_values = rows(op.rows());
    grad_scores = scratch.take(op.rows() * kQueries);
  }

  // Finds the rows of a window among the P + R*R rows of an image.
  static void find(const WindowAttention& op, int64_t window, std::vector<int64_t>& place) {
    const int64_t side = op.R / op.W, top = window / side * op.W + op.shift, left = window % side * op.W + op.shift;
    int64_t* to = place.data();
    for (int64_t n = 0; n < op.P; ++n) *to++ = n;
    for (int64_t y = 0; y < op.W; ++y) {
      const int64_t row = op.P + (top + y) % op.R * op.R;
      for (int64_t x = left; x < left + op.W; ++x) *to++ = row + (x < op.R ? x : x - op.R);
    }
  }

  const int64_t width, pairs;  // width of a row of floats, and of a row of bfloat16 pairs
  Scratch scratch;
  float *queries, *keys, *values, *by_width, *scores, *out;
  float *grad_out = nullptr, *grad_queries = nullptr, *grad_keys = nullptr, *grad_values = nullptr, *grad_scores = nullptr;
  std::vector<int64_t> place, next_place;
  std::vector<BFloat16> zeros;
  WindowBias bias;

 private:
  float* rows(int64_t count) { return scratch.take(count * width); }

  int64_t size(const WindowAttention& op, bool backward) const {
    const int64_t all = Scratch::padded((op.rows() + kLanes) * width), scores = Scratch::padded(op.rows() * kQueries);
    const int64_t forward = 3 * all + 2 * Scratch::padded(width * kQueries) + scores;
    return backward ? forward + 4 * all + scores : forward;
  }
};

// A window of one head. It uses the prompts of image `owner`, and adds its results for prompts to the sum with index `part`.
struct Window {
  int64_t h, owner, item, index, part;
};

// Copies the rows of a window, starting at a column.
inline void gather_window(
    const WindowAttention& op, const AnyInput<3>& from, int64_t column, const Window& window, const WindowWorkspace& work,
    float* to) {
  from.visit([&](auto view) {
    for (int64_t n = 0; n < op.rows(); ++n)
      pack(view.row(n < op.P ? window.owner : window.item, work.place[n]) + column, 0, 1, op.D, to + n * work.width, work.width);
  });
}

// Prefetches the token rows that a window reads or writes, starting at a column.
template <class Void>
inline void prefetch_window(
    const WindowAttention& op, const AnyView<Void, 3>& rows, int64_t column, int64_t item, const std::vector<int64_t>& place) {
  rows.visit([&](auto view) {
    constexpr int64_t kLine = 64 / sizeof(*view.data);
    for (int64_t n = op.P; n < op.rows(); ++n)
      for (int64_t d = 0; d < op.D; d += kLine) MOPE_PREFETCH(view.row(item, place[n]) + column + d, !std::is_const_v<Void>);
  });
}

// Finds the rows of each window of each head, and calls f(window, workspace). Calls prefetch(window, place) before it processes the
// preceding window, because rows are too far apart for the processor's own prefetcher.
template <class Prefetch, class F>
inline void over_windows(const WindowAttention& op, bool backward, const Prefetch& prefetch, const F& f) {
  constexpr int64_t kTask = kWindows * kHeads;
  const int64_t chunks = op.chunks(kWindows), groups = (op.H + kHeads - 1) / kHeads;
  // The n-th window. Heads are innermost, because a token's heads are adjacent in memory; groups of heads are outermost, because
  // each head has its own bias.
  const auto window = [&](int64_t n) {
    const int64_t h = n / kTask / chunks / op.B * kHeads + n % kHeads, owner = n / kTask / chunks % op.B;
    const int64_t chunk = n / kTask % chunks, j = chunk * kWindows + n % kTask / kHeads;
    const int64_t i = op.owner_is_instance ? owner * op.windows() + j : j * op.B + owner;
    return Window{h, owner, i / op.windows(), i % op.windows(), (owner * op.H + h) * chunks + chunk};
  };
  // The last chunk and the last group may be smaller.
  const auto exists = [&](int64_t n) {
    return n / kTask % chunks * kWindows + n % kTask / kHeads < op.windows() &&
           n / kTask / chunks / op.B * kHeads + n % kHeads < op.H;
  };
  parallel_for(0, groups * op.B * chunks, 1, [&](int64_t begin, int64_t end) {
    WindowWorkspace work(op, backward);
    int64_t group = -1;
    Window next = window(begin * kTask);
    work.find(op, next.index, work.next_place);
    for (int64_t n = begin * kTask; n < end * kTask;) {
      const Window current = next;
      std::swap(work.place, work.next_place);
      do ++n;
      while (n < end * kTask && !exists(n));
      if (n < end * kTask) {
        next = window(n);
        work.find(op, next.index, work.next_place);
        prefetch(next, work.next_place);
      }
      if (current.h / kHeads != group) work.bias.take_heads((group = current.h / kHeads) * kHeads);
      f(current, work);
    }
  });
}

// Stores `scale` times the sum of parts (B, H, chunks, P, D) over the chunks, in order, to the prompt rows from `column` on.
inline void sum_chunks(
    const WindowAttention& op, const std::vector<float>& parts, float scale, int64_t column, const AnyOutput<3>& to) {
  const int64_t chunks = op.chunks(kWindows), size = op.P * op.D;
  parallel_for(0, op.B * op.H, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(size);
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(parts.data() + i * chunks * size, size, sum.data());
      for (int64_t c = 1; c < chunks; ++c) add_scaled(sum.data(), 1.0f, parts.data() + (i * chunks + c) * size, size);
      const int64_t item = i / op.H, first = column + i % op.H * op.D;
      to.visit([&](auto view) {
        for (int64_t p = 0; p < op.P; ++p) convert(sum.data() + p * op.D, op.D, view.row(item, p) + first, scale);
      });
    }
  });
}

// Gathers the queries, keys and values of a window as factors of products.
inline void gather_factors(Floats, const WindowAttention& op, const Window& window, WindowWorkspace& work) {
  const int64_t C = op.H * op.D, column = window.h * op.D;
  gather_window(op, op.qkv, column, window, work, work.queries);
  gather_window(op, op.qkv, C + column, window, work, work.keys);
  gather_window(op, op.qkv, 2 * C + column, window, work, work.values);
}

#if MOPE_PAIRS
inline void gather_factors(Pairs, const WindowAttention& op, const Window& window, WindowWorkspace& work) {
  const auto view = op.qkv.as<BFloat16>();
  const auto row = [&](int64_t n, int64_t part) {
    return view.row(n < op.P ? window.owner : window.item, work.place[n]) + (part * op.H + window.h) * op.D;
  };
  for (int64_t n = 0; n < op.rows(); ++n) {
    pair_columns(row(n, 0), op.D, work.queries + n * work.pairs, work.pairs);
    pair_columns(row(n, 1), op.D, work.keys + n * work.pairs, work.pairs);
  }
  for (int64_t n = 0; n < op.rows(); n += 2) {
    const BFloat16* second = n + 1 < op.rows() ? row(n + 1, 2) : work.zeros.data();
    pair_rows(row(n, 2), second, op.D, work.values + n / 2 * work.width, work.width);
  }
}
#endif

template <class Factors>
inline void attend_window(
    const WindowAttention& op, const Window& window, WindowWorkspace& work, const AnyOutput<3>& out, float* prompts) {
  alignas(64) float sums[kQueries], highest[kQueries];
  const auto steps = [](int64_t depth) { return (depth + Factors::kDepth - 1) / Factors::kDepth; };
  const int64_t keys = op.rows(), width = vectors(steps(op.D)) * kLanes;
  gather_factors(Factors(), op, window, work);
  for (int64_t first = 0; first < op.rows(); first += kQueries) {
    const int64_t count = std::min(kQueries, op.rows() - first);
    // There are spare rows after the last query, so zero padding overwrites nothing.
    transpose_queries(work.queries + first * width, count, width, work.by_width);
    product<false, Factors>(
        keys, count, steps(op.D), {work.keys, width, 1}, work.by_width, kQueries, work.scores, kQueries);
    in_blocks<4>(vectors(count), [&](auto block, int64_t n) {
      const int64_t at = n * kLanes;
      work.bias.template raise<block()>(window.h, window.index, first + at, op.scale, work.scores + at, highest + at);
      exponentials<block(), Factors>(work.scores + at, keys, highest + at, sums + at);
    });
    product<false, Factors>(
        count, op.D, steps(keys), {work.scores, 1, kQueries}, work.values, work.width, work.out, work.width);
    out.visit([&](auto to) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = first + i;
        const float factor = 1.0f / sums[i];
        const float* from = work.out + i * work.width;
        if (n < op.P)
          add_scaled(prompts + n * op.D, factor, from, op.D);
        else
          convert(from, op.D, to.row(window.item, work.place[n]) + window.h * op.D, factor);
      }
    });
  }
}

inline void window_attention(const WindowAttention& op, AnyOutput<3> out) {
  const int64_t C = op.H * op.D;
  std::vector<float> parts(op.B * op.H * op.chunks(kWindows) * op.P * op.D);
  const auto prefetch = [&](const Window& next, const std::vector<int64_t>& place) {
    for (int64_t i = 0; i < 3; ++i) prefetch_window(op, op.qkv, i * C + next.h * op.D, next.item, place);
    prefetch_window(op, out, next.h * op.D, next.item, place);
  };
  over_windows(op, false, prefetch, [&](const Window& window, WindowWorkspace& work) {
    float* prompts = parts.data() + window.part * op.P * op.D;
#if MOPE_PAIRS
    if (op.qkv.is_bfloat16) return attend_window<Pairs>(op, window, work, out, prompts);
#endif
    attend_window<Floats>(op, window, work, out, prompts);
  });
  sum_chunks(op, parts, 1.0f / op.windows(), 0, out);
}

inline void window_attention_backward(const WindowAttention& op, const WindowAttentionBackward& back) {
  const int64_t C = op.H * op.D, tokens = op.W * op.W, size = op.P * op.D, count_parts = op.B * op.H * op.chunks(kWindows);
  const bool need_qkv = bool(back.qkv);
  std::vector<float> query_parts(need_qkv ? count_parts * size : 0), key_parts(query_parts), value_parts(query_parts);
  std::vector<float> bias_parts(back.bias ? count_parts * tokens * tokens : 0);
  const auto prefetch = [&](const Window& next, const std::vector<int64_t>& place) {
    for (int64_t i = 0; i < 3; ++i) {
      prefetch_window(op, op.qkv, i * C + next.h * op.D, next.item, place);
      if (need_qkv) prefetch_window(op, back.qkv, i * C + next.h * op.D, next.item, place);
    }
    prefetch_window(op, back.grad_out, next.h * op.D, next.item, place);
  };
  over_windows(op, true, prefetch, [&](const Window& window, WindowWorkspace& work) {
    alignas(64) float highest[kQueries];
    const int64_t width = work.width, column = window.h * op.D, keys = op.rows();
    gather_factors(Floats(), op, window, work);
    gather_window(op, back.grad_out, column, window, work, work.grad_out);
    // A prompt's output is a mean over windows, so its gradient is divided by their number.
    MOPE_SIMD for (int64_t i = 0; i < op.P * width; ++i) work.grad_out[i] /= op.windows();
    std::fill_n(work.grad_keys, keys * width, 0.0f);
    std::fill_n(work.grad_values, keys * width, 0.0f);
    for (int64_t first = 0; first < op.rows(); first += kQueries) {
      const int64_t count = std::min(kQueries, op.rows() - first);
      transpose_queries(work.queries + first * width, count, width, work.by_width);
      product<false>(keys, count, op.D, {work.keys, width, 1}, work.by_width, kQueries, work.scores, kQueries);
      transpose_queries(work.grad_out + first * width, count, width, work.by_width);
      product<false>(keys, count, op.D, {work.values, width, 1}, work.by_width, kQueries, work.grad_scores, kQueries);
      in_blocks<4>(vectors(count), [&](auto block, int64_t n) {
        const int64_t at = n * kLanes;
        work.bias.template raise<block()>(window.h, window.index, first + at, op.scale, work.scores + at, highest + at);
        softmax_backward<block()>(work.scores + at, work.grad_scores + at, keys, keys, keys, highest + at, nullptr);
      });
      if (back.bias) {
        float* to = bias_parts.data() + window.part * tokens * tokens;
        for (int64_t i = std::max<int64_t>(op.P - first, 0); i < count; ++i)
          for (int64_t key = 0; key < tokens; ++key)
            to[(first + i - op.P) * tokens + key] += work.grad_scores[(op.P + key) * kQueries + i];
      }
      if (!need_qkv) continue;
      float* queries = work.queries + first * width;
      float* grad_out = work.grad_out + first * width;
      product<true>(keys, op.D, count, {work.scores, kQueries, 1}, grad_out, width, work.grad_values, width);
      product<true>(keys, op.D, count, {work.grad_scores, kQueries, 1}, queries, width, work.grad_keys, width);
      float* grad_queries = work.grad_queries + first * width;
      product<false>(count, op.D, keys, {work.grad_scores, 1, kQueries}, work.keys, width, grad_queries, width);
    }
    if (!need_qkv) return;
    const auto put = [&](const float* gradient, float scale, int64_t column, std::vector<float>& parts) {
      back.qkv.visit([&](auto to) {
        for (int64_t n = 0; n < op.rows(); ++n) {
          const float* from = gradient + n * width;
          if (n < op.P)
            add_scaled(parts.data() + window.part * size + n * op.D, scale, from, op.D);
          else
            convert(from, op.D, to.row(window.item, work.place[n]) + column, scale);
        }
      });
    };
    put(work.grad_queries, op.scale, column, query_parts);
    put(work.grad_keys, op.scale, C + column, key_parts);
    put(work.grad_values, 1.0f, 2 * C + column, value_parts);
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
