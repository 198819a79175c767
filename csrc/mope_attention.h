// The fused op (router, routed prompts and attention) and its backward. Included once per target.

inline Selection selection_of(
    const MopeAttention& op, const float* probs, const float* weights, const int64_t* indices, int64_t b) {
  if (op.dense) return {op.K, probs + b * op.K, nullptr, op.task(b)};
  return {op.k, weights + b * op.k, indices + b * op.k, op.task(b)};
}

inline void mope_attention(const MopeAttention& op, const MopeAttentionForward& result) {
  std::vector<float> inverse_stds(op.gram ? op.B * op.P : 0);
  route(op, result);
  parallel_for(0, op.gram ? op.B : 0, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Selection selection = selection_of(op, result.probs, result.weights, result.indices, b);
      for (int64_t p = 0; p < op.P; ++p) inverse_stds[b * op.P + p] = inverse_std(op, variance(op, selection, p));
    }
  });
  parallel_for(0, op.B * op.H, 1, [&](int64_t begin, int64_t end) {
    Workspace work(op, false);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / op.H, h = i % op.H;
      const Selection selection = selection_of(op, result.probs, result.weights, result.indices, b);
      const int64_t keys = gather(op, b, h, selection, op.gram ? inverse_stds.data() + b * op.P : nullptr, work);
      attend(op, b, h, keys, work, result);
    }
  });
}

// Backward pass. Each head stores its part of a shared gradient separately, and the parts are then summed in a fixed order, so the
// result does not depend on the number of threads.
class MopeAttentionGradients {
 public:
  MopeAttentionGradients(const MopeAttention& op, const MopeAttentionBackward& back)
      : op_(op),
        back_(back),
        mixture_(back.logits || back.gram),
        prompt_keys_(mixture_ || back.bank_key || back.key_offset || back.static_key || back.instance_key),
        prompt_values_(mixture_ || back.bank_value || back.value_offset || back.static_value || back.instance_value),
        variances_(op.gram ? op.B * op.P : 0),
        inverse_stds_(op.gram ? op.B * op.P : 0, 1.0f),
        grad_keys_(prompt_keys_ ? op.B * op.H * op.prompts() * op.D : 0),
        grad_values_(prompt_values_ ? op.B * op.H * op.prompts() * op.D : 0),
        products_(mixture_ ? op.B * op.H * op.k * op.P : 0),
        grad_variances_(mixture_ && op.gram ? op.B * op.P : 0) {}

  void run() {
    parallel_for(0, op_.B, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end && op_.gram; ++b) normalise(b);
    });
    parallel_for(0, op_.B * op_.H, 1, [&](int64_t begin, int64_t end) {
      Workspace work(op_, true);
      for (int64_t i = begin; i < end; ++i) head(i / op_.H, i % op_.H, work);
    });
    if (mixture_)
      parallel_for(0, op_.B, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) item(b);
      });
    shared(back_.static_key, back_.bank_key, back_.key_offset, grad_keys_);
    shared(back_.static_value, back_.bank_value, back_.value_offset, grad_values_);
    if (back_.gram)
      parallel_for(0, op_.P, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) gram(p);
      });
  }

 private:
  Selection selection(int64_t b) const { return selection_of(op_, back_.probs, back_.weights, back_.indices, b); }
  int64_t routed() const { return op_.S + op_.M; }

  void normalise(int64_t b) {
    for (int64_t p = 0; p < op_.P; ++p) {
      variances_[b * op_.P + p] = variance(op_, selection(b), p);
      inverse_stds_[b * op_.P + p] = inverse_std(op_, variances_[b * op_.P + p]);
    }
  }

  void head(int64_t b, int64_t h, Workspace& work) {
    const Selection selected = selection(b);
    const int64_t keys = gather(op_, b, h, selected, op_.gram ? inverse_stds_.data() + b * op_.P : nullptr, work);
    const int64_t visible = keys - op_.prompts();
    const Needed needed{
        back_.key ? keys : prompt_keys_ ? op_.prompts() : 0, back_.value ? keys : prompt_values_ ? op_.prompts() : 0,
        bool(back_.query)};
    attend_backward(op_, back_, b, h, keys, needed, work);
    if (back_.key) tokens(back_.key, b, h, visible, work.grad_keys, work.width);
    if (back_.value) tokens(back_.value, b, h, visible, work.grad_values, work.width);
    if (prompt_keys_) prompts(b, h, work.grad_keys, work.width, grad_keys_, back_.instance_key);
    if (prompt_values_) prompts(b, h, work.grad_values, work.width, grad_values_, back_.instance_value);
    if (!mixture_) return;
    float* product = products_.data() + (b * op_.H + h) * op_.k * op_.P;
    for (int64_t j = 0; j < selected.k; ++j)
      for (int64_t p = 0; p < op_.P; ++p) {
        const int64_t row = (routed() + p) * work.width, expert = selected.expert(j);
        *product++ = dot(work.grad_keys + row, op_.bank_key.row(expert, h, p), op_.D) +
                     dot(work.grad_values + row, op_.bank_value.row(expert, h, p), op_.D);
      }
  }

  // Stores the gradients of a head's tokens; those of hidden tokens are 0.
  void tokens(const AnyOutput<4>& to, int64_t b, int64_t h, int64_t visible, const float* from, int64_t width) const {
    to.visit([&](auto view) {
      for (int64_t l = 0; l < visible; ++l) convert(from + (op_.prompts() + l) * width, op_.D, view.row(b, h, l));
      for (int64_t l = visible; l < op_.Lk; ++l) std::fill_n(view.row(b, h, l), op_.D, std::decay_t<decltype(*view.data)>{});
    });
  }

  void prompts(int64_t b, int64_t h, const float* from, int64_t width, std::vector<float>& to, float* instance) const {
    const int64_t at = b * op_.H + h;
    for (int64_t i = 0; i < op_.prompts(); ++i) std::copy_n(from + i * width, op_.D, to.data() + (at * op_.prompts() + i) * op_.D);
    if (instance)
      for (int64_t m = 0; m < op_.M; ++m) std::copy_n(from + (op_.S + m) * width, op_.D, instance + (at * op_.M + m) * op_.D);
  }

  // Computes the gradients of an item's weights and variances from <bank, gradient of the routed prompts>, then that of its logits.
  void item(int64_t b) {
    const Selection selected = selection(b);
    std::vector<float> products(op_.k * op_.P), grad_weights(op_.k), grad_probs(op_.K);
    for (int64_t h = 0; h < op_.H; ++h)
      add_scaled(products.data(), 1.0f, products_.data() + (b * op_.H + h) * op_.k * op_.P, op_.k * op_.P);
    for (int64_t p = 0; p < op_.P; ++p) {
      const float inverse = op_.gram ? inverse_stds_[b * op_.P + p] : 1.0f;
      float total = 0.0f;
      for (int64_t j = 0; j < selected.k; ++j) {
        grad_weights[j] += inverse * products[j * op_.P + p];
        total += selected.weights[j] * products[j * op_.P + p];
      }
      if (!op_.gram) continue;
      // max(variance, 0) has zero gradient below 0.
      const bool clamped = variances_[b * op_.P + p] < 0.0f;
      const float grad_variance = clamped ? 0.0f : -0.5f * inverse * inverse * inverse * total;
      grad_variances_[b * op_.P + p] = grad_variance;
      for (int64_t j = 0; j < selected.k; ++j) grad_weights[j] += grad_variance * gram_weights(op_, selected, p, j);
    }
    if (!back_.logits) return;
    if (back_.grad_probs) std::copy_n(back_.grad_probs.row(b), op_.K, grad_probs.data());
    if (back_.grad_weights) add_scaled(grad_weights.data(), 1.0f, back_.grad_weights.row(b), op_.k);
    route_item_backward(op_, back_.probs + b * op_.K, selected, grad_weights.data(), grad_probs.data(), back_.logits + b * op_.K);
  }

  // Computes the gradients shared by all items from the gradients of the prompt keys or of the prompt values.
  void shared(float* fixed, float* bank, float* offset, const std::vector<float>& grads) const {
    const auto grad = [&](int64_t b, int64_t h, int64_t prompt) {
      return grads.data() + ((b * op_.H + h) * op_.prompts() + prompt) * op_.D;
    };
    parallel_for(0, op_.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        if (fixed) std::fill_n(fixed + h * op_.S * op_.D, op_.S * op_.D, 0.0f);
        if (offset) std::fill_n(offset + h * op_.D, op_.D, 0.0f);
        for (int64_t j = 0; j < op_.K && bank; ++j) std::fill_n(bank + (j * op_.H + h) * op_.P * op_.D, op_.P * op_.D, 0.0f);
        for (int64_t b = 0; b < op_.B; ++b) {
          if (fixed) add_scaled(fixed + h * op_.S * op_.D, 1.0f, grad(b, h, 0), op_.S * op_.D);
          const Selection selected = selection(b);
          for (int64_t p = 0; p < op_.P; ++p) {
            const float* from = grad(b, h, routed() + p);
            if (offset) add_scaled(offset + h * op_.D, 1.0f, from, op_.D);
            if (!bank) continue;
            const float inverse = op_.gram ? inverse_stds_[b * op_.P + p] : 1.0f;
            for (int64_t j = 0; j < selected.k; ++j)
              add_scaled(
                  bank + ((selected.expert(j) * op_.H + h) * op_.P + p) * op_.D, inverse * selected.weights[j], from, op_.D);
          }
        }
      }
    });
  }

  void gram(int64_t p) const {
    float* to = back_.gram + p * op_.K * op_.K;
    std::fill_n(to, op_.K * op_.K, 0.0f);
    for (int64_t b = 0; b < op_.B; ++b) {
      const Selection selected = selection(b);
      for (int64_t i = 0; i < selected.k; ++i)
        for (int64_t j = 0; j < selected.k; ++j)
          to[selected.expert(i) * op_.K + selected.expert(j)] +=
              grad_variances_[b * op_.P + p] * selected.weights[i] * selected.weights[j];
    }
  }

  const MopeAttention& op_;
  const MopeAttentionBackward& back_;
  const bool mixture_, prompt_keys_, prompt_values_;
  std::vector<float> variances_, inverse_stds_;  // (B,P)
  std::vector<float> grad_keys_, grad_values_;   // (B,H,S+M+P,D), of the prompts
  std::vector<float> products_;                  // (B,H,k,P)
  std::vector<float> grad_variances_;            // (B,P)
};

inline void mope_attention_backward(const MopeAttention& op, const MopeAttentionBackward& back) {
  MopeAttentionGradients(op, back).run();
}
