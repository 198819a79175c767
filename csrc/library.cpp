// Ops of the namespace mope_cpu, which pass tensors to the kernels. mope_kernels/_ops.py describes the conventions; the schemas and
// fakes are in mope_kernels/<op>_details/spec.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace mope {
namespace {

MixPrompts mix_prompts_problem(Arguments& arguments, const Tensor& experts, const Tensor& weights, const Tensor& indices) {
  STD_TORCH_CHECK(experts.dim() == 3, "mix_prompts: experts must have shape (K, P, D), got ", to_string(experts.sizes()));
  STD_TORCH_CHECK(indices.dim() == 2, "mix_prompts: indices must have shape (B, k), got ", to_string(indices.sizes()));
  const int64_t K = experts.size(0), P = experts.size(1), D = experts.size(2), B = indices.size(0), k = indices.size(1);
  MixPrompts op{B, K, k, P * D, nullptr, {}, {}};
  op.experts = arguments.dense<float>("experts", experts, {K, P, D});
  op.weights = arguments.rows<2>("weights", weights, {B, k});
  op.indices = arguments.integers<2>("indices", indices, {B, k});
  for (int64_t b = 0; b < B; ++b)
    for (int64_t j = 0; j < k; ++j) {
      const int64_t index = op.indices.row(b)[j];
      STD_TORCH_CHECK(0 <= index && index < K, "mix_prompts: indices must lie in 0..", K - 1, ", got ", index);
    }
  return op;
}

Tensor mix_prompts(Tensor experts, Tensor weights, Tensor indices) {
  Arguments arguments("mix_prompts");
  const MixPrompts op = mix_prompts_problem(arguments, experts, weights, indices);
  FloatResults results;
  float* data;
  Tensor out = results.like(experts, data, op.B, experts.size(1), experts.size(2));
  kernels().mix_prompts(op, {data, {op.width}});
  results.finish();
  return out;
}

std::tuple<Tensor, Tensor> mix_prompts_backward(
    Tensor grad_out, Tensor experts, Tensor weights, Tensor indices, int64_t needs) {
  Arguments arguments("mix_prompts_backward");
  const MixPrompts op = mix_prompts_problem(arguments, experts, weights, indices);
  const int64_t P = experts.size(1), D = experts.size(2);
  const float* grad = arguments.dense<float>("grad_out", grad_out, {op.B, P, D});
  FloatResults results;
  float *to_experts = nullptr, *to_weights = nullptr;
  Tensor grad_experts = needs & 1 ? results.like(experts, to_experts, op.K, P, D) : empty_like(experts, 0);
  Tensor grad_weights = needs & 2 ? results.like(weights, to_weights, op.B, op.k) : empty_like(weights, 0);
  kernels().mix_prompts_backward(op, {grad, {op.width}}, to_experts, to_weights);
  results.finish();
  return {grad_experts, grad_weights};
}

std::tuple<Tensor, Tensor, Tensor> route(Tensor logits, Optional noise, int64_t top_k, double temperature, bool renormalize) {
  STD_TORCH_CHECK(logits.dim() == 2, "route: logits must be (B, K), got ", to_string(logits.sizes()));
  Arguments arguments("route");
  const int64_t B = logits.size(0), K = logits.size(1);
  STD_TORCH_CHECK(0 <= top_k && top_k <= K, "route: top_k must lie in 0..", K, ", the number of experts, got ", top_k);
  Route op{B, K, top_k};
  op.logits = arguments.rows<2>("logits", logits, {B, K});
  op.noise = arguments.rows<2>("noise", noise, {B, K});
  op.dense = top_k == 0, op.renormalize = renormalize, op.temperature = static_cast<float>(temperature);
  Tensor probs = empty(B, K), weights = empty(B, top_k), indices = empty<int64_t>(B, top_k);
  kernels().route(
      op, {probs.mutable_data_ptr<float>(), weights.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>()});
  return {probs, weights, indices};
}

Tensor route_backward(
    Optional grad_probs, Optional grad_weights, Tensor probs, Tensor weights, Tensor indices, double temperature,
    bool renormalize) {
  STD_TORCH_CHECK(
      probs.dim() == 2 && weights.dim() == 2, "route_backward: probs must be (B, K) and weights (B, k), got ",
      to_string(probs.sizes()), " and ", to_string(weights.sizes()));
  Arguments arguments("route_backward");
  const int64_t B = probs.size(0), K = probs.size(1), k = weights.size(1);
  Route op{B, K, k};
  op.dense = k == 0, op.renormalize = renormalize, op.temperature = static_cast<float>(temperature);
  Tensor grad_logits = empty(B, K);
  RouteBackward back{};
  back.grad_probs = arguments.rows<2>("grad_probs", grad_probs, {B, K});
  if (!op.dense) back.grad_weights = arguments.rows<2>("grad_weights", grad_weights, {B, k});
  back.probs = arguments.dense<float>("probs", probs, {B, K});
  back.weights = arguments.dense<float>("weights", weights, {B, k});
  back.indices = arguments.dense<int64_t>("indices", indices, {B, k});
  back.logits = grad_logits.mutable_data_ptr<float>();
  kernels().route_backward(op, back);
  return grad_logits;
}

std::tuple<Tensor, Tensor> importance_loss(Tensor probs, double threshold) {
  STD_TORCH_CHECK(probs.dim() == 3, "importance_loss: probs must be (L, B, K), got ", to_string(probs.sizes()));
  Arguments arguments("importance_loss");
  const ImportanceLoss op{probs.size(0), probs.size(1), probs.size(2), static_cast<float>(threshold)};
  const Input<3> rows = arguments.rows<3>("probs", probs, {op.L, op.B, op.K});
  Tensor loss = empty(op.L), load = empty(op.L, op.K);
  kernels().importance_loss(op, rows, loss.mutable_data_ptr<float>(), load.mutable_data_ptr<float>());
  return {loss, load};
}

Tensor importance_loss_backward(Tensor grad_loss, Tensor load, double threshold) {
  STD_TORCH_CHECK(load.dim() == 2, "importance_loss_backward: load must be (L, K), got ", to_string(load.sizes()));
  Arguments arguments("importance_loss_backward");
  const ImportanceLoss op{load.size(0), 0, load.size(1), static_cast<float>(threshold)};
  const float* grad = arguments.dense<float>("grad_loss", grad_loss, {op.L});
  const float* loads = arguments.dense<float>("load", load, {op.L, op.K});
  Tensor grad_load = empty(op.L, op.K);
  kernels().importance_loss_backward(op, grad, loads, grad_load.mutable_data_ptr<float>());
  return grad_load;
}

// The arguments of both forward and backward. This is a macro because TORCH_BOX needs each of them as a parameter.
#define MOPE_ATTENTION_PARAMETERS                                                                                           \
  Tensor query, Tensor key, Tensor value, Tensor logits, Optional noise, Tensor bank_key, Tensor bank_value, Optional gram, \
    Optional key_offset, Optional value_offset, Optional static_key, Optional static_value, Optional instance_key,          \
    Optional instance_value, Optional lengths, [[maybe_unused]] Optional seed, int64_t top_k, double temperature,           \
    bool renormalize, double eps, double scale, double dropout_p
#define MOPE_ATTENTION_ARGUMENTS                                                                                    \
  query, key, value, logits, noise, bank_key, bank_value, gram, key_offset, value_offset, static_key, static_value, \
    instance_key, instance_value, lengths, seed, top_k, temperature, renormalize, eps, scale, dropout_p

MopeAttention mope_attention_problem(Arguments& arguments, MOPE_ATTENTION_PARAMETERS, const Optional& task_ids = {}) {
  STD_TORCH_CHECK(
      query.dim() == 4 && key.dim() == 4 && logits.dim() == 2 && bank_key.dim() == 4,
      "mope_attention: query and key must be (B, H, L, D), logits (B, K) and bank_key (K, H, P, D), got ",
      to_string(query.sizes()), ", ", to_string(key.sizes()), ", ", to_string(logits.sizes()), " and ",
      to_string(bank_key.sizes()));
  STD_TORCH_CHECK(dropout_p == 0.0, "mope_attention: the CPU kernel has no dropout, got dropout_p = ", dropout_p);
  const int64_t B = query.size(0), H = query.size(1), Lq = query.size(2), D = query.size(3), Lk = key.size(2);
  const int64_t K = logits.size(1), P = bank_key.size(2);
  STD_TORCH_CHECK(
      K >= 1 && 0 <= top_k && top_k <= K, "mope_attention: top_k must lie in 0..", K, ", the number of experts, got ", top_k);
  MopeAttention op{};
  op.B = B, op.H = H, op.Lq = Lq, op.Lk = Lk, op.D = D, op.K = K, op.P = P;
  op.dense = top_k == 0, op.k = op.dense ? K : top_k, op.renormalize = renormalize;
  op.temperature = static_cast<float>(temperature), op.eps = static_cast<float>(eps), op.scale = static_cast<float>(scale);

  op.query = arguments.any_rows<4>("query", query, {B, H, Lq, D});
  op.key = arguments.any_rows<4>("key", key, {B, H, Lk, D});
  op.value = arguments.any_rows<4>("value", value, {B, H, Lk, D});
  op.logits = arguments.rows<2>("logits", logits, {B, K});
  op.noise = arguments.rows<2>("noise", noise, {B, K});
  const int64_t T = task_ids ? bank_key.size(0) / K : 1;
  op.bank_key = arguments.rows<4>("bank_key", bank_key, {T * K, H, P, D});
  op.bank_value = arguments.rows<4>("bank_value", bank_value, {T * K, H, P, D});
  op.gram = arguments.rows_of_tasks("gram", gram, bool(task_ids), {T, P, K, K});
  op.key_offset = arguments.rows<2>("key_offset", key_offset, {H, D});
  op.value_offset = arguments.rows<2>("value_offset", value_offset, {H, D});
  arguments.both_or_neither("static_key", static_key, "static_value", static_value);
  if (static_key) {
    const int64_t dims = static_key->dim();
    op.S = dims == (task_ids ? 4 : 3) ? static_key->size(dims - 2) : 0;
    op.static_key = arguments.rows_of_tasks("static_key", static_key, bool(task_ids), {T, H, op.S, D});
    op.static_value = arguments.rows_of_tasks("static_value", static_value, bool(task_ids), {T, H, op.S, D});
  }
  arguments.both_or_neither("instance_key", instance_key, "instance_value", instance_value);
  if (instance_key) {
    op.M = instance_key->dim() == 4 ? instance_key->size(2) : 0;
    op.instance_key = arguments.rows<4>("instance_key", instance_key, {B, H, op.M, D});
    op.instance_value = arguments.rows<4>("instance_value", instance_value, {B, H, op.M, D});
  }
  op.lengths = arguments.lengths(lengths, B);
  if (!task_ids) return op;
  op.task_ids = arguments.dense<int64_t>("task_ids", *task_ids, {B});
  for (int64_t b = 0; b < B; ++b)
    STD_TORCH_CHECK(
        0 <= op.task_ids[b] && op.task_ids[b] < T, "mope_attention: task_ids must lie in 0..", T - 1, ", got ", op.task_ids[b]);
  return op;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mope_attention(MOPE_ATTENTION_PARAMETERS, Optional task_ids) {
  Arguments arguments("mope_attention");
  const MopeAttention op = mope_attention_problem(arguments, MOPE_ATTENTION_ARGUMENTS, task_ids);
  Tensor out = empty_heads_last(query, op.B, op.H, op.Lq, op.D), lse = empty(op.B, op.H, op.Lq), probs = empty(op.B, op.K);
  Tensor weights = empty(op.B, top_k), indices = empty<int64_t>(op.B, top_k);
  kernels().mope_attention(
      op, {{probs.mutable_data_ptr<float>(), weights.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>()},
           any_rows<4>(out), lse.mutable_data_ptr<float>()});
  return {out, lse, probs, weights, indices};
}

// In the order of GRADIENTS in mope_attention_details/spec.py.
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients mope_attention_backward(
    Tensor grad_out, Optional grad_probs, Optional grad_weights, Tensor out, Tensor lse, Tensor probs, Tensor weights,
    Tensor indices, MOPE_ATTENTION_PARAMETERS, int64_t needs) {
  Arguments arguments("mope_attention_backward");
  const MopeAttention op = mope_attention_problem(arguments, MOPE_ATTENTION_ARGUMENTS);
  const int64_t B = op.B, H = op.H, K = op.K, P = op.P, D = op.D;
  MopeAttentionBackward back{};
  back.grad_out = arguments.any_rows<4>("grad_out", grad_out, {B, H, op.Lq, D});
  back.out = arguments.any_rows<4>("out", out, {B, H, op.Lq, D});
  back.grad_probs = arguments.rows<2>("grad_probs", grad_probs, {B, K});
  // Dense weights are the probabilities, and their gradient is part of grad_probs.
  if (!op.dense) back.grad_weights = arguments.rows<2>("grad_weights", grad_weights, {B, top_k});
  back.lse = arguments.dense<float>("lse", lse, {B, H, op.Lq});
  back.probs = arguments.dense<float>("probs", probs, {B, K});
  back.weights = arguments.dense<float>("weights", weights, {B, top_k});
  back.indices = arguments.dense<int64_t>("indices", indices, {B, top_k});

  int bit = 0;
  const auto needed = [&](bool given) {
    const bool asked = needs >> bit++ & 1;
    STD_TORCH_CHECK(
        given || !asked, "mope_attention_backward: bit ", bit - 1, " of needs requests the gradient of a tensor that is not given");
    return asked;
  };
  const auto tokens = [&](AnyOutput<4>& to, const Tensor& like, int64_t length) {
    if (!needed(true)) return empty_like(query, 0);
    Tensor grad = empty_heads_last(like, B, H, length, D);
    to = any_rows<4>(grad);
    return grad;
  };
  FloatResults results;
  const auto dense = [&](float*& to, const Optional& like, auto... sizes) {
    return needed(like.has_value()) ? results.like(*like, to, sizes...) : empty_like(query, 0);
  };
  // Always float32, regardless of the dtype of the logits, because the gradient of the noise is derived from it.
  const auto of_logits = [&] {
    if (!needed(true)) return empty_like(query, 0);
    Tensor grad = empty(B, K);
    back.logits = grad.mutable_data_ptr<float>();
    return grad;
  };
  // Braced initialisers are evaluated from left to right.
  Gradients gradients{
      tokens(back.query, query, op.Lq),
      tokens(back.key, key, op.Lk),
      tokens(back.value, value, op.Lk),
      of_logits(),
      dense(back.bank_key, bank_key, K, H, P, D),
      dense(back.bank_value, bank_value, K, H, P, D),
      dense(back.gram, gram, P, K, K),
      dense(back.key_offset, key_offset, H, D),
      dense(back.value_offset, value_offset, H, D),
      dense(back.static_key, static_key, H, op.S, D),
      dense(back.static_value, static_value, H, op.S, D),
      dense(back.instance_key, instance_key, B, H, op.M, D),
      dense(back.instance_value, instance_value, B, H, op.M, D),
  };
  kernels().mope_attention_backward(op, back);
  results.finish();
  return gradients;
}

// The arguments of both forward and backward.
#define PROMPT_ATTENTION_PARAMETERS                                                                                     \
  Tensor query, Tensor key, Tensor value, Tensor prompt_key, Tensor prompt_value, Optional lengths, Optional attn_bias, \
    [[maybe_unused]] Optional seed, bool is_causal, double scale, double dropout_p
#define PROMPT_ATTENTION_ARGUMENTS \
  query, key, value, prompt_key, prompt_value, lengths, attn_bias, seed, is_causal, scale, dropout_p

// The problem without experts. Prompts shared by all items are passed as static prompts, others as instance prompts.
MopeAttention prompt_attention_problem(Arguments& arguments, PROMPT_ATTENTION_PARAMETERS) {
  STD_TORCH_CHECK(
      query.dim() == 4 && key.dim() == 4 && prompt_key.dim() == 4 && prompt_value.dim() == 4,
      "prompt_attention: query and key must be (B, H, L, D), prompt_key and prompt_value (B or 1, H, P, D), got ",
      to_string(query.sizes()), ", ", to_string(key.sizes()), ", ", to_string(prompt_key.sizes()), " and ",
      to_string(prompt_value.sizes()));
  STD_TORCH_CHECK(dropout_p == 0.0, "prompt_attention: the CPU kernel has no dropout, got dropout_p = ", dropout_p);
  const int64_t B = query.size(0), H = query.size(1), Lq = query.size(2), D = query.size(3), Lk = key.size(2);
  const int64_t prompts = prompt_key.size(2);
  STD_TORCH_CHECK(!is_causal || Lq == Lk, "prompt_attention: is_causal needs as many queries as tokens, got ", Lq, " and ", Lk);
  MopeAttention op{};
  op.B = B, op.H = H, op.Lq = Lq, op.Lk = Lk, op.D = D, op.dense = true;
  op.is_causal = is_causal, op.scale = static_cast<float>(scale);
  op.query = arguments.any_rows<4>("query", query, {B, H, Lq, D});
  op.key = arguments.any_rows<4>("key", key, {B, H, Lk, D});
  op.value = arguments.any_rows<4>("value", value, {B, H, Lk, D});
  const int64_t owners = prompt_key.size(0) == 1 ? 1 : B;
  const Input<4> keys = arguments.rows<4>("prompt_key", prompt_key, {owners, H, prompts, D});
  const Input<4> values = arguments.rows<4>("prompt_value", prompt_value, {owners, H, prompts, D});
  if (owners == 1) {
    op.S = prompts;
    op.static_key = keys, op.static_value = values;
  } else {
    op.M = prompts, op.instance_key = keys, op.instance_value = values;
  }
  op.lengths = arguments.lengths(lengths, B);
  op.bias = arguments.bias("attn_bias", attn_bias, {B, H, Lq, Lk});
  return op;
}

std::tuple<Tensor, Tensor> prompt_attention(PROMPT_ATTENTION_PARAMETERS) {
  Arguments arguments("prompt_attention");
  const MopeAttention op = prompt_attention_problem(arguments, PROMPT_ATTENTION_ARGUMENTS);
  Tensor out = empty_heads_last(query, op.B, op.H, op.Lq, op.D), lse = empty(op.B, op.H, op.Lq);
  kernels().mope_attention(op, {{}, any_rows<4>(out), lse.mutable_data_ptr<float>()});
  return {out, lse};
}

// In the order of GRADIENTS in prompt_attention_details/spec.py.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prompt_attention_backward(
    Tensor grad_out, Tensor out, Tensor lse, PROMPT_ATTENTION_PARAMETERS, int64_t needs) {
  Arguments arguments("prompt_attention_backward");
  const MopeAttention op = prompt_attention_problem(arguments, PROMPT_ATTENTION_ARGUMENTS);
  MopeAttentionBackward back{};
  back.grad_out = arguments.any_rows<4>("grad_out", grad_out, {op.B, op.H, op.Lq, op.D});
  back.out = arguments.any_rows<4>("out", out, {op.B, op.H, op.Lq, op.D});
  back.lse = arguments.dense<float>("lse", lse, {op.B, op.H, op.Lq});
  const auto tokens = [&](int bit, AnyOutput<4>& to, const Tensor& like, int64_t length) {
    if (!(needs >> bit & 1)) return empty_like(grad_out, 0);
    Tensor grad = empty_heads_last(like, op.B, op.H, length, op.D);
    to = any_rows<4>(grad);
    return grad;
  };
  FloatResults results;
  const auto prompts = [&](int bit, const Tensor& like, float*& of_all, float*& of_each) {
    if (!(needs >> bit & 1)) return empty_like(grad_out, 0);
    const bool shared = bool(op.static_key);
    return results.like(like, shared ? of_all : of_each, shared ? 1 : op.B, op.H, op.prompts(), op.D);
  };
  Tensor query_grad = tokens(0, back.query, query, op.Lq);
  Tensor key_grad = tokens(1, back.key, key, op.Lk), value_grad = tokens(2, back.value, value, op.Lk);
  Tensor prompt_key_grad = prompts(3, prompt_key, back.static_key, back.instance_key);
  Tensor prompt_value_grad = prompts(4, prompt_value, back.static_value, back.instance_value);
  kernels().mope_attention_backward(op, back);
  results.finish();
  return {query_grad, key_grad, value_grad, prompt_key_grad, prompt_value_grad};
}

// The arguments of both forward and backward.
#define WINDOW_ATTENTION_PARAMETERS                                                                                        \
  Tensor qkv, Tensor position_bias, int64_t num_prompts, int64_t num_heads, int64_t resolution, int64_t window_size,       \
    int64_t shift, bool owner_is_instance
#define WINDOW_ATTENTION_ARGUMENTS \
  qkv, position_bias, num_prompts, num_heads, resolution, window_size, shift, owner_is_instance

WindowAttention window_attention_problem(Arguments& arguments, WINDOW_ATTENTION_PARAMETERS) {
  STD_TORCH_CHECK(
      qkv.dim() == 3 && num_heads > 0 && qkv.size(2) % (3 * num_heads) == 0,
      "window_prompt_attention: qkv must be (B, P + R*R, 3C) with C a multiple of num_heads = ", num_heads, ", got ",
      to_string(qkv.sizes()));
  STD_TORCH_CHECK(
      window_size > 0 && resolution % window_size == 0 && 0 <= shift && shift < window_size && num_prompts >= 0,
      "window_prompt_attention: window_size must divide resolution and exceed shift, got ", window_size, ", ", resolution,
      " and ", shift);
  const int64_t B = qkv.size(0), width = qkv.size(2), tokens = window_size * window_size;
  WindowAttention op{};
  op.B = B, op.H = num_heads, op.D = width / (3 * num_heads), op.P = num_prompts, op.R = resolution, op.W = window_size;
  op.shift = shift, op.owner_is_instance = owner_is_instance, op.scale = 1.0f / std::sqrt(static_cast<float>(op.D));
  op.qkv = arguments.any_rows<3>("qkv", qkv, {B, num_prompts + resolution * resolution, width});
  op.bias = arguments.dense<float>("position_bias", position_bias, {num_heads, tokens, tokens});
  return op;
}

Tensor window_attention(WINDOW_ATTENTION_PARAMETERS) {
  Arguments arguments("window_prompt_attention");
  const WindowAttention op = window_attention_problem(arguments, WINDOW_ATTENTION_ARGUMENTS);
  Tensor out = empty_like(qkv, op.B, qkv.size(1), op.H * op.D);
  kernels().window_attention(op, any_rows<3>(out));
  return out;
}

std::tuple<Tensor, Tensor> window_attention_backward(Tensor grad_out, WINDOW_ATTENTION_PARAMETERS, int64_t needs) {
  Arguments arguments("window_prompt_attention_backward");
  const WindowAttention op = window_attention_problem(arguments, WINDOW_ATTENTION_ARGUMENTS);
  WindowAttentionBackward back{};
  back.grad_out = arguments.any_rows<3>("grad_out", grad_out, {op.B, qkv.size(1), op.H * op.D});
  FloatResults results;
  Tensor grad_qkv = needs & 1 ? empty_like(qkv, op.B, qkv.size(1), qkv.size(2)) : empty_like(qkv, 0);
  Tensor grad_bias = needs & 2 ? results.like(position_bias, back.bias, op.H, op.W * op.W, op.W * op.W)
                               : empty_like(position_bias, 0);
  if (needs & 1) back.qkv = any_rows<3>(grad_qkv);
  kernels().window_attention_backward(op, back);
  results.finish();
  return {grad_qkv, grad_bias};
}

#define EXPERT_ADAPTER_PARAMETERS                                                                                              \
  Tensor x, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, Optional router_weight, Optional router_bias, \
    [[maybe_unused]] Optional seed, double temperature, bool is_gelu, double dropout_p
#define EXPERT_ADAPTER_ARGUMENTS \
  x, down_weight, down_bias, up_weight, up_bias, router_weight, router_bias, seed, temperature, is_gelu, dropout_p

ExpertAdapter expert_adapter_problem(Arguments& arguments, EXPERT_ADAPTER_PARAMETERS) {
  STD_TORCH_CHECK(
      x.dim() == 2 && up_weight.dim() == 3, "expert_adapter: x must be (T, d) and up_weight (E, d, r), got ", to_string(x.sizes()),
      " and ", to_string(up_weight.sizes()));
  STD_TORCH_CHECK(dropout_p == 0.0, "expert_adapter: the CPU kernel has no dropout, got dropout_p = ", dropout_p);
  arguments.both_or_neither("router_weight", router_weight, "router_bias", router_bias);
  const int64_t T = x.size(0), d = x.size(1), E = up_weight.size(0), r = up_weight.size(2);
  STD_TORCH_CHECK(E == 1 || router_weight, "expert_adapter: ", E, " experts need router_weight and router_bias");
  ExpertAdapter op{T, d, r, E};
  op.x = arguments.any_rows<2>("x", x, {T, d});
  op.down_weight = arguments.dense<float>("down_weight", down_weight, {r, d});
  op.down_bias = arguments.dense<float>("down_bias", down_bias, {r});
  op.up_weight = arguments.dense<float>("up_weight", up_weight, {E, d, r});
  op.up_bias = arguments.dense<float>("up_bias", up_bias, {E, d});
  if (router_weight) {
    op.router_weight = arguments.dense<float>("router_weight", *router_weight, {E, d});
    op.router_bias = arguments.dense<float>("router_bias", *router_bias, {E});
  }
  op.temperature = static_cast<float>(temperature), op.is_gelu = is_gelu;
  return op;
}

std::tuple<Tensor, Tensor> expert_adapter(EXPERT_ADAPTER_PARAMETERS, bool return_weights) {
  Arguments arguments("expert_adapter");
  const ExpertAdapter op = expert_adapter_problem(arguments, EXPERT_ADAPTER_ARGUMENTS);
  Tensor out = empty_like(x, op.T, op.d), weights = return_weights ? empty(op.T, op.E) : empty(0);
  kernels().expert_adapter(op, any_rows<2>(out), return_weights ? weights.mutable_data_ptr<float>() : nullptr);
  return {out, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_adapter_backward(
    Tensor grad_out, Optional grad_weights, EXPERT_ADAPTER_PARAMETERS, int64_t needs) {
  Arguments arguments("expert_adapter_backward");
  const ExpertAdapter op = expert_adapter_problem(arguments, EXPERT_ADAPTER_ARGUMENTS);
  ExpertAdapterBackward back{};
  back.grad_out = arguments.any_rows<2>("grad_out", grad_out, {op.T, op.d});
  if (grad_weights) back.grad_weights = arguments.dense<float>("grad_weights", *grad_weights, {op.T, op.E});
  Tensor grad_x = needs & 1 ? empty_like(x, op.T, op.d) : empty_like(grad_out, 0);
  if (needs & 1) back.x = any_rows<2>(grad_x);
  int bit = 1;
  FloatResults results;
  const auto gradient = [&](float*& data, const Optional& like, auto... sizes) {
    return needs >> bit++ & 1 ? results.like(like.value(), data, sizes...) : empty_like(grad_out, 0);
  };
  // In the order of GRADIENTS in expert_adapter_details/spec.py.
  Tensor grad_down_weight = gradient(back.down_weight, down_weight, op.r, op.d);
  Tensor grad_down_bias = gradient(back.down_bias, down_bias, op.r);
  Tensor grad_up_weight = gradient(back.up_weight, up_weight, op.E, op.d, op.r);
  Tensor grad_up_bias = gradient(back.up_bias, up_bias, op.E, op.d);
  Tensor grad_router_weight = gradient(back.router_weight, router_weight, op.E, op.d);
  Tensor grad_router_bias = gradient(back.router_bias, router_bias, op.E);
  kernels().expert_adapter_backward(op, back);
  results.finish();
  return {grad_x, grad_down_weight, grad_down_bias, grad_up_weight, grad_up_bias, grad_router_weight, grad_router_bias};
}

// The dtype of output rows, checked.
int32_t row_dtype(const char* op, ScalarType dtype) {
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": the dtype of rows must be float32 or bfloat16, got ",
      torch::headeronly::toString(dtype));
  return dtype == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
}
int32_t promoted_dtype(const Tensor& x, const Optional& update) {
  return dtype_of(update && !is_bfloat16(*update) ? *update : x);
}

// Views of tensors as rows, with all axes before the last one merged.
struct FlatRows {
  explicit FlatRows(const Tensor& x) : sizes(x.sizes().begin(), x.sizes().end()), C(sizes.empty() ? 0 : sizes.back()) {
    STD_TORCH_CHECK(!sizes.empty(), "add_norm: x must have a last axis C, got a scalar");
    for (size_t i = 0; i + 1 < sizes.size(); ++i) R *= sizes[i];
  }
  AnyInput<2> input(Arguments& arguments, const char* name, const Optional& tensor) {
    if (!tensor) return {};
    STD_TORCH_CHECK(
        std::ranges::equal(tensor->sizes(), sizes), "add_norm: ", name, " must have shape ", to_string(sizes), ", got ",
        to_string(tensor->sizes()));
    return arguments.any_rows<2>(name, kept.emplace_back(torch::stable::reshape(*tensor, {R, C})), {R, C});
  }
  Tensor output(int32_t dtype, AnyOutput<2>& to) {
    Tensor rows = allocate_dense(dtype, R, C);
    to = any_rows<2>(rows);
    return sizes.size() == 2 ? rows : torch::stable::view(rows, sizes);
  }

  std::vector<int64_t> sizes;
  int64_t R = 1, C;
  std::deque<Tensor> kept;
};

std::tuple<Tensor, Tensor> add_norm(
    Tensor x, Optional update, Optional weight, Optional bias, double eps, ScalarType norm_dtype) {
  Arguments arguments("add_norm");
  FlatRows rows(x);
  AddNorm op{rows.R, rows.C, rows.input(arguments, "x", x), rows.input(arguments, "update", update)};
  op.weight = arguments.dense_or_nothing("weight", weight, {op.C});
  op.bias = arguments.dense_or_nothing("bias", bias, {op.C});
  op.eps = static_cast<float>(eps);
  AnyOutput<2> total_rows, normed_rows;
  Tensor total = update ? rows.output(promoted_dtype(x, update), total_rows) : empty_like(x, 0);
  Tensor normed = rows.output(row_dtype("add_norm", norm_dtype), normed_rows);
  kernels().add_norm(op, total_rows, normed_rows);
  return {total, normed};
}

// In the order of GRADIENTS in add_norm_details/spec.py.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(
    Optional grad_total, Optional grad_normed, Tensor total, Optional weight, double eps, ScalarType x_dtype,
    ScalarType update_dtype, int64_t needs) {
  Arguments arguments("add_norm_backward");
  FlatRows rows(total);
  AddNorm op{rows.R, rows.C, rows.input(arguments, "total", total), {}};
  op.weight = arguments.dense_or_nothing("weight", weight, {op.C});
  op.eps = static_cast<float>(eps);
  AddNormBackward back{};
  back.grad_total = rows.input(arguments, "grad_total", grad_total);
  back.grad_normed = rows.input(arguments, "grad_normed", grad_normed);
  Tensor grad_x = needs & 1 ? rows.output(row_dtype("add_norm_backward", x_dtype), back.x) : empty(0);
  Tensor grad_update = needs & 2 ? rows.output(row_dtype("add_norm_backward", update_dtype), back.update) : empty(0);
  Tensor grad_weight = empty(needs & 4 ? op.C : 0), grad_bias = empty(needs & 8 ? op.C : 0);
  if (needs & 4) back.weight = grad_weight.mutable_data_ptr<float>();
  if (needs & 8) back.bias = grad_bias.mutable_data_ptr<float>();
  kernels().add_norm_backward(op, back);
  return {grad_x, grad_update, grad_weight, grad_bias};
}

// Sets the parameters of LayerNorm, experts and router, in forward and backward of `prompted_norm`.
void set_parameters(
    Arguments& arguments, PromptedNorm& op, const Optional& weight, const Optional& experts, const Optional& self_weight,
    const Optional& self_bias, const Optional& self_keys, double temperature, bool renormalize, double eps) {
  op.weight = arguments.dense_or_nothing("weight", weight, {op.C});
  if (experts) {
    STD_TORCH_CHECK(experts->dim() == 3, "prompted_norm: experts must be (K, P, C), got ", to_string(experts->sizes()));
    op.K = experts->size(0), op.P = experts->size(1);
    op.experts = arguments.dense<float>("experts", *experts, {op.K, op.P, op.C});
  }
  arguments.both_or_neither("self_weight", self_weight, "self_keys", self_keys);
  if (self_weight) {
    op.query = self_weight->dim() == 2 ? self_weight->size(0) : 0;
    op.self_weight = arguments.dense<float>("self_weight", *self_weight, {op.query, op.C});
    op.self_bias = arguments.dense_or_nothing("self_bias", self_bias, {op.query});
    op.self_keys = arguments.dense<float>("self_keys", *self_keys, {op.query, op.K});
  }
  op.temperature = static_cast<float>(temperature), op.renormalize = renormalize, op.eps = static_cast<float>(eps);
}

void check_indices(const View<const int64_t, 2>& indices, const PromptedNorm& op) {
  for (int64_t b = 0; b < op.B; ++b)
    for (int64_t j = 0; j < op.k; ++j)
      STD_TORCH_CHECK(
          0 <= indices.row(b)[j] && indices.row(b)[j] < op.K, "prompted_norm: indices must lie in 0..", op.K - 1, ", got ",
          indices.row(b)[j]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prompted_norm(
    Tensor x, Optional update, Optional weight, Optional bias, Optional static_prompts, Optional experts, Optional mapped,
    Optional cross_logits, Optional self_weight, Optional self_bias, Optional self_keys, Optional routing_weights,
    Optional routing_indices, Optional noise, int64_t num_replaced, int64_t top_k, double temperature, bool renormalize,
    double eps, ScalarType norm_dtype, bool keep_pooled) {
  Arguments arguments("prompted_norm");
  STD_TORCH_CHECK(
      x.dim() == 3 && 0 <= num_replaced && num_replaced <= x.size(1), "prompted_norm: x must be (B, N, C), and num_replaced at most N, got ",
      to_string(x.sizes()), " and ", num_replaced);
  PromptedNorm op{};
  op.B = x.size(0), op.N = x.size(1), op.C = x.size(2), op.replaced = num_replaced;
  set_parameters(arguments, op, weight, experts, self_weight, self_bias, self_keys, temperature, renormalize, eps);
  const int64_t B = op.B, N = op.N, C = op.C, K = op.K;
  op.S = static_prompts && static_prompts->dim() == 2 ? static_prompts->size(0) : 0;
  op.M = mapped && mapped->dim() == 3 ? mapped->size(1) : 0;
  op.noise = arguments.rows<2>("noise", noise, {B, K});

  PromptedNormForward io{};
  io.x = arguments.any_rows<3>("x", x, {B, N, C});
  io.update = arguments.any_rows<3>("update", update, {B, N, C});
  io.bias = arguments.dense_or_nothing("bias", bias, {C});
  io.static_prompts = arguments.rows<2>("static", static_prompts, {op.S, C});
  io.mapped = arguments.any_rows<3>("mapped", mapped, {B, op.M, C});
  io.cross_logits = arguments.rows<2>("cross_logits", cross_logits, {B, K});
  arguments.both_or_neither("routing_weights", routing_weights, "routing_indices", routing_indices);
  if (routing_weights) {
    op.k = routing_weights->dim() == 2 ? routing_weights->size(1) : 0;
    io.routing_weights = arguments.rows<2>("routing_weights", *routing_weights, {B, op.k});
    io.routing_indices = arguments.integers<2>("routing_indices", *routing_indices, {B, op.k});
    check_indices(io.routing_indices, op);
  }
  const bool routed = experts && !routing_weights;
  STD_TORCH_CHECK(!routed || cross_logits || self_weight, "prompted_norm: experts need cross_logits, self_weight or routing_weights");
  STD_TORCH_CHECK(
      !routed || (0 <= top_k && top_k <= K), "prompted_norm: top_k must lie in 0..", K, ", the number of experts, got ", top_k);
  if (routed) op.dense = top_k == 0, op.k = op.dense ? K : top_k;

  const int64_t rows = op.prompts() + N - num_replaced;
  Tensor total = allocate_dense(promoted_dtype(x, update), B, rows, C);
  Tensor normed = allocate_dense(row_dtype("prompted_norm", norm_dtype), B, rows, C);
  Tensor probs = empty(B, routed ? K : 0), weights = empty(B, routed ? top_k : 0), indices = empty<int64_t>(B, routed ? op.k : 0);
  Tensor pooled = empty(keep_pooled ? B : 0, C);
  io.total = any_rows<3>(total), io.normed = any_rows<3>(normed);
  io.probs = probs.mutable_data_ptr<float>(), io.weights = weights.mutable_data_ptr<float>();
  io.indices = indices.mutable_data_ptr<int64_t>();
  if (keep_pooled) io.pooled = pooled.mutable_data_ptr<float>();
  kernels().prompted_norm(op, io);
  return {total, normed, probs, weights, indices, pooled};
}

using PromptedNormGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

PromptedNormGradients prompted_norm_backward(
    Optional grad_total, Optional grad_normed, Optional grad_probs, Optional grad_weights, Tensor total, Tensor probs,
    Tensor weights, Tensor indices, Tensor pooled, Optional weight, Optional experts, Optional self_weight, Optional self_bias,
    Optional self_keys, int64_t num_rows, int64_t num_replaced, int64_t num_static, int64_t num_mapped, double temperature,
    bool renormalize, double eps, ScalarType x_dtype, ScalarType update_dtype, int64_t needs) {
  Arguments arguments("prompted_norm_backward");
  STD_TORCH_CHECK(
      total.dim() == 3 && probs.dim() == 2 && weights.dim() == 2 && indices.dim() == 2,
      "prompted_norm_backward: total must be (B, N, C), probs (B, K), weights and indices (B, k), got ", to_string(total.sizes()),
      ", ", to_string(probs.sizes()), ", ", to_string(weights.sizes()), " and ", to_string(indices.sizes()));
  PromptedNorm op{};
  op.B = total.size(0), op.N = num_rows, op.C = total.size(2), op.replaced = num_replaced;
  op.S = num_static, op.M = num_mapped;
  set_parameters(arguments, op, weight, experts, self_weight, self_bias, self_keys, temperature, renormalize, eps);
  const int64_t B = op.B, C = op.C, K = op.K, rows = op.prompts() + num_rows - num_replaced;
  // Without weights, the routing is dense: the weights are the probabilities.
  op.dense = weights.size(1) == 0, op.k = indices.size(1);

  PromptedNormBackward back{};
  back.total = arguments.any_rows<3>("total", total, {B, rows, C});
  back.grad_total = arguments.any_rows<3>("grad_total", grad_total, {B, rows, C});
  back.grad_normed = arguments.any_rows<3>("grad_normed", grad_normed, {B, rows, C});
  const bool routed = probs.size(1) > 0;
  if (routed) back.probs = arguments.dense<float>("probs", probs, {B, K});
  back.weights = arguments.dense<float>("weights", weights, {B, op.dense ? 0 : op.k});
  back.indices = arguments.dense<int64_t>("indices", indices, {B, op.k});
  check_indices({back.indices, {op.k}}, op);
  back.grad_probs = arguments.rows<2>("grad_probs", grad_probs, {B, probs.size(1)});
  back.grad_weights = arguments.rows<2>("grad_weights", grad_weights, {B, weights.size(1)});

  // Bits in the order of GRADIENTS in prompted_norm_details/spec.py.
  constexpr int64_t kRows = 0b11, kCross = 1 << 7, kRouter = 0b111 << 8;
  back.needs_router = routed && (needs & kCross || (self_keys && needs & (kRows | kRouter)));
  if (needs & kRouter) back.pooled = arguments.dense<float>("pooled", pooled, {B, C});
  Tensor prompts = empty(0);
  if (back.needs_router || needs & ~kRows) {
    prompts = empty(B, op.prompts(), C);
    back.prompts = prompts.mutable_data_ptr<float>();
  }

  int bit = 0;
  const auto of_rows = [&](AnyOutput<3>& to, ScalarType dtype) {
    if (!(needs >> bit++ & 1)) return empty(0);
    Tensor grad = allocate_dense(row_dtype("prompted_norm_backward", dtype), B, num_rows, C);
    to = any_rows<3>(grad);
    return grad;
  };
  const auto of = [&](float*& to, auto... sizes) {
    if (!(needs >> bit++ & 1)) return empty(0);
    Tensor grad = empty(sizes...);
    to = grad.template mutable_data_ptr<float>();
    return grad;
  };
  FloatResults results;
  const auto like = [&](const Optional& given, float*& to, auto... sizes) {
    return needs >> bit++ & 1 ? results.like(*given, to, sizes...) : empty(0);
  };
  // Braced initialisers are evaluated from left to right.
  PromptedNormGradients gradients{
      of_rows(back.x, x_dtype),
      of_rows(back.update, update_dtype),
      of(back.weight, C),
      of(back.bias, C),
      of(back.static_prompts, op.S, C),
      like(experts, back.experts, K, op.P, C),
      needs >> bit++ & 1 ? torch::stable::narrow(prompts, 1, op.S + op.P, op.M) : empty(0),
      of(back.cross_logits, B, K),
      of(back.self_weight, op.query, C),
      of(back.self_bias, op.query),
      of(back.self_keys, op.query, K),
      like(weights, back.routing_weights, B, op.k),
  };
  Tensor spare = empty(0);
  if (back.needs_router && !back.routing_weights) {
    spare = empty(B, op.k);
    back.routing_weights = spare.mutable_data_ptr<float>();
  }
  kernels().prompted_norm_backward(op, back);
  results.finish();
  return gradients;
}

}  // namespace
}  // namespace mope

STABLE_TORCH_LIBRARY_IMPL(mope_cpu, CPU, m) {
  m.impl("mix_prompts", TORCH_BOX(&mope::mix_prompts));
  m.impl("mix_prompts_backward", TORCH_BOX(&mope::mix_prompts_backward));
  m.impl("route", TORCH_BOX(&mope::route));
  m.impl("route_backward", TORCH_BOX(&mope::route_backward));
  m.impl("importance_loss", TORCH_BOX(&mope::importance_loss));
  m.impl("importance_loss_backward", TORCH_BOX(&mope::importance_loss_backward));
  m.impl("prompt_attention", TORCH_BOX(&mope::prompt_attention));
  m.impl("prompt_attention_backward", TORCH_BOX(&mope::prompt_attention_backward));
  m.impl("mope_attention", TORCH_BOX(&mope::mope_attention));
  m.impl("mope_attention_backward", TORCH_BOX(&mope::mope_attention_backward));
  m.impl("expert_adapter", TORCH_BOX(&mope::expert_adapter));
  m.impl("expert_adapter_backward", TORCH_BOX(&mope::expert_adapter_backward));
  m.impl("add_norm", TORCH_BOX(&mope::add_norm));
  m.impl("add_norm_backward", TORCH_BOX(&mope::add_norm_backward));
  m.impl("prompted_norm", TORCH_BOX(&mope::prompted_norm));
  m.impl("prompted_norm_backward", TORCH_BOX(&mope::prompted_norm_backward));
  m.impl("window_prompt_attention", TORCH_BOX(&mope::window_attention));
  m.impl("window_prompt_attention_backward", TORCH_BOX(&mope::window_attention_backward));
}

// Returns the name of the instruction set in use. Called through ctypes for reports.
#if defined(_WIN32)
#define MOPE_EXPORT __declspec(dllexport)
#else
#define MOPE_EXPORT __attribute__((visibility("default")))
#endif
extern "C" MOPE_EXPORT const char* mope_cpu_target() { return mope::kernels().target; }
