// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// redrafter::tree_attention on CUDA: checks, the number of pieces, launches.
//
// Why a kernel of our own and not FlashAttention over the prefix plus a merge, or FlashInfer's packed
// masks: it needs no further package, takes any strides and any mixture of trees, chains and decode
// rows in one launch, reads nothing back, and runs on every architecture since sm_80. Which of them
// is fastest has not been measured.
#include "cuda/tree_attention_kernel.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "cuda/launch.h"

namespace redrafter::cuda {
namespace {

using torch::stable::Tensor;

constexpr int64_t kKeysPerPiece = 256;  // fewer keys are not worth a piece of their own

// 16-byte copies need features side by side and every token on a 16-byte boundary.
template <int kDims>
bool copies_fit(const void* data, const int64_t (&stride)[kDims]) {
  const auto fits = [](int64_t one) { return one % 8 == 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[kDims - 1] == 1 &&
         std::all_of(stride, stride + kDims - 1, fits);
}

template <class T, int kDim>
void launch_mma(const TreeAttentionArgs& args, dim3 grid, cudaStream_t stream) {
  constexpr int kBytes = Tiles<T, kDim>::kBytes;
  allow_shared_memory(&tree_attention_mma<T, kDim>, kBytes);
  REDRAFTER_LAUNCH((tree_attention_mma<T, kDim>), grid, dim3(kWarps * 32), kBytes, stream, args);
}

// False if there is no tensor-core kernel for this head size.
template <class T>
bool launch_mma(const TreeAttentionArgs& args, dim3 grid, cudaStream_t stream) {
  switch (args.head_dim) {
    case 64:
      launch_mma<T, 64>(args, grid, stream);
      return true;
    case 80:
      launch_mma<T, 80>(args, grid, stream);
      return true;
    case 96:
      launch_mma<T, 96>(args, grid, stream);
      return true;
    case 128:
      launch_mma<T, 128>(args, grid, stream);
      return true;
    case 256:
      launch_mma<T, 256>(args, grid, stream);
      return true;
    default:
      return false;
  }
}
template <>
bool launch_mma<float>(const TreeAttentionArgs&, dim3, cudaStream_t) {
  return false;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
void run(TreeAttentionArgs& args, const Tensor& query, int64_t max_rows) {
  const cudaStream_t stream = stream_of(query);
  const int64_t rows = max_rows * (args.query_heads / args.kv_heads);
  const bool tensor_cores = copies_fit(args.query, args.query_stride) &&
                            copies_fit(args.key_cache, args.key_stride) &&
                            copies_fit(args.value_cache, args.value_stride);
  const int64_t row_tiles = ceil_div(rows, tensor_cores ? kRows : kWarps);
  // As many pieces as fill the device twice over: how long contexts are is not known here.
  const int64_t room = args.table_columns * args.block_size;
  const int64_t space = args.window > 0 ? std::min(room, args.window + max_rows) : room;
  const int64_t wanted =
      ceil_div(2 * multiprocessors(query), args.requests * args.kv_heads * row_tiles);
  const int64_t pieces =
      std::clamp<int64_t>(std::min(wanted, space / kKeysPerPiece), 1, kMaxPieces);
  args.pieces = static_cast<int>(pieces);
  std::optional<Tensor> partial, partial_state;
  if (pieces > 1) {
    const int64_t cells = pieces * args.tokens * args.query_heads;
    partial = scratch(query, {cells * args.head_dim}, ScalarType::Float);
    partial_state = scratch(query, {cells * 2}, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
    args.partial_state = static_cast<float*>(partial_state->mutable_data_ptr());
  }
  const auto grid_of = [&](int64_t tiles) {
    STD_TORCH_CHECK(args.requests <= 65535, "redrafter::tree_attention: ", args.requests,
                    " requests are too many for one launch.");
    return dim3(static_cast<unsigned>(pieces * tiles), static_cast<unsigned>(args.kv_heads),
                static_cast<unsigned>(args.requests));
  };
  if (!(tensor_cores && launch_mma<T>(args, grid_of(ceil_div(rows, kRows)), stream))) {
    REDRAFTER_LAUNCH((tree_attention_plain<T>), grid_of(ceil_div(rows, kWarps)), dim3(kWarps * 32),
                     kWarps * args.head_dim * sizeof(float), stream, args);
  }
  if (pieces > 1) {
    const auto blocks = static_cast<unsigned>(ceil_div(max_rows * args.query_heads, kWarps));
    REDRAFTER_LAUNCH((tree_attention_merge<T>),
                     dim3(blocks, 1, static_cast<unsigned>(args.requests)), dim3(kWarps * 32), 0,
                     stream, args);
  }
}

void tree_attention_cuda(const Tensor& out, const Tensor& query, const Tensor& key_cache,
                         const Tensor& value_cache, const std::optional<Tensor>& key_map,
                         const std::optional<Tensor>& value_map, const Tensor& block_table,
                         const Tensor& request_index, const Tensor& row_start,
                         const Tensor& row_count, const Tensor& context_lens, const Tensor& masks,
                         double scale, double softcap, int64_t window,
                         const std::optional<Tensor>& sinks) {
  STD_TORCH_CHECK(!key_map.has_value() && !value_map.has_value(),
                  "key_map and value_map are for caches on the CPU; on CUDA pass None.");
  check_device(out, "out");
  check_device(query, "query");
  check_device(key_cache, "key_cache");
  check_device(value_cache, "value_cache");
  check_device(block_table, "block_table");
  check_device(masks, "masks");
  check_dims(query, 3, "query");
  check_dims(out, 3, "out");
  check_dims(key_cache, 4, "key_cache");
  check_dims(value_cache, 4, "value_cache");
  check_dims(block_table, 2, "block_table");
  check_dims(masks, 2, "masks");
  const ScalarType dtype = query.scalar_type();
  check_dtype(out, dtype, "out");
  check_dtype(key_cache, dtype, "key_cache");
  check_dtype(value_cache, dtype, "value_cache");
  check_dtype(block_table, ScalarType::Int, "block_table");
  check_dtype(masks, ScalarType::Long, "masks");

  TreeAttentionArgs args = {};
  args.tokens = query.size(0);
  args.query_heads = static_cast<int>(query.size(1));
  args.head_dim = static_cast<int>(query.size(2));
  args.blocks = key_cache.size(0);
  args.kv_heads = static_cast<int>(key_cache.size(1));
  args.block_size = static_cast<int>(key_cache.size(2));
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(out.size(i) == query.size(i), "out must have the shape of query.");
    args.out_stride[i] = out.stride(i);
    args.query_stride[i] = query.stride(i);
  }
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(value_cache.size(i) == key_cache.size(i) &&
                        key_cache.size(3) == args.head_dim,
                    "key_cache and value_cache must both be [blocks, kv_heads, block_size, ",
                    args.head_dim, "].");
    args.key_stride[i] = key_cache.stride(i);
    args.value_stride[i] = value_cache.stride(i);
  }
  STD_TORCH_CHECK(args.head_dim > 0 && args.head_dim % 16 == 0 && args.head_dim <= kMaxDim,
                  "head_dim is ", args.head_dim, "; it must be a multiple of 16 up to ", kMaxDim,
                  ".");
  STD_TORCH_CHECK(args.kv_heads > 0 && args.query_heads % args.kv_heads == 0, "query has ",
                  args.query_heads, " heads; it must be a multiple of the ", args.kv_heads,
                  " KV heads.");
  STD_TORCH_CHECK(args.block_size > 0, "block_size is 0.");
  STD_TORCH_CHECK(softcap >= 0, "softcap is ", softcap, "; it must be 0 (off) or positive.");
  STD_TORCH_CHECK(scale > 0, "scale is ", scale, "; it must be positive.");
  STD_TORCH_CHECK(window >= 0, "window is ", window, "; it must be 0 (off) or positive.");
  // Longer than any context: none.
  args.window = window < kLargestSize ? static_cast<int>(window) : 0;
  if (sinks.has_value()) {
    check_device(*sinks, "sinks");
    args.sinks = vector_data<float>(*sinks, ScalarType::Float, args.query_heads, "sinks");
  }
  STD_TORCH_CHECK(masks.size(0) == args.tokens, "masks has ", masks.size(0), " rows; query has ",
                  args.tokens, ".");
  STD_TORCH_CHECK((block_table.size(1) < 2 || block_table.stride(1) == 1) &&
                      (masks.size(1) < 2 || masks.stride(1) == 1),
                  "block_table and masks must be contiguous in their last dimension.");
  const int64_t requests = request_index.size(0);
  const auto ints = [&](const Tensor& t, const char* name) {
    check_device(t, name);
    return vector_data<int32_t>(t, ScalarType::Int, requests, name);
  };
  args.request_index = ints(request_index, "request_index");
  args.row_start = ints(row_start, "row_start");
  args.row_count = ints(row_count, "row_count");
  args.context_lens = ints(context_lens, "context_lens");
  args.out = out.mutable_data_ptr();
  args.query = query.const_data_ptr();
  args.key_cache = key_cache.const_data_ptr();
  args.value_cache = value_cache.const_data_ptr();
  args.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  args.block_table_stride = block_table.stride(0);
  args.table_rows = block_table.size(0);
  args.table_columns = block_table.size(1);
  args.masks = static_cast<const int64_t*>(masks.const_data_ptr());
  args.mask_stride = masks.stride(0);
  args.mask_words = static_cast<int>(masks.size(1));
  args.requests = static_cast<int>(requests);
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  // How many rows a request has is known on the device alone; this many at most.
  const int64_t max_rows = std::min<int64_t>(args.tokens, 64 * masks.size(1));
  if (requests == 0 || max_rows == 0) return;

  const DeviceGuard guard(query);
  switch (dtype) {
    case ScalarType::Float:
      return run<float>(args, query, max_rows);
    case ScalarType::BFloat16:
      return run<__nv_bfloat16>(args, query, max_rows);
    case ScalarType::Half:
      return run<__half>(args, query, max_rows);
    default:
      STD_TORCH_CHECK(false, "query has dtype ", torch::headeronly::toString(dtype),
                      "; it must be float32, bfloat16 or float16.");
  }
}

}  // namespace
}  // namespace redrafter::cuda

STABLE_TORCH_LIBRARY_IMPL(REDRAFTER_LIBRARY, REDRAFTER_CUDA_KEY, m) {
  m.impl("tree_attention", TORCH_BOX(&redrafter::cuda::tree_attention_cuda));
}
