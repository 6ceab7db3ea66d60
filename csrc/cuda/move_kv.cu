// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// redrafter::move_kv on CUDA: one launch for K and V of all layers.
#include "cuda/move_kv_kernel.cuh"

#include <algorithm>
#include <optional>

#include "cuda/launch.h"

namespace redrafter::cuda {
namespace {

// Enough of a row for whole sectors; less where moves are many.
constexpr int64_t kColumnBytes = 256;

void move_kv_cuda(const Tensor& caches, const std::optional<Tensor>& key_map,
                  const std::optional<Tensor>& value_map, const Tensor& src_slots,
                  const Tensor& dst_slots, int64_t block_size, int64_t head_dim,
                  int64_t element_size) {
  STD_TORCH_CHECK(!key_map.has_value() && !value_map.has_value(),
                  "key_map and value_map are for caches on the CPU; on CUDA pass None.");
  check_dtype(caches, ScalarType::Long, "caches");
  check_dims(caches, 2, "caches");
  check_dims(src_slots, 1, "src_slots");
  check_device(caches, "caches");
  check_device(src_slots, "src_slots");
  check_device(dst_slots, "dst_slots");
  STD_TORCH_CHECK(caches.size(1) == kCacheColumns && caches.is_contiguous(),
                  "caches must be a contiguous table of ", kCacheColumns, " columns.");
  STD_TORCH_CHECK(block_size > 0 && head_dim > 0, "block_size ", block_size, " and head_dim ",
                  head_dim, " must be positive.");
  STD_TORCH_CHECK(element_size == 1 || element_size == 2 || element_size == 4, "element_size is ",
                  element_size, "; it must be 1, 2 or 4.");
  check_size(block_size, "block_size");
  check_size(head_dim, "head_dim");
  check_size(head_dim * element_size, "head_dim x element_size");
  const int64_t count = src_slots.size(0), layers = caches.size(0);
  MoveArgs args = {};
  args.caches = static_cast<const Cache*>(caches.const_data_ptr());
  args.src = vector_data<int64_t>(src_slots, ScalarType::Long, count, "src_slots");
  args.dst = vector_data<int64_t>(dst_slots, ScalarType::Long, count, "dst_slots");
  args.count = static_cast<int>(count);
  args.block_size = static_cast<int>(block_size);
  if (count == 0 || layers == 0) return;
  STD_TORCH_CHECK(layers <= 65535, "caches lists ", layers, " layers; at most 65535 are possible.");
  const DeviceGuard guard(caches);
  const int64_t row_bytes = head_dim * element_size;
  const auto space = static_cast<int64_t>(max_shared_memory(caches));
  int64_t column_bytes = std::min(row_bytes, kColumnBytes);
  while (column_bytes > 1 && column_bytes * count > space) column_bytes = (column_bytes + 1) / 2;
  STD_TORCH_CHECK(column_bytes * count <= space, "redrafter::move_kv: ", count,
                  " moves are too many for one call; at most ", space, " are possible here.");
  args.row_bytes = static_cast<int>(row_bytes);
  args.column_bytes = static_cast<int>(column_bytes);
  args.column_blocks = static_cast<int>((row_bytes + column_bytes - 1) / column_bytes);
  const std::size_t shared = count * column_bytes;
  allow_shared_memory(&move_kv_kernel, shared);
  REDRAFTER_LAUNCH((move_kv_kernel),
                   dim3(static_cast<unsigned>(kHeadBlocks * args.column_blocks), 2,
                        static_cast<unsigned>(layers)),
                   dim3(128), shared, stream_of(caches), args);
}

}  // namespace
}  // namespace redrafter::cuda

STABLE_TORCH_LIBRARY_IMPL(REDRAFTER_LIBRARY, REDRAFTER_CUDA_KEY, m) {
  m.impl("move_kv", TORCH_BOX(&redrafter::cuda::move_kv_cuda));
}
