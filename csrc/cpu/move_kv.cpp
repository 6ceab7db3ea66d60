// SPDX-License-Identifier: Apache-2.0
// redrafter::move_kv on the CPU: tokens of a paged cache copied from slot to slot, in all layers.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstring>
#include <optional>

#include "common/check.h"
#include "common/move_kv_table.h"
#include "common/threads.h"
#include "scratch.h"

namespace redrafter {
namespace {

constexpr int64_t kFewElements = 1 << 15;

struct Moves {
  const int64_t* src;
  const int64_t* dst;
  int64_t count;
  int64_t block_size, head_dim;

  // A negative slot fills a list of moves up.
  bool made(int64_t i) const { return src[i] >= 0 && dst[i] >= 0; }
};

// Of a map only what the moves need is read, and so checked.
void check_places(const int32_t* map, const Moves& moves, int64_t entries) {
  if (map == nullptr) return;
  for (int64_t i = 0; i < moves.count; ++i) {
    if (!moves.made(i)) continue;
    for (const int64_t slot : {moves.src[i], moves.dst[i]}) {
      const int32_t* at = map + slot % moves.block_size * moves.head_dim;
      for (int64_t d = 0; d < moves.head_dim; ++d) {
        STD_TORCH_CHECK(at[d] >= 0 && at[d] < entries, "A map holds ", at[d],
                        "; a region has elements 0 to ", entries - 1, ".");
      }
    }
  }
}

// K or V of one head. With a map a token's features lie where it says in their block, without one
// they are consecutive, and tokens `token` bytes apart.
struct Head {
  char* first;
  int64_t block, token;
  const int32_t* map;
};

template <class Element>
void read_row(const Head& head, int64_t slot, const Moves& moves, Element* row) {
  const int64_t offset = slot % moves.block_size, dim = moves.head_dim;
  const char* block = head.first + slot / moves.block_size * head.block;
  if (head.map == nullptr) {
    std::memcpy(row, block + offset * head.token, dim * sizeof(Element));
    return;
  }
  const int32_t* at = head.map + offset * dim;
  for (int64_t d = 0; d < dim; ++d) row[d] = reinterpret_cast<const Element*>(block)[at[d]];
}

template <class Element>
void write_row(const Head& head, int64_t slot, const Moves& moves, const Element* row) {
  const int64_t offset = slot % moves.block_size, dim = moves.head_dim;
  char* block = head.first + slot / moves.block_size * head.block;
  if (head.map == nullptr) {
    std::memcpy(block + offset * head.token, row, dim * sizeof(Element));
    return;
  }
  const int32_t* at = head.map + offset * dim;
  for (int64_t d = 0; d < dim; ++d) reinterpret_cast<Element*>(block)[at[d]] = row[d];
}

// Every row is read before any is written: along an accepted path the slot that one row goes to may
// be the slot that another comes from.
template <class Element>
void move_rows(const Head& head, const Moves& moves, Element* rows) {
  for (int64_t i = 0; i < moves.count; ++i) {
    if (moves.made(i)) read_row(head, moves.src[i], moves, rows + i * moves.head_dim);
  }
  for (int64_t i = 0; i < moves.count; ++i) {
    if (moves.made(i)) write_row(head, moves.dst[i], moves, rows + i * moves.head_dim);
  }
}

template <class Element>
void move_all(const Cache* caches, int64_t layers, const int32_t* key_map, const int32_t* value_map,
              const Moves& moves) {
  const std::size_t bytes = (moves.count * moves.head_dim * sizeof(Element) + 63) / 64 * 64;
  // A few rows are moved sooner than threads are woken.
  int64_t elements = 0;
  for (int64_t l = 0; l < layers; ++l)
    elements += caches[l].kv_heads * moves.count * moves.head_dim;
  const bool few = elements < kFewElements || layers < 2 || omp_in_parallel();
  const int threads = few ? 1 : omp_get_max_threads();
  char* memory = scratch_memory(bytes * threads);
  REDRAFTER_OMP(parallel num_threads(threads) if (threads > 1)) {
    Element* rows = reinterpret_cast<Element*>(memory + bytes * omp_get_thread_num());
    for (int64_t l = omp_get_thread_num(); l < layers; l += omp_get_num_threads()) {
      const Cache& cache = caches[l];
      char* key = reinterpret_cast<char*>(cache.key);
      char* value = reinterpret_cast<char*>(cache.value);
      for (int64_t head = 0; head < cache.kv_heads; ++head) {
        move_rows({key + head * cache.key_head, cache.key_block, cache.key_token, key_map}, moves,
                  rows);
        move_rows({value + head * cache.value_head, cache.value_block, cache.value_token,
                   value_map},
                  moves, rows);
      }
    }
  }
}

void move_kv_cpu(const Tensor& caches, const std::optional<Tensor>& key_map,
                 const std::optional<Tensor>& value_map, const Tensor& src_slots,
                 const Tensor& dst_slots, int64_t block_size, int64_t head_dim,
                 int64_t element_size) {
  check_dtype(caches, ScalarType::Long, "caches");
  check_dims(caches, 2, "caches");
  check_dims(src_slots, 1, "src_slots");
  STD_TORCH_CHECK(caches.size(1) == kCacheColumns && caches.is_contiguous(),
                  "caches must be a contiguous table of ", kCacheColumns, " columns.");
  STD_TORCH_CHECK(block_size > 0 && head_dim > 0, "block_size ", block_size, " and head_dim ",
                  head_dim, " must be positive.");
  check_size(block_size, "block_size");
  check_size(head_dim, "head_dim");
  const int64_t layers = caches.size(0);
  const Cache* table = static_cast<const Cache*>(caches.const_data_ptr());
  Moves moves;
  moves.count = src_slots.size(0);
  moves.src = vector_data<int64_t>(src_slots, ScalarType::Long, moves.count, "src_slots");
  moves.dst = vector_data<int64_t>(dst_slots, ScalarType::Long, moves.count, "dst_slots");
  moves.block_size = block_size;
  moves.head_dim = head_dim;
  const int64_t entries = block_size * head_dim;
  const int32_t* maps[2];
  for (int i = 0; i < 2; ++i) {
    const std::optional<Tensor>& map = i == 0 ? key_map : value_map;
    const char* name = i == 0 ? "key_map" : "value_map";
    maps[i] = nullptr;
    if (!map.has_value()) continue;
    check_dims(*map, 1, name);
    const int64_t tag = map->size(0) == entries + 1 ? 1 : 0;  // see ops/kv_layout.py
    maps[i] = vector_data<int32_t>(*map, ScalarType::Int, entries + tag, name);
  }
  for (const int32_t* map : maps) check_places(map, moves, entries);
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t slots = table[l].blocks * block_size;
    for (int64_t i = 0; i < moves.count; ++i) {
      STD_TORCH_CHECK(
          !moves.made(i) || (moves.src[i] < slots && moves.dst[i] < slots), "move ", i,
          " goes from slot ", moves.src[i], " to ", moves.dst[i], "; the cache has slots 0 to ",
          slots - 1, ".");
    }
  }
  if (moves.count == 0) return;
  switch (element_size) {
    case 1:
      return move_all<uint8_t>(table, layers, maps[0], maps[1], moves);
    case 2:
      return move_all<uint16_t>(table, layers, maps[0], maps[1], moves);
    case 4:
      return move_all<uint32_t>(table, layers, maps[0], maps[1], moves);
    default:
      STD_TORCH_CHECK(false, "element_size is ", element_size, "; it must be 1, 2 or 4.");
  }
}

}  // namespace
}  // namespace redrafter

STABLE_TORCH_LIBRARY_IMPL(redrafter, CPU, m) {
  m.impl("move_kv", TORCH_BOX(&redrafter::move_kv_cpu));
}
