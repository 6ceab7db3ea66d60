// SPDX-License-Identifier: Apache-2.0
// Argument checks of the operators: one sentence naming the argument and what was found.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

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
