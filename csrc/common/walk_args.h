// SPDX-License-Identifier: Apache-2.0
// The arguments of redrafter::walk, checked once for every device.
#pragma once

#include <cstdint>

#include "common/check.h"

namespace redrafter {

// Rows of int64, `stride` elements apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
#ifdef __CUDACC__
  __host__ __device__
#endif
  T* row(int64_t i) const { return data + i * stride; }
};

struct WalkArgs {
  Rows<int64_t> path;
  int64_t* num_accepted;
  int64_t* last_node;
  int64_t* next_token;
  Rows<const int64_t> tokens, parents, target_tokens;
  const int64_t* num_nodes;
  int64_t batch, columns, path_columns;
};

inline Rows<int64_t> matrix_rows(const Tensor& tensor, int64_t rows, int64_t columns,
                                 const char* name) {
  check_dtype(tensor, ScalarType::Long, name);
  check_dims(tensor, 2, name);
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == columns, name, " is [",
                  tensor.size(0), ", ", tensor.size(1), "]; it must be [", rows, ", ", columns,
                  "].");
  STD_TORCH_CHECK(columns < 2 || tensor.stride(1) == 1, name, " must have contiguous rows.");
  return {static_cast<int64_t*>(tensor.mutable_data_ptr()), tensor.stride(0)};
}

inline Rows<const int64_t> input_rows(const Tensor& tensor, int64_t rows, int64_t columns,
                                      const char* name) {
  const Rows<int64_t> found = matrix_rows(tensor, rows, columns, name);
  return {found.data, found.stride};
}

inline WalkArgs walk_args(const Tensor& path, const Tensor& num_accepted, const Tensor& last_node,
                          const Tensor& next_token, const Tensor& tokens, const Tensor& parents,
                          const Tensor& num_nodes, const Tensor& target_tokens) {
  check_dims(path, 2, "path");
  check_dims(tokens, 2, "tokens");
  const int64_t batch = tokens.size(0), columns = tokens.size(1);
  STD_TORCH_CHECK(columns >= 1, "tokens has no columns; every tree has at least its root.");
  const auto vector = [batch](const Tensor& tensor, const char* name) {
    return const_cast<int64_t*>(vector_data<int64_t>(tensor, ScalarType::Long, batch, name));
  };
  WalkArgs args;
  args.batch = batch;
  args.columns = columns;
  args.path_columns = path.size(1);
  args.path = matrix_rows(path, batch, args.path_columns, "path");
  args.num_accepted = vector(num_accepted, "num_accepted");
  args.last_node = vector(last_node, "last_node");
  args.next_token = vector(next_token, "next_token");
  args.tokens = input_rows(tokens, batch, columns, "tokens");
  args.parents = input_rows(parents, batch, columns, "parents");
  args.target_tokens = input_rows(target_tokens, batch, columns, "target_tokens");
  args.num_nodes = vector(num_nodes, "num_nodes");
  return args;
}

}  // namespace redrafter
