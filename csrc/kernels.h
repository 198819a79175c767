// Everything that is compiled once per target. MOPE_TARGET is the name of the target, MOPE_LANES the number of floats in a vector,
// MOPE_VECS the number of vectors in a row of a matrix product's accumulators; MOPE_PAIRS is set if the target multiplies pairs of
// bfloat16s. There is intentionally no include guard. The order of the includes matters.

namespace mope::MOPE_TARGET {
namespace {

using torch::stable::parallel_for;

#include "simd.h"
#include "gemm.h"
#if MOPE_PAIRS
#include "pairs.h"
#endif
#include "router.h"
#include "attention.h"
#include "mix_prompts.h"
#include "mope_attention.h"
#include "window_attention.h"
#include "expert_adapter.h"
#include "norm.h"
#include "prompted_norm.h"

#define MOPE_NAME(target) #target
#define MOPE_NAME_OF(target) MOPE_NAME(target)
constexpr Kernels kKernels{
    MOPE_NAME_OF(MOPE_TARGET), mix_prompts,    mix_prompts_backward,    route,           route_backward, importance_loss,
    importance_loss_backward,  mope_attention, mope_attention_backward, window_attention, window_attention_backward,
    expert_adapter,            expert_adapter_backward, add_norm, add_norm_backward, prompted_norm, prompted_norm_backward};
#undef MOPE_NAME
#undef MOPE_NAME_OF

}  // namespace
}  // namespace mope::MOPE_TARGET

#undef MOPE_TARGET
#undef MOPE_LANES
#undef MOPE_VECS
#undef MOPE_PAIRS
