// The start of a routed block (residual add, router, mixture of prompts, LayerNorm) and its backward. Included once per target.

// Rows of an item per partial sum of the mean that the router uses.
inline constexpr int64_t kPooledRows = 32;

// Adds and normalises the token rows. If `sums` (B, chunks, C) is not empty, it receives the sum of each chunk of rows.
inline void norm_tokens(
    const PromptedNorm& op, const PromptedNormForward& io, const Norm& norm, int64_t chunks, std::vector<float>& sums) {
  parallel_for(0, op.B * chunks, norm_grain(kPooledRows * op.C), [&](int64_t begin, int64_t end) {
    NormScratch scratch(op.C);
    // Replaced rows contribute to the mean but are not stored.
    std::vector<float> nowhere(op.C);
    const AnyOutput<3> replaced{nowhere.data(), {0, 0}, io.total.is_bfloat16};
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / chunks, first = unit % chunks * kPooledRows, last = std::min(first + kPooledRows, op.N);
      for (int64_t n = sums.empty() ? std::max(first, op.replaced) : first; n < last; ++n) {
        const bool stays = n >= op.replaced;
        const int64_t place = op.prompts() + n - op.replaced;
        const float* update = io.update ? floats(io.update, op.C, scratch.update, b, n) : nullptr;
        const float* row =
            add_row(floats(io.x, op.C, scratch.x, b, n), update, op.C, stays ? io.total : replaced, scratch, b, stays ? place : 0);
        if (!sums.empty()) add_scaled(sums.data() + unit * op.C, 1.0f, row, op.C);
        if (stays) write_row(io.normed, op.C, scratch.out, [&](float* to) { norm.forward(row, to); }, b, place);
      }
    }
  });
}

// query (s) = mean W' + b
inline void router_query(const PromptedNorm& op, const float* mean, float* query) {
  for (int64_t i = 0; i < op.query; ++i)
    query[i] = dot(mean, op.self_weight + i * op.C, op.C) + (op.self_bias ? op.self_bias[i] : 0.0f);
}

// The logits of all items (B,K), from the sums of their rows and from cross_logits. The means are stored in `pooled`, if given.
inline void router_logits(
    const PromptedNorm& op, Input<2> cross_logits, int64_t chunks, const std::vector<float>& sums, float* pooled, float* logits) {
  parallel_for(0, op.B, norm_grain(chunks * op.C), [&](int64_t begin, int64_t end) {
    std::vector<float> mean(op.C), query(op.query);
    for (int64_t b = begin; b < end; ++b, std::fill(mean.begin(), mean.end(), 0.0f)) {
      float* to = logits + b * op.K;
      std::fill_n(to, op.K, 0.0f);
      if (op.query || pooled) {
        for (int64_t c = 0; c < chunks; ++c) add_scaled(mean.data(), 1.0f, sums.data() + (b * chunks + c) * op.C, op.C);
        for (float& x : mean) x /= op.N;
        if (pooled) std::copy_n(mean.data(), op.C, pooled + b * op.C);
        router_query(op, mean.data(), query.data());
        for (int64_t i = 0; i < op.query; ++i) add_scaled(to, query[i], op.self_keys + i * op.K, op.K);
      }
      if (cross_logits) add_scaled(to, 1.0f, cross_logits.row(b), op.K);
    }
  });
}

// The mixture of the experts (K, P*C) with the weights of the router or with given weights.
inline MixPrompts mixture(const PromptedNorm& op, Input<2> weights, View<const int64_t, 2> indices) {
  return {op.B, op.K, op.k, op.P * op.C, op.experts, weights, indices};
}

inline void prompted_norm(const PromptedNorm& op, const PromptedNormForward& io) {
  const Norm norm(op.C, op.eps, op.weight, io.bias);
  const int64_t chunks = (op.N + kPooledRows - 1) / kPooledRows, prompts = op.prompts();
  std::vector<float> sums(op.query || io.pooled ? op.B * chunks * op.C : 0);
  norm_tokens(op, io, norm, chunks, sums);

  Input<2> weights = io.routing_weights;
  View<const int64_t, 2> indices = io.routing_indices;
  if (op.K && !weights) {
    std::vector<float> logits(op.B * op.K);
    router_logits(op, io.cross_logits, chunks, sums, io.pooled, logits.data());
    Route router = op;
    router.logits = {logits.data(), {op.K}};
    route(router, io);
    if (op.dense)
      for (int64_t b = 0; b < op.B; ++b) std::iota(io.indices + b * op.K, io.indices + (b + 1) * op.K, int64_t{0});
    weights = {op.dense ? io.probs : io.weights, {op.k}}, indices = {io.indices, {op.k}};
  }
  // If the output rows are floats, compute the mixture directly in them.
  std::vector<float> mixed;
  Output<2> routed;
  if (op.K && !io.total.is_bfloat16) {
    const Output<3> total = io.total.as<float>();
    routed = {total.row(0, op.S), {total.stride[0]}};
  } else if (op.K) {
    mixed.resize(op.B * op.P * op.C);
    routed = {mixed.data(), {op.P * op.C}};
  }
  if (op.K) mix_prompts(mixture(op, weights, indices), routed);

  parallel_for(0, op.B * prompts, norm_grain(op.C), [&](int64_t begin, int64_t end) {
    NormScratch scratch(op.C);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / prompts, i = unit % prompts, p = i - op.S, m = p - op.P;
      const float* row = i < op.S    ? io.static_prompts.row(i)
                         : p < op.P  ? routed.row(b) + p * op.C
                                     : floats(io.mapped, op.C, scratch.x, b, m);
      if (i < op.S || p >= op.P || !mixed.empty()) row = add_row(row, nullptr, op.C, io.total, scratch, b, i);
      write_row(io.normed, op.C, scratch.out, [&](float* to) { norm.forward(row, to); }, b, i);
    }
  });
}

// Gradients of the router's logits (B,K), and of its query (B,s), which it computes from the mean.
struct RouterGradients {
  std::vector<float> logits, query;
};

// Computes them from the gradient of the weights (B,k), which is overwritten.
inline RouterGradients router_backward(const PromptedNorm& op, const PromptedNormBackward& back, float* grad_weights) {
  RouterGradients grads{std::vector<float>(op.B * op.K), std::vector<float>(op.B * op.query)};
  // Dense weights are the probabilities.
  const Input<2> direct = op.dense ? back.grad_probs : back.grad_weights, through_weights{grad_weights, {op.k}};
  if (direct)
    for (int64_t b = 0; b < op.B; ++b) add_scaled(grad_weights + b * op.k, 1.0f, direct.row(b), op.k);
  RouteBackward route{};
  route.grad_probs = op.dense ? through_weights : back.grad_probs;
  if (!op.dense) route.grad_weights = through_weights;
  route.probs = back.probs, route.weights = back.weights, route.indices = back.indices, route.logits = grads.logits.data();
  route_backward(op, route);
  for (int64_t b = 0; b < op.B; ++b)
    for (int64_t i = 0; i < op.query; ++i)
      grads.query[b * op.query + i] = dot(grads.logits.data() + b * op.K, op.self_keys + i * op.K, op.K);
  return grads;
}

// Gradients of the router's own parameters, summed over the items in order.
inline void router_parameters_backward(const PromptedNorm& op, const PromptedNormBackward& back, const RouterGradients& grads) {
  if (back.self_keys) {
    std::vector<float> query(op.query);
    std::fill_n(back.self_keys, op.query * op.K, 0.0f);
    for (int64_t b = 0; b < op.B; ++b) {
      router_query(op, back.pooled + b * op.C, query.data());
      for (int64_t i = 0; i < op.query; ++i)
        add_scaled(back.self_keys + i * op.K, query[i], grads.logits.data() + b * op.K, op.K);
    }
  }
  if (back.self_bias) {
    std::fill_n(back.self_bias, op.query, 0.0f);
    for (int64_t b = 0; b < op.B; ++b) add_scaled(back.self_bias, 1.0f, grads.query.data() + b * op.query, op.query);
  }
  if (back.self_weight)
    parallel_for(0, op.query, norm_grain(op.B * op.C), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::fill_n(back.self_weight + i * op.C, op.C, 0.0f);
        for (int64_t b = 0; b < op.B; ++b)
          add_scaled(back.self_weight + i * op.C, grads.query[b * op.query + i], back.pooled + b * op.C, op.C);
      }
    });
}

inline void prompted_norm_backward(const PromptedNorm& op, const PromptedNormBackward& back) {
  const Norm norm(op.C, op.eps, op.weight, nullptr);
  const int64_t prompts = op.prompts(), C = op.C;
  for (float* sum : {back.weight, back.bias})
    if (sum) std::fill_n(sum, C, 0.0f);
  const auto row_backward = [&](int64_t b, int64_t i, const float* shared, float* to, float* weight_sum, float* bias_sum,
                                NormScratch& scratch) {
    const float* grad_normed = back.grad_normed ? floats(back.grad_normed, C, scratch.update, b, i) : nullptr;
    const float* grad_total = back.grad_total ? floats(back.grad_total, C, scratch.x, b, i) : nullptr;
    const float* row = floats(back.total, C, scratch.total, b, i);
    norm_row_backward(norm, row, grad_normed, grad_total, shared, to, weight_sum, bias_sum);
  };

  // First the gradients of the prompt rows (B, prompts, C), because the router's gradients depend on them.
  if (back.prompts)
    over_norm_rows(op.B * prompts, C, back.weight, back.bias, [&](int64_t r, float* weight_sum, float* bias_sum, NormScratch& scratch) {
      row_backward(r / prompts, r % prompts, nullptr, back.prompts + r * C, weight_sum, bias_sum, scratch);
    });
  if (back.static_prompts)
    over_columns(op.S * C, [&](int64_t first, int64_t columns) {
      std::fill_n(back.static_prompts + first, columns, 0.0f);
      for (int64_t b = 0; b < op.B; ++b)
        add_scaled(back.static_prompts + first, 1.0f, back.prompts + b * prompts * C + first, columns);
    });
  if (back.experts || back.routing_weights) {
    const MixPrompts mix = mixture(op, {op.dense ? back.probs : back.weights, {op.k}}, {back.indices, {op.k}});
    mix_prompts_backward(mix, {back.prompts + op.S * C, {prompts * C}}, back.experts, back.routing_weights);
  }

  std::vector<float> shared;
  if (back.needs_router) {
    const RouterGradients grads = router_backward(op, back, back.routing_weights);
    if (back.cross_logits) std::copy(grads.logits.begin(), grads.logits.end(), back.cross_logits);
    router_parameters_backward(op, back, grads);
    if (op.query && (back.x || back.update)) {
      shared.resize(op.B * C);
      for (int64_t b = 0; b < op.B; ++b)
        for (int64_t i = 0; i < op.query; ++i)
          add_scaled(shared.data() + b * C, grads.query[b * op.query + i] / op.N, op.self_weight + i * C, C);
    }
  }

  if (!back.x && !back.update && !back.weight && !back.bias) return;
  over_norm_rows(op.B * op.N, C, back.weight, back.bias, [&](int64_t r, float* weight_sum, float* bias_sum, NormScratch& scratch) {
    const int64_t b = r / op.N, n = r % op.N;
    const float* of_item = shared.empty() ? nullptr : shared.data() + b * C;
    write_both(
        back.x, back.update, C, scratch.out,
        [&](float* to) {
          if (n >= op.replaced)
            row_backward(b, prompts + n - op.replaced, of_item, to, weight_sum, bias_sum, scratch);
          else if (to && of_item)
            std::copy_n(of_item, C, to);
          else if (to)
            std::fill_n(to, C, 0.0f);
        },
        b, n);
  });
}
