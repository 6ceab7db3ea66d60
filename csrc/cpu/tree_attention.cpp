// SPDX-License-Identifier: Apache-2.0
// Argument checks of redrafter::tree_attention on the CPU; the work is in
// tree_attention_kernel.cpp.
#include "tree_attention_kernel.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "scratch.h"
#include "window.h"

namespace redrafter {
namespace {

// The kernel counts keys in int32, up to the end of a tile.
constexpr int64_t kMostKeysPastTheEnd = 1024;

bool is_token_major(const int32_t* map, int block_size, int head_dim) {
  for (int t = 0; t < block_size; ++t) {
    int wrong = 0;
    for (int d = 0; d < head_dim; ++d) wrong |= map[t * head_dim + d] ^ (t * head_dim + d);
    if (wrong) return false;
  }
  return true;
}

bool is_token_minor(const int32_t* map, int block_size, int head_dim) {
  for (int t = 0; t < block_size; ++t) {
    int wrong = 0;
    for (int d = 0; d < head_dim; ++d) wrong |= map[t * head_dim + d] ^ (d * block_size + t);
    if (wrong) return false;
  }
  return true;
}

// pair_of_tokens: two tokens of one feature lie side by side; else two features of one token.
bool is_pairs(const int32_t* map, int block_size, int head_dim, bool pair_of_tokens) {
  if (block_size % 16 != 0) return false;
  for (int t = 0; t < block_size; ++t) {
    int wrong = 0;
    for (int d = 0; d < head_dim; ++d) {
      const int at = pair_of_tokens ? d / 16 * (block_size * 16) + t / 2 * 32 + d % 16 * 2 + t % 2
                                    : t / 16 * (head_dim * 16) + d / 2 * 32 + t % 16 * 2 + d % 2;
      wrong |= map[t * head_dim + d] ^ at;
    }
    if (wrong) return false;
  }
  return true;
}

// Where a recognised layout has feature d of token t.
int32_t place_of(KvLayout layout, int block_size, int head_dim, int t, int d) {
  switch (layout) {
    case KvLayout::kTokenMinor:
      return d * block_size + t;
    case KvLayout::kKeyPairs:
      return t / 16 * (head_dim * 16) + d / 2 * 32 + t % 16 * 2 + d % 2;
    case KvLayout::kValuePairs:
      return d / 16 * (block_size * 16) + t / 2 * 32 + d % 16 * 2 + t % 2;
    default:
      return t * head_dim + d;
  }
}

// The whole map of a recognised layout, made once by each thread: a tagged map is then never read,
// so that it need not be checked at every call.
const int32_t* map_of(KvLayout layout, int block_size, int head_dim) {
  struct Known {
    KvLayout layout;
    int block_size, head_dim;
    std::vector<int32_t> map;
  };
  static thread_local std::vector<Known> known;
  for (const Known& k : known) {
    if (k.layout == layout && k.block_size == block_size && k.head_dim == head_dim) {
      return k.map.data();
    }
  }
  std::vector<int32_t> map(static_cast<size_t>(block_size) * head_dim);
  for (int t = 0; t < block_size; ++t) {
    for (int d = 0; d < head_dim; ++d) {
      map[static_cast<size_t>(t) * head_dim + d] = place_of(layout, block_size, head_dim, t, d);
    }
  }
  known.push_back({layout, block_size, head_dim, std::move(map)});
  return known.back().map.data();
}

// A region must be consecutive, whatever order the map gives it.
void check_region(const Tensor& cache, const char* name) {
  const int64_t block_size = cache.size(2), head_dim = cache.size(3);
  const int64_t token = cache.stride(2), feature = cache.stride(3);
  const bool major = feature == 1 && (block_size == 1 || token == head_dim);
  const bool minor = (block_size == 1 || token == 1) && feature == block_size;
  STD_TORCH_CHECK(major || minor, name, " says where features lie in a region of ",
                  block_size * head_dim, " consecutive elements, but the cache has strides ", token,
                  " and ", feature, " there.");
}

KvLayout recognise(const int32_t* map, int block_size, int head_dim) {
  if (is_token_major(map, block_size, head_dim)) return KvLayout::kTokenMajor;
  if (is_token_minor(map, block_size, head_dim)) return KvLayout::kTokenMinor;
  if (is_pairs(map, block_size, head_dim, false)) return KvLayout::kKeyPairs;
  if (is_pairs(map, block_size, head_dim, true)) return KvLayout::kValuePairs;
  return KvLayout::kMapped;
}

// A map may end with one more entry, what `recognise` said of it (ops/kv_layout.py puts it there):
// reading a whole map at every call costs more than a microsecond. One of no known layout is read
// and checked every time: it is slow anyway.
//
// Without a map the cache's own strides are put into one, `own`.
KvLayout layout_of(const std::optional<Tensor>& map, const Tensor& cache, const char* name,
                   std::vector<int32_t>& own, const int32_t** data) {
  const int64_t block_size = cache.size(2), head_dim = cache.size(3);
  const int64_t entries = block_size * head_dim;
  if (!map.has_value()) {
    const int64_t token = cache.stride(2), feature = cache.stride(3);
    STD_TORCH_CHECK(token * block_size + feature * head_dim < INT32_MAX, name,
                    " is needed: the cache's strides within a block are too large.");
    own.resize(entries);
    for (int64_t t = 0; t < block_size; ++t) {
      for (int64_t d = 0; d < head_dim; ++d) {
        own[t * head_dim + d] = static_cast<int32_t>(t * token + d * feature);
      }
    }
    *data = own.data();
    return recognise(*data, static_cast<int>(block_size), static_cast<int>(head_dim));
  }
  check_region(cache, name);
  const bool tagged = map->dim() == 1 && map->size(0) == entries + 1;
  *data = vector_data<int32_t>(*map, ScalarType::Int, entries + (tagged ? 1 : 0), name);
  if (tagged && (*data)[entries] != static_cast<int32_t>(KvLayout::kMapped)) {
    const int32_t tag = (*data)[entries];
    const auto layout = static_cast<KvLayout>(tag);
    const bool pairs = layout == KvLayout::kKeyPairs || layout == KvLayout::kValuePairs;
    STD_TORCH_CHECK(tag > 0 && tag <= static_cast<int32_t>(KvLayout::kValuePairs) &&
                        (!pairs || block_size % 16 == 0),
                    name, " ends with ", tag, ", which is no layout of blocks of ", block_size,
                    " tokens.");
    *data = map_of(layout, static_cast<int>(block_size), static_cast<int>(head_dim));
    return layout;
  }
  const KvLayout layout =
      tagged ? KvLayout::kMapped
             : recognise(*data, static_cast<int>(block_size), static_cast<int>(head_dim));
  if (layout == KvLayout::kMapped) {
    for (int64_t i = 0; i < entries; ++i) {
      STD_TORCH_CHECK((*data)[i] >= 0 && (*data)[i] < entries, name, "[", i, "] is ", (*data)[i],
                      "; a region has elements 0 to ", entries - 1, ".");
    }
  }
  return layout;
}

void tree_attention_cpu(const Tensor& out, const Tensor& query, const Tensor& key_cache,
                        const Tensor& value_cache, const std::optional<Tensor>& key_map,
                        const std::optional<Tensor>& value_map, const Tensor& block_table,
                        const Tensor& request_index, const Tensor& row_start,
                        const Tensor& row_count, const Tensor& context_lens, const Tensor& masks,
                        double scale, double softcap, int64_t window,
                        const std::optional<Tensor>& sinks) {
  TreeAttentionArgs args = {};
  const ScalarType dtype = query.scalar_type();
  switch (dtype) {
    case ScalarType::Float:
      args.dtype = Dtype::kFloat;
      break;
    case ScalarType::BFloat16:
      args.dtype = Dtype::kBFloat16;
      break;
    case ScalarType::Half:
      args.dtype = Dtype::kHalf;
      break;
    default:
      STD_TORCH_CHECK(false, "query has dtype ", torch::headeronly::toString(dtype),
                      "; it must be float32, bfloat16 or float16.");
  }
  check_dtype(out, dtype, "out");
  check_dtype(key_cache, dtype, "key_cache");
  check_dtype(value_cache, dtype, "value_cache");
  check_dims(query, 3, "query");
  check_dims(out, 3, "out");
  check_dims(key_cache, 4, "key_cache");
  check_dims(value_cache, 4, "value_cache");
  check_dims(block_table, 2, "block_table");
  check_dims(masks, 2, "masks");

  const int64_t tokens = query.size(0), query_heads = query.size(1), head_dim = query.size(2);
  STD_TORCH_CHECK(out.size(0) == tokens && out.size(1) == query_heads && out.size(2) == head_dim,
                  "out must have the shape of query, [", tokens, ", ", query_heads, ", ", head_dim,
                  "].");
  const int64_t blocks = key_cache.size(0), kv_heads = key_cache.size(1);
  const int64_t block_size = key_cache.size(2);
  STD_TORCH_CHECK(value_cache.size(0) == blocks && value_cache.size(1) == kv_heads &&
                      value_cache.size(2) == block_size && value_cache.size(3) == head_dim &&
                      key_cache.size(3) == head_dim,
                  "key_cache and value_cache must both be [blocks, kv_heads, block_size, ",
                  head_dim, "].");
  STD_TORCH_CHECK(head_dim > 0 && head_dim % 16 == 0, "head_dim is ", head_dim,
                  "; it must be a multiple of 16.");
  STD_TORCH_CHECK(block_size > 0, "block_size is 0.");
  for (const int64_t size : {tokens, query_heads, head_dim, blocks, kv_heads, block_size}) {
    check_size(size, "A size of query or key_cache");
  }
  check_size(block_size * head_dim, "block_size x head_dim");
  STD_TORCH_CHECK(kv_heads > 0 && query_heads % kv_heads == 0, "query has ", query_heads,
                  " heads; it must be a multiple of the ", kv_heads, " KV heads.");
  STD_TORCH_CHECK(softcap >= 0, "softcap is ", softcap, "; it must be 0 (off) or positive.");

  STD_TORCH_CHECK(scale > 0, "scale is ", scale, "; it must be positive.");
  STD_TORCH_CHECK(window >= 0, "window is ", window, "; it must be 0 (off) or positive.");
  if (sinks.has_value()) {
    args.sinks = vector_data<float>(*sinks, ScalarType::Float, query_heads, "sinks");
  }

  check_dims(request_index, 1, "request_index");
  const int64_t requests = request_index.size(0);
  check_size(requests, "The number of requests");
  std::vector<int32_t> own_key_map, own_value_map;
  args.key_layout = layout_of(key_map, key_cache, "key_map", own_key_map, &args.key_map);
  args.value_layout =
      layout_of(value_map, value_cache, "value_map", own_value_map, &args.value_map);
  args.request_index =
      vector_data<int32_t>(request_index, ScalarType::Int, requests, "request_index");
  args.row_start = vector_data<int32_t>(row_start, ScalarType::Int, requests, "row_start");
  args.row_count = vector_data<int32_t>(row_count, ScalarType::Int, requests, "row_count");
  args.context_lens = vector_data<int32_t>(context_lens, ScalarType::Int, requests, "context_lens");
  check_dtype(block_table, ScalarType::Int, "block_table");
  check_dtype(masks, ScalarType::Long, "masks");
  const int64_t max_blocks = block_table.size(1), words = masks.size(1);
  check_size(max_blocks, "The number of columns of block_table");
  check_size(words, "The number of columns of masks");
  STD_TORCH_CHECK(
      (max_blocks < 2 || block_table.stride(1) == 1) && (words < 2 || masks.stride(1) == 1),
      "block_table and masks must be contiguous in their last dimension.");
  args.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  args.block_table_stride = block_table.stride(0);
  args.masks = static_cast<const int64_t*>(masks.const_data_ptr());
  args.mask_stride = masks.stride(0);
  args.mask_words = static_cast<int>(words);

  for (int64_t r = 0; r < requests; ++r) {
    const int64_t start = args.row_start[r], rows = args.row_count[r];
    const int64_t row = args.request_index[r], keys = args.context_lens[r] + rows;
    STD_TORCH_CHECK(
        start >= 0 && rows >= 0 && start + rows <= tokens && start + rows <= masks.size(0),
        "request ", r, " has rows ", start, " to ", start + rows, " of ", tokens,
        " query rows and ", masks.size(0), " mask rows.");
    STD_TORCH_CHECK(rows <= words * 64, "request ", r, " has ", rows, " rows; masks of ", words,
                    " words hold at most ", words * 64, ".");
    STD_TORCH_CHECK(row >= 0 && row < block_table.size(0), "request_index[", r, "] is ", row,
                    "; block_table has ", block_table.size(0), " rows.");
    STD_TORCH_CHECK(args.context_lens[r] >= 0 && keys <= max_blocks * block_size &&
                        keys <= kLargestSize - kMostKeysPastTheEnd,
                    "request ", r,
                    " has ", keys, " keys; its row of block_table holds ", max_blocks * block_size,
                    ".");
  }
  args.requests = static_cast<int>(requests);
  const Windows windows(args, window, tokens);
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t row = args.request_index[r], keys = args.context_lens[r] + args.row_count[r];
    const int32_t* ids = args.block_table + row * args.block_table_stride;
    // Blocks in front of a window may be another request's by now, or none.
    for (int64_t i = args.first_key ? args.first_key[r] / block_size : 0; i * block_size < keys;
         ++i) {
      STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < blocks, "block_table[", row, ", ", i, "] is ", ids[i],
                      "; the cache has ", blocks, " blocks.");
    }
  }

  args.out = out.mutable_data_ptr();
  args.query = query.const_data_ptr();
  args.key_cache = key_cache.const_data_ptr();
  args.value_cache = value_cache.const_data_ptr();
  for (int i = 0; i < 3; ++i) {
    args.out_stride[i] = out.stride(i);
    args.query_stride[i] = query.stride(i);
  }
  for (int i = 0; i < 2; ++i) {
    args.key_stride[i] = key_cache.stride(i);
    args.value_stride[i] = value_cache.stride(i);
  }
  args.query_heads = static_cast<int>(query_heads);
  args.kv_heads = static_cast<int>(kv_heads);
  args.head_dim = static_cast<int>(head_dim);
  args.block_size = static_cast<int>(block_size);
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.scratch = &scratch_memory;
  REDRAFTER_VARIANT_OF(tree_attention)(args);
}

}  // namespace
}  // namespace redrafter

// Called through ctypes by ops/kv_layout.py, once per engine.
extern "C" __attribute__((visibility("default"))) int redrafter_recognise_layout(const int32_t* map,
                                                                                 int block_size,
                                                                                 int head_dim) {
  return static_cast<int>(redrafter::recognise(map, block_size, head_dim));
}

STABLE_TORCH_LIBRARY_IMPL(redrafter, CPU, m) {
  m.impl("tree_attention", TORCH_BOX(&redrafter::tree_attention_cpu));
}
