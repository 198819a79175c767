// The ops of the namespace mope_cpu. Schemas and fakes are defined in mope_kernels/_ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using torch::stable::Tensor;

static Tensor mix_prompts(Tensor experts, Tensor weights, Tensor indices) {
  const int64_t B = indices.size(0), k = indices.size(1), P = experts.size(1), D = experts.size(2);
  Tensor out = torch::stable::new_empty(experts, {B, P, D});
  STD_TORCH_CHECK(experts.is_contiguous() && weights.is_contiguous() && indices.is_contiguous(), "contiguous please");
  auto *e = experts.const_data_ptr<float>(), *w = weights.const_data_ptr<float>();
  auto* x = indices.const_data_ptr<int64_t>();
  auto* o = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, B, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t b = lo; b < hi; ++b)
      for (int64_t i = 0; i < P * D; ++i) {
        float sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += w[b * k + j] * e[x[b * k + j] * P * D + i];
        o[b * P * D + i] = sum;
      }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(mope_cpu, CPU, m) { m.impl("mix_prompts", TORCH_BOX(&mix_prompts)); }
