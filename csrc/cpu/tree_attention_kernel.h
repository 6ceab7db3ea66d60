// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "dispatch.h"

namespace redrafter {

enum class Dtype { kFloat, kBFloat16, kHalf };

// How a (block, head) region of block_size * head_dim elements is laid out, for the layouts that
// have a path of their own; element (t, d) is feature d of token t.
enum class KvLayout {
  kMapped,      // as the map says
  kTokenMinor,  // [head_dim][block_size], vLLM's keys for vector units
  kTokenMajor,  // [block_size][head_dim], vLLM's values for vector units
  kKeyPairs,    // [block_size / 16][head_dim / 2][16][2], vLLM's keys for AMX: pairs of features
  kValuePairs,  // [head_dim / 16][block_size / 2][16][2], vLLM's values for AMX: pairs of tokens
};

// All strides in elements. The scratch callback returns memory aligned to 64 bytes that stays valid
// until the next call by the same thread.
struct TreeAttentionArgs {
  Dtype dtype;
  void* out;
  int64_t out_stride[3];
  const void* query;
  int64_t query_stride[3];
  const void* key_cache;
  int64_t key_stride[2];  // block, head
  const void* value_cache;
  int64_t value_stride[2];
  const int32_t* key_map;
  const int32_t* value_map;
  KvLayout key_layout;
  KvLayout value_layout;
  const int32_t* block_table;
  int64_t block_table_stride;
  const int32_t* request_index;
  const int32_t* row_start;
  const int32_t* row_count;
  const int32_t* context_lens;
  const int64_t* masks;
  int64_t mask_stride;
  int mask_words;
  int requests;
  int query_heads;
  int kv_heads;
  int head_dim;
  int block_size;
  float scale;
  float softcap;
  // Of a window: the first key of each request that any of its rows sees, and the first that each
  // query row sees (its mask holds no row that left the window). Null without a window.
  const int32_t* first_key;
  const int32_t* first_seen;
  const float* sinks;  // [query_heads], or null
  char* (*scratch)(size_t bytes);
};

}  // namespace redrafter

REDRAFTER_DECLARE_VARIANTS(void tree_attention(const TreeAttentionArgs& args))
