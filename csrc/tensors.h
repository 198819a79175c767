// Conversion of tensors to views, with checks of the ops' arguments. Error messages contain the shapes.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "problem.h"

namespace mope {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class Range>
std::string to_string(const Range& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

inline bool is_bfloat16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

// The arguments of one call of an op. Owns the copies that were needed for contiguous rows or for conversion to float.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}

  // A view of a float32 or bfloat16 tensor of these sizes, or an empty view if it is missing.
  template <size_t kDims>
  AnyInput<kDims> any_rows(const char* name, const Optional& given, const int64_t (&sizes)[kDims]) {
    AnyInput<kDims> result;
    if (!given) return result;
    result.is_bfloat16 = is_bfloat16(*given);
    const auto copy = [&](const auto& view) {
      result.data = view.data;
      std::copy(std::begin(view.stride), std::end(view.stride), result.stride);
    };
    if (result.is_bfloat16)
      copy(view<const BFloat16>(name, given, sizes, ScalarType::BFloat16));
    else
      copy(view<const float>(name, given, sizes, ScalarType::Float));
    return result;
  }
  // The same as floats. Copies a bfloat16 tensor, so it is meant for small tensors.
  template <size_t kDims>
  Input<kDims> rows(const char* name, const Optional& tensor, const int64_t (&sizes)[kDims]) {
    return view<const float>(name, floats(tensor), sizes, ScalarType::Float);
  }
  template <size_t kDims>
  View<const int64_t, kDims> integers(const char* name, const Optional& tensor, const int64_t (&sizes)[kDims]) {
    return view<const int64_t>(name, tensor, sizes, ScalarType::Long);
  }

  // A tensor of these sizes, the first of which is the number of tasks. Without tasks, the tensor lacks that axis.
  Input<4> rows_of_tasks(const char* name, const Optional& tensor, bool tasks, const int64_t (&sizes)[4]) {
    if (tasks) return rows<4>(name, tensor, sizes);
    const Input<3> shared = rows<3>(name, tensor, {sizes[1], sizes[2], sizes[3]});
    return {shared.data, {0, shared.stride[0], shared.stride[1]}};
  }

  // The same, contiguous in memory.
  template <class T, size_t kDims>
  const T* dense(const char* name, const Tensor& given, const int64_t (&sizes)[kDims]) {
    const Tensor tensor = std::is_same_v<T, float> ? *floats(given) : given;
    check(name, tensor, sizes, std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Long);
    return keep(torch::stable::contiguous(tensor)).template const_data_ptr<T>();
  }

  template <size_t kDims>
  const float* dense_or_nothing(const char* name, const Optional& given, const int64_t (&sizes)[kDims]) {
    return given ? dense<float>(name, *given, sizes) : nullptr;
  }

  Lengths lengths(const Optional& tensor, int64_t batch) {
    if (!tensor) return {};
    const bool is_int64 = tensor->scalar_type() == ScalarType::Long;
    const int64_t sizes[] = {batch};
    check("lengths", *tensor, sizes, is_int64 ? ScalarType::Long : ScalarType::Int);
    return {tensor->const_data_ptr(), tensor->stride(0), is_int64};
  }

  // A bias that must be broadcastable to these sizes, with any strides.
  AttentionBias bias(const char* name, const Optional& given, const int64_t (&sizes)[4]) {
    if (!given) return {};
    const Optional tensor = floats(given);
    const int64_t missing = 4 - tensor->dim();
    bool fits = missing >= 0;
    for (int64_t i = 0; fits && i < tensor->dim(); ++i) fits = tensor->size(i) == 1 || tensor->size(i) == sizes[missing + i];
    STD_TORCH_CHECK(
        fits, op_, ": ", name, " must be broadcastable to ", to_string(sizes), ", got ", to_string(tensor->sizes()));
    STD_TORCH_CHECK(
        tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float, op_, ": ", name,
        " must be float32 or bfloat16 on the CPU, got ",
        torch::headeronly::toString(tensor->scalar_type()));
    AttentionBias result{tensor->const_data_ptr<float>()};
    for (int64_t i = 0; i < tensor->dim(); ++i) result.stride[missing + i] = tensor->size(i) == 1 ? 0 : tensor->stride(i);
    return result;
  }

  void both_or_neither(const char* first, const Optional& a, const char* second, const Optional& b) const {
    STD_TORCH_CHECK(a.has_value() == b.has_value(), op_, ": ", first, " and ", second, " go together: give both or neither");
  }

 private:
  // Converts bfloat16 to float32.
  Optional floats(const Optional& tensor) {
    if (!tensor || !is_bfloat16(*tensor)) return tensor;
    return keep(torch::stable::to(*tensor, ScalarType::Float));
  }

  template <class T, size_t kDims>
  View<T, kDims> view(const char* name, const Optional& given, const int64_t (&sizes)[kDims], ScalarType dtype) {
    View<T, kDims> result;
    if (!given) return result;
    check(name, *given, sizes, dtype);
    const bool contiguous_rows = sizes[kDims - 1] <= 1 || given->stride(kDims - 1) == 1;
    const Tensor& tensor = contiguous_rows ? *given : keep(torch::stable::contiguous(*given));
    // An empty tensor may have no memory, but it must not look missing.
    static constexpr std::remove_const_t<T> kNothing{};
    result.data = tensor.numel() ? static_cast<T*>(tensor.const_data_ptr()) : &kNothing;
    for (size_t i = 0; i + 1 < kDims; ++i) result.stride[i] = tensor.stride(i);
    return result;
  }

  template <size_t kDims>
  void check(const char* name, const Tensor& tensor, const int64_t (&sizes)[kDims], ScalarType dtype) const {
    STD_TORCH_CHECK(tensor.is_cpu(), op_, ": ", name, " must be on the CPU");
    const auto got = tensor.sizes();
    bool same = got.size() == kDims;
    for (size_t i = 0; same && i < kDims; ++i) same = got[i] == sizes[i];
    STD_TORCH_CHECK(same, op_, ": ", name, " must have shape ", to_string(sizes), ", got ", to_string(got));
    STD_TORCH_CHECK(
        tensor.scalar_type() == dtype, op_, ": ", name, " of shape ", to_string(got), " must be ",
        dtype == ScalarType::Float ? "float32 or bfloat16" : dtype == ScalarType::Long ? "int64" : "int32 or int64", ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
  }

  const Tensor& keep(Tensor tensor) { return kept_.emplace_back(std::move(tensor)); }

  const char* op_;
  std::deque<Tensor> kept_;
};

template <size_t kDims>
Tensor allocate(int32_t dtype, const int64_t (&sizes)[kDims], const int64_t (&strides)[kDims]) {
  AtenTensorHandle tensor;
  const AOTITorchError error =
      aoti_torch_empty_strided(kDims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &tensor);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "no memory for a tensor of shape ", to_string(sizes));
  return Tensor(tensor);
}
template <class... Size>
Tensor allocate_dense(int32_t dtype, Size... size) {
  const int64_t sizes[] = {size...};
  int64_t strides[sizeof...(size)], stride = 1;
  for (size_t i = sizeof...(size); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  return allocate(dtype, sizes, strides);
}

// An uninitialised contiguous tensor of these sizes.
template <class T = float, class... Size>
Tensor empty(Size... sizes) {
  return allocate_dense(std::is_same_v<T, float> ? aoti_torch_dtype_float32() : aoti_torch_dtype_int64(), sizes...);
}

// The same in the dtype of another tensor, float32 or bfloat16.
inline int32_t dtype_of(const Tensor& like) {
  return is_bfloat16(like) ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
}
template <class... Size>
Tensor empty_like(const Tensor& like, Size... sizes) {
  return allocate_dense(dtype_of(like), sizes...);
}

// (B,H,L,D) in the layout of (B,L,H,D), which the projections around the attention need.
inline Tensor empty_heads_last(const Tensor& like, int64_t batch, int64_t heads, int64_t length, int64_t width) {
  return allocate(dtype_of(like), {batch, heads, length, width}, {length * heads * width, width, heads * width, 1});
}

template <int kDims>
AnyOutput<kDims> any_rows(const Tensor& tensor) {
  AnyOutput<kDims> result{tensor.mutable_data_ptr(), {}, is_bfloat16(tensor)};
  for (int i = 0; i + 1 < kDims; ++i) result.stride[i] = tensor.stride(i);
  return result;
}

// Results that the kernels write as floats, regardless of the dtype of the returned tensors.
class FloatResults {
 public:
  // A tensor of these sizes in the dtype of `like`. The kernels must write its elements to `data`.
  template <class... Size>
  Tensor like(const Tensor& like, float*& data, Size... sizes) {
    Tensor result = empty_like(like, sizes...), floats = is_bfloat16(like) ? empty(sizes...) : result;
    data = floats.template mutable_data_ptr<float>();
    if (is_bfloat16(like)) rounded_.emplace_back(result, floats);
    return result;
  }
  // Rounds the results. Must be called after the kernels have written them.
  void finish() {
    for (auto& [result, floats] : rounded_) torch::stable::copy_(result, floats);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> rounded_;
};

}  // namespace mope
