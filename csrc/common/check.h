// SPDX-License-Identifier: Apache-2.0
// Argument checks of the operators: one sentence naming the argument and what was found.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

namespace redrafter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_dtype(const Tensor& tensor, ScalarType wanted, const char* name) {
  const ScalarType found = tensor.scalar_type();
  STD_TORCH_CHECK(found == wanted, name, " has dtype ", torch::headeronly::toString(found),
                  "; it must be ", torch::headeronly::toString(wanted), ".");
}

inline void check_dims(const Tensor& tensor, int64_t wanted, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == wanted, name, " has ", tensor.dim(), " dimensions; it must have ",
                  wanted, ".");
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape,
                        const char* name) {
  check_dims(tensor, static_cast<int64_t>(shape.size()), name);
  int64_t i = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(tensor.size(i) == size, name, " has ", tensor.size(i), " entries in dimension ",
                    i, "; it must have ", size, ".");
    ++i;
  }
}

// Sizes of tensors without elements have no bounds: what is multiplied must be checked first.
constexpr int64_t kLargestSize = INT32_MAX;

inline void check_size(int64_t size, const char* name) {
  STD_TORCH_CHECK(size >= 0 && size <= kLargestSize, name, " is ", size, "; at most ", kLargestSize,
                  " is possible.");
}

// The stride of a dimension in bytes; 0 where it is never used, as it may then be any number.
inline int64_t stride_bytes(const Tensor& tensor, int64_t dim) {
  if (tensor.size(dim) < 2 || tensor.numel() == 0) return 0;
  return tensor.stride(dim) * static_cast<int64_t>(tensor.element_size());
}

// Whether `words` words of 64 bits hold `bits`, at least 1.
inline bool words_hold(int64_t words, int64_t bits) { return (bits - 1) / 64 < words; }

// A contiguous tensor of that shape; its data.
template <class T>
T* contiguous_data(const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
                   const char* name) {
  check_dtype(tensor, dtype, name);
  check_shape(tensor, shape, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous.");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// One dimension of `length` elements, without gaps; returns its data.
template <class T>
const T* vector_data(const Tensor& tensor, ScalarType dtype, int64_t length, const char* name) {
  check_dtype(tensor, dtype, name);
  check_dims(tensor, 1, name);
  STD_TORCH_CHECK(tensor.size(0) == length, name, " has ", tensor.size(0),
                  " elements; it must have ", length, ".");
  STD_TORCH_CHECK(length < 2 || tensor.stride(0) == 1, name, " must be contiguous.");
  return static_cast<const T*>(tensor.const_data_ptr());
}

}  // namespace redrafter
