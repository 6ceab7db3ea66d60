// SPDX-License-Identifier: Apache-2.0
// Tensors of any strides, as kernels take them.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "cuda/launch.h"

namespace redrafter::cuda {

template <class T>
struct Strided {
  T* data;
  int64_t stride[3];
  __device__ T& at(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data[i * stride[0] + j * stride[1] + k * stride[2]];
  }
};

template <class T>
Strided<T> strided(const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
                   const char* name) {
  check_dtype(tensor, dtype, name);
  check_device(tensor, name);
  check_shape(tensor, shape, name);
  Strided<T> found = {static_cast<T*>(tensor.mutable_data_ptr()), {0, 0, 0}};
  for (int64_t i = 0; i < tensor.dim(); ++i) found.stride[i] = tensor.stride(i);
  return found;
}

}  // namespace redrafter::cuda
