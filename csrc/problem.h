// Arguments passed from the ops to the kernels: sizes, options and plain views of the tensors.
//
// Sizes: B batch, H heads, L tokens (Lq queries, Lk keys), D head width, K experts, k selected experts,
// S static, M instance and P routed prompts, T tasks. A missing tensor, or an output that is not requested, has data == nullptr.
#pragma once

#include <cstdint>
#include <type_traits>

namespace mope {

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

// A tensor whose rows (the last dimension) are contiguous.
template <class T, int kDims>
struct View {
  T* data = nullptr;
  int64_t stride[kDims - 1] = {};

  template <class... Index>
  T* row(Index... index) const {
    static_assert(sizeof...(Index) == kDims - 1);
    int i = 0;
    int64_t offset = 0;
    ((offset += index * stride[i++]), ...);
    return data + offset;
  }
  explicit operator bool() const { return data != nullptr; }
};

template <int kDims>
using Input = View<const float, kDims>;
template <int kDims>
using Output = View<float, kDims>;

// The same with float or bfloat16 elements. Void is void or const void.
template <class Void, int kDims>
struct AnyView {
  Void* data = nullptr;
  int64_t stride[kDims - 1] = {};
  bool is_bfloat16 = false;

  template <class T>
  auto as() const {
    using Element = std::conditional_t<std::is_const_v<Void>, const T, T>;
    View<Element, kDims> view{static_cast<Element*>(data)};
    for (int i = 0; i + 1 < kDims; ++i) view.stride[i] = stride[i];
    return view;
  }
  // Calls f with a view of the actual element type.
  template <class F>
  void visit(const F& f) const {
    if (is_bfloat16)
      f(as<BFloat16>());
    else
      f(as<float>());
  }
  explicit operator bool() const { return data != nullptr; }
};

template <int kDims>
using AnyInput = AnyView<const void, kDims>;
template <int kDims>
using AnyOutput = AnyView<void, kDims>;

struct Lengths {
  const void* data = nullptr;
  int64_t stride = 0;
  bool is_int64 = false;

  // Number of tokens, counted from the first, that item b may attend to.
  int64_t visible(int64_t b, int64_t tokens) const {
    if (!data) return tokens;
    const int64_t length =
        is_int64 ? static_cast<const int64_t*>(data)[b * stride] : static_cast<const int32_t*>(data)[b * stride];
    return length < 0 ? 0 : length < tokens ? length : tokens;
  }
};

// Bias added to the scores of tokens, (B,H,Lq,Lk), with stride 0 along broadcast axes.
struct AttentionBias {
  const float* data = nullptr;
  int64_t stride[4] = {};
};

struct Route {
  int64_t B, K, k;
  Input<2> logits, noise;  // (B,K)
  bool dense, renormalize;
  float temperature;
};

struct RouteForward {
  float* probs;      // (B,K)
  float* weights;    // (B,k), empty if dense
  int64_t* indices;  // (B,k), empty if dense
};

struct RouteBackward {
  Input<2> grad_probs, grad_weights;  // (B,K), (B,k)
  const float* probs;                 // (B,K)
  const float* weights;               // (B,k), empty if dense
  const int64_t* indices;             // (B,k), empty if dense
  float* logits;                      // the gradient
};

struct ImportanceLoss {
  int64_t L, B, K;  // L blocks
  float threshold;
};

// Attention whose first keys are prompts, some of them routed. Without experts (K = P = 0) it is `prompt_attention`; only that op
// supports bias and is_causal.
struct MopeAttention : Route {
  int64_t H, Lq, Lk, D, S, M, P;
  AnyInput<4> query, key, value;         // (B,H,L,D)
  Input<4> bank_key, bank_value;         // (T*K,H,P,D)
  Input<4> gram;                         // (T,P,K,K)
  Input<2> key_offset, value_offset;     // (H,D)
  Input<4> static_key, static_value;     // (T,H,S,D)
  Input<4> instance_key, instance_value; // (B,H,M,D)
  Lengths lengths;
  const int64_t* task_ids;  // (B), or nullptr for one task, whose tensors all items share
  AttentionBias bias;
  bool is_causal;
  float eps, scale;

  int64_t prompts() const { return S + M + P; }
  int64_t task(int64_t b) const { return task_ids ? task_ids[b] : 0; }
};

struct MopeAttentionForward : RouteForward {
  AnyOutput<4> out;  // (B,H,Lq,D)
  float* lse;        // (B,H,Lq)
};

struct MopeAttentionBackward {
  AnyInput<4> grad_out, out;            // (B,H,Lq,D)
  Input<2> grad_probs, grad_weights;    // (B,K), (B,k)
  const float* lse;                     // (B,H,Lq)
  const float* probs;                   // (B,K)
  const float* weights;                 // (B,k), empty if dense
  const int64_t* indices;               // (B,k), empty if dense
  AnyOutput<4> query, key, value;       // the gradients, contiguous except for the order of heads and tokens
  float *logits, *bank_key, *bank_value, *gram, *key_offset, *value_offset;
  float *static_key, *static_value, *instance_key, *instance_value;
};

struct MixPrompts {
  int64_t B, K, k, width;  // width of an expert, P * D
  const float* experts;    // (K, width)
  Input<2> weights;        // (B,k)
  View<const int64_t, 2> indices;
};

struct WindowAttention {
  int64_t B, H, D, P, R, W, shift;  // R tokens per side of the image, W per side of a window
  bool owner_is_instance;
  float scale;
  AnyInput<3> qkv;    // (B, P + R*R, 3 * H * D)
  const float* bias;  // (H, W*W, W*W)

  int64_t windows() const { return (R / W) * (R / W); }
  // Number of rows of [prompts; tokens of a window].
  int64_t rows() const { return P + W * W; }
  int64_t chunks(int64_t size) const { return (windows() + size - 1) / size; }
};

struct WindowAttentionBackward {
  AnyInput<3> grad_out;  // (B, P + R*R, H * D)
  AnyOutput<3> qkv;      // the gradients
  float* bias;
};

// T rows of width d are projected down to width r, and up again by E experts. All tensors except x are contiguous.
struct ExpertAdapter {
  int64_t T, d, r, E;
  AnyInput<2> x;
  const float *down_weight, *down_bias;      // (r,d), (r)
  const float *up_weight, *up_bias;          // (E,d,r), (E,d)
  const float *router_weight, *router_bias;  // (E,d), (E), or nullptr for a single expert with weight 1
  float temperature;
  bool is_gelu;
};

struct ExpertAdapterBackward {
  AnyInput<2> grad_out;       // (T,d)
  const float* grad_weights;  // (T,E)
  AnyOutput<2> x;             // the gradients
  float *down_weight, *down_bias, *up_weight, *up_bias, *router_weight, *router_bias;
};

// R rows of C elements.
struct AddNorm {
  int64_t R, C;
  AnyInput<2> x, update;      // in backward, x is their sum and update is missing
  const float *weight, *bias; // (C)
  float eps;
};

struct AddNormBackward {
  AnyInput<2> grad_total, grad_normed;
  AnyOutput<2> x, update;  // the gradients
  float *weight, *bias;
};

// N input rows of C elements, the first `replaced` of which are replaced by S + P + M prompts. A given routing has k weights and is
// not dense. Otherwise the router, whose query has width `query`, computes weights and indices.
struct PromptedNorm : Route {
  int64_t N, C, S, P, M, replaced, query;
  const float* weight;                            // (C)
  const float* experts;                           // (K, P * C)
  const float *self_weight, *self_bias, *self_keys; // (query,C), (query), (query,K)
  float eps;

  int64_t prompts() const { return S + P + M; }
};

struct PromptedNormForward : RouteForward {
  AnyInput<3> x, update;                   // (B,N,C)
  const float* bias;                       // (C)
  Input<2> static_prompts;                 // (S,C)
  AnyInput<3> mapped;                      // (B,M,C)
  Input<2> cross_logits;                   // (B,K)
  Input<2> routing_weights;                // (B,k)
  View<const int64_t, 2> routing_indices;  // (B,k)
  AnyOutput<3> total, normed;              // (B, S+P+M + N-replaced, C)
  float* pooled;                           // (B,C)
};

struct PromptedNormBackward {
  AnyInput<3> grad_total, grad_normed, total;  // (B, S+P+M + N-replaced, C)
  Input<2> grad_probs, grad_weights;           // (B,K), (B,k)
  const float *probs, *weights, *pooled;       // (B,K), (B,k), (B,C)
  const int64_t* indices;                      // (B,k)
  bool needs_router;                           // whether any requested gradient depends on the router's
  AnyOutput<3> x, update;                      // the gradients
  float *weight, *bias, *static_prompts, *experts, *cross_logits, *self_weight, *self_bias, *self_keys;
  float* routing_weights;  // (B,k), also given if needs_router
  float* prompts;          // (B, S+P+M, C), given if needs_router or if any gradient except x and update is requested
};

// The kernels, compiled for one instruction set.
struct Kernels {
  const char* target;
  void (*mix_prompts)(const MixPrompts&, Output<2> out);
  void (*mix_prompts_backward)(const MixPrompts&, Input<2> grad_out, float* grad_experts, float* grad_weights);
  void (*route)(const Route&, const RouteForward&);
  void (*route_backward)(const Route&, const RouteBackward&);
  void (*importance_loss)(const ImportanceLoss&, Input<3> probs, float* loss, float* load);
  void (*importance_loss_backward)(const ImportanceLoss&, const float* grad_loss, const float* load, float* grad_load);
  void (*mope_attention)(const MopeAttention&, const MopeAttentionForward&);
  void (*mope_attention_backward)(const MopeAttention&, const MopeAttentionBackward&);
  void (*window_attention)(const WindowAttention&, AnyOutput<3> out);
  void (*window_attention_backward)(const WindowAttention&, const WindowAttentionBackward&);
  void (*expert_adapter)(const ExpertAdapter&, AnyOutput<2> out, float* weights);
  void (*expert_adapter_backward)(const ExpertAdapter&, const ExpertAdapterBackward&);
  void (*add_norm)(const AddNorm&, AnyOutput<2> total, AnyOutput<2> normed);
  void (*add_norm_backward)(const AddNorm&, const AddNormBackward&);
  void (*prompted_norm)(const PromptedNorm&, const PromptedNormForward&);
  void (*prompted_norm_backward)(const PromptedNorm&, const PromptedNormBackward&);
};

// Returns the kernels for the best instruction set of this processor.
const Kernels& kernels();

}  // namespace mope
