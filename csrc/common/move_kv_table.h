// SPDX-License-Identifier: Apache-2.0
// The table of caches that MoveKV (vllm_redrafter/ops/move_kv.py) prepares for redrafter::move_kv.
#pragma once

#include <cstdint>

namespace redrafter {

// One layer. Addresses and strides in bytes; a cache is [blocks, kv_heads, block_size, head_dim].
struct Cache {
  int64_t key, value;
  int64_t key_block, key_head;
  int64_t value_block, value_head;
  int64_t kv_heads, blocks;
  int64_t key_token, value_token;
};
constexpr int64_t kCacheColumns = sizeof(Cache) / sizeof(int64_t);

}  // namespace redrafter
