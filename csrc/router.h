// The router, and the statistics of the LayerNorm folded into its mixture. Included once per target.

// Minimum number of items or rows of light work per thread.
inline constexpr int64_t kGrain = 16;

struct Selection {
  int64_t k;
  const float* weights;
  const int64_t* indices;  // nullptr: expert j has weight j
  int64_t task;

  int64_t expert(int64_t j) const { return indices ? indices[j] : j; }
};

// to = e^(from - highest). Returns the sum.
inline float exponentials_of_row(const float* from, float highest, float* to, int64_t n) {
  Vec sum = splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec e = exp(load(from + i) - splat(highest));
    store(to + i, e);
    sum += e;
  }
  float total = sum_lanes(sum);
  for (; i < n; ++i) total += to[i] = std::exp(from[i] - highest);
  return total;
}

// probs = softmax(logits / temperature + noise). `ranked` receives the scores by which experts are selected.
inline void softmax(const Route& op, int64_t b, float* probs, float* ranked) {
  const float* logits = op.logits.row(b);
  float highest = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < op.K; ++j) {
    ranked[j] = logits[j] / op.temperature;
    if (op.noise) ranked[j] += op.noise.row(b)[j];
    highest = std::max(highest, ranked[j]);
  }
  const float sum = exponentials_of_row(ranked, highest, probs, op.K);
  for (int64_t j = 0; j < op.K; ++j) probs[j] /= sum;
}

// Selects the k highest of `ranked`, sorted; ties go to the lowest index. `order` is scratch memory for K indices.
inline void select(
    const Route& op, const float* probs, float* ranked, int64_t* order, float* weights, int64_t* indices) {
  // A row with NaN has no order, so select the first experts.
  if (std::isnan(probs[0])) std::fill_n(ranked, op.K, 0.0f);
  std::iota(order, order + op.K, int64_t{0});
  std::partial_sort(order, order + op.k, order + op.K, [&](int64_t i, int64_t j) {
    return ranked[i] > ranked[j] || (ranked[i] == ranked[j] && i < j);
  });
  float sum = 0.0f;
  for (int64_t j = 0; j < op.k; ++j) {
    indices[j] = order[j];
    sum += weights[j] = probs[order[j]];
  }
  if (op.renormalize)
    for (int64_t j = 0; j < op.k; ++j) weights[j] /= sum;
}

// Computes the gradient of the logits from that of the routing weights, through renormalisation, selection and softmax.
// `grad_probs` (K) initially holds the direct gradient of the probabilities.
inline void route_item_backward(
    const Route& op, const float* probs, const Selection& selection, const float* grad_weights, float* grad_probs,
    float* grad_logits) {
  float common = 0.0f, sum = 1.0f;
  if (op.renormalize && !op.dense) {
    sum = 0.0f;
    for (int64_t j = 0; j < selection.k; ++j) {
      common += grad_weights[j] * selection.weights[j];
      sum += probs[selection.expert(j)];
    }
  }
  for (int64_t j = 0; j < selection.k; ++j) grad_probs[selection.expert(j)] += (grad_weights[j] - common) / sum;
  const float mean = dot(grad_probs, probs, op.K);
  for (int64_t j = 0; j < op.K; ++j) grad_logits[j] = probs[j] * (grad_probs[j] - mean) / op.temperature;
}

inline void route(const Route& op, const RouteForward& result) {
  parallel_for(0, op.B, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> ranked(op.K);
    std::vector<int64_t> order(op.dense ? 0 : op.K);
    for (int64_t b = begin; b < end; ++b) {
      float* probs = result.probs + b * op.K;
      softmax(op, b, probs, ranked.data());
      if (!op.dense) select(op, probs, ranked.data(), order.data(), result.weights + b * op.k, result.indices + b * op.k);
    }
  });
}

inline void route_backward(const Route& op, const RouteBackward& back) {
  parallel_for(0, op.B, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> grad_probs(op.K), grad_weights(op.k);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(grad_probs.begin(), grad_probs.end(), 0.0f);
      if (back.grad_probs) std::copy_n(back.grad_probs.row(b), op.K, grad_probs.data());
      if (back.grad_weights) std::copy_n(back.grad_weights.row(b), op.k, grad_weights.data());
      // Dense weights are the probabilities, and their gradient is part of grad_probs.
      const Selection selection =
          op.dense ? Selection{0, nullptr, nullptr} : Selection{op.k, back.weights + b * op.k, back.indices + b * op.k};
      route_item_backward(op, back.probs + b * op.K, selection, grad_weights.data(), grad_probs.data(), back.logits + b * op.K);
    }
  });
}

// The squared coefficient of variation of the expert loads. Uses float64 sums, because nearly even loads cancel.
struct Unevenness {
  Unevenness(const double* load, int64_t experts) {
    for (int64_t j = 0; j < experts; ++j) mean += load[j] / experts;
    // Probabilities sum to 1, so only an empty batch has a mean of 0; its loads do not vary.
    if (mean == 0.0) mean = 1.0;
    for (int64_t j = 0; j < experts; ++j) squared += (load[j] - mean) * (load[j] - mean) / (experts - 1);
    squared /= mean * mean;
  }
  double mean = 0.0, squared = 0.0;
};

inline void importance_loss(const ImportanceLoss& op, Input<3> probs, float* loss, float* load) {
  std::vector<double> sums(op.K);
  for (int64_t l = 0; l < op.L; ++l) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t b = 0; b < op.B; ++b)
      for (int64_t j = 0; j < op.K; ++j) sums[j] += probs.row(l, b)[j];
    std::copy_n(sums.data(), op.K, load + l * op.K);
    const bool counts = op.B > 0 && op.K > 1;
    const double squared = counts ? Unevenness(sums.data(), op.K).squared : std::accumulate(sums.begin(), sums.end(), 0.0) * 0.0;
    loss[l] = squared <= op.threshold ? 0.0f : static_cast<float>(squared);
  }
}

inline void importance_loss_backward(const ImportanceLoss& op, const float* grad_loss, const float* load, float* grad_load) {
  std::vector<double> sums(op.K);
  for (int64_t l = 0; l < op.L; ++l, load += op.K, grad_load += op.K) {
    std::fill_n(grad_load, op.K, 0.0f);
    if (op.K == 1) continue;
    std::copy_n(load, op.K, sums.data());
    const auto [mean, squared] = Unevenness(sums.data(), op.K);
    if (squared <= op.threshold) continue;
    for (int64_t j = 0; j < op.K; ++j) {
      const double grad = (sums[j] - mean) / (mean * mean) / (op.K - 1) - squared / mean / op.K;
      grad_load[j] = static_cast<float>(2.0 * grad * grad_loss[l]);
    }
  }
}

// ((G + G') w)_i for a selected expert i of prompt p: the gradient of w' G_p w.
inline float gram_weights(const MopeAttention& op, const Selection& selection, int64_t p, int64_t i) {
  const int64_t expert = selection.expert(i);
  const float* row = op.gram.row(selection.task, p, expert);
  float sum = 0.0f;
  for (int64_t j = 0; j < selection.k; ++j)
    sum += selection.weights[j] * (row[selection.expert(j)] + op.gram.row(selection.task, p, selection.expert(j))[expert]);
  return sum;
}

// w' G_p w, the variance of the mixed expert before clamping.
inline float variance(const MopeAttention& op, const Selection& selection, int64_t p) {
  float sum = 0.0f;
  for (int64_t i = 0; i < selection.k; ++i) {
    const float* row = op.gram.row(selection.task, p, selection.expert(i));
    float inner = 0.0f;
    for (int64_t j = 0; j < selection.k; ++j) inner += row[selection.expert(j)] * selection.weights[j];
    sum += selection.weights[i] * inner;
  }
  return sum;
}

inline float inverse_std(const MopeAttention& op, float variance) { return 1.0f / std::sqrt(std::max(variance, 0.0f) + op.eps); }
