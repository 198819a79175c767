// The router of one item, and the statistics of the LayerNorm that its mixture would have gone through.
// Included once for each target.

struct Selection {
  int64_t k;
  const float* weights;
  const int64_t* indices;  // nullptr: expert j has weight j
  int64_t task;

  int64_t expert(int64_t j) const { return indices ? indices[j] : j; }
};

// r = softmax(logits / temperature + noise). `ranked` gets what the selection is made on.
inline void softmax(const MopeAttention& op, int64_t b, float* probs, float* ranked) {
  const float* logits = op.logits.row(b);
  float highest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
  for (int64_t j = 0; j < op.K; ++j) {
    ranked[j] = logits[j] / op.temperature;
    if (op.noise) ranked[j] += op.noise.row(b)[j];
    highest = std::max(highest, ranked[j]);
  }
  for (int64_t j = 0; j < op.K; ++j) sum += probs[j] = std::exp(ranked[j] - highest);
  for (int64_t j = 0; j < op.K; ++j) probs[j] /= sum;
}

// The k highest of `ranked`, sorted, ties to the lowest index. `order` is scratch for K.
inline void select(
    const MopeAttention& op, const float* probs, float* ranked, int64_t* order, float* weights, int64_t* indices) {
  // A row with a NaN has no order: it takes the first experts.
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

// The gradient of the logits from that of the routing weights, by way of renormalisation, selection and softmax.
// `grad_probs` (K) comes with what reaches the probabilities directly.
inline void route_backward(
    const MopeAttention& op, const float* probs, const Selection& selection, const float* grad_weights, float* grad_probs,
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

// (G w)_i and (G' w)_i summed, for a selected expert i of prompt p; half of it is the gradient of w'Gw if G is symmetric.
inline float gram_weights(const MopeAttention& op, const Selection& selection, int64_t p, int64_t i) {
  const int64_t expert = selection.expert(i);
  const float* row = op.gram.row(selection.task, p, expert);
  float sum = 0.0f;
  for (int64_t j = 0; j < selection.k; ++j)
    sum += selection.weights[j] * (row[selection.expert(j)] + op.gram.row(selection.task, p, selection.expert(j))[expert]);
  return sum;
}

// w' G_p w, the variance of the mixed expert before any clamping.
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
