// Makes autocast on the CPU compute in float32 what autocast on a GPU does, for the operations of our models and the released way.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace at::autocast {
namespace {

TORCH_LIBRARY_IMPL(aten, AutocastCPU, m) {
    KERNEL_CPU(layer_norm, fp32)
    KERNEL_CPU(native_layer_norm, fp32)
    KERNEL_CPU(pow, Tensor_Scalar, fp32)
    KERNEL_CPU(softmax, int, fp32_set_opt_dtype)
    KERNEL_CPU(sum, fp32_set_opt_dtype)
    KERNEL_CPU(sum, dim_IntList, fp32_set_opt_dtype)
}

}  // namespace
}  // namespace at::autocast
