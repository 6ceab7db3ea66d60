// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// Tokens of a paged cache copied from slot to slot.
//
// Every source must be read before any destination is written, over all moves. So a block of threads
// takes a few bytes of the features of one head of one cache for ALL moves, reads them into shared
// memory, waits, and writes: blocks then never touch each other's bytes.
#pragma once

#include <cstdint>

#include "common/move_kv_table.h"
#include "cuda/device.h"

namespace redrafter::cuda {

constexpr int kHeadBlocks = 8;  // heads of a cache at a time: how many there are is on the device

struct MoveArgs {
  const Cache* caches;
  const int64_t* src;
  const int64_t* dst;
  int count;          // moves
  int block_size;     // tokens of a cache block
  int row_bytes;      // of a token's features in one head
  int column_bytes;   // of these, what a block of threads takes
  int column_blocks;
};

// One head of K or V, from `first` bytes into each row.
struct Rows {
  char* base;
  int64_t block_stride, token_stride, slots;

  __device__ char* at(int64_t slot, int block_size) const {
    return base + slot / block_size * block_stride + slot % block_size * token_stride;
  }
};

template <class Unit>
__device__ void move_rows(const MoveArgs& args, const Rows& rows, int bytes, void* shared) {
  constexpr int kUnit = static_cast<int>(sizeof(Unit));
  Unit* staged = static_cast<Unit*>(shared);  // [moves][columns]
  const int columns = bytes / kUnit;
  const auto is_made = [&](int move) {
    const int64_t src = args.src[move], dst = args.dst[move];
    return src >= 0 && src < rows.slots && dst >= 0 && dst < rows.slots;
  };
  const auto unit = [&](int64_t slot, int column) {
    return reinterpret_cast<Unit*>(rows.at(slot, args.block_size)) + column;
  };
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int i = thread; i < args.count * columns; i += threads) {
    if (is_made(i / columns)) staged[i] = *unit(args.src[i / columns], i % columns);
  }
  __syncthreads();
  // What a thread writes it has staged itself: the next head needs no further barrier.
  for (int i = thread; i < args.count * columns; i += threads) {
    if (is_made(i / columns)) *unit(args.dst[i / columns], i % columns) = staged[i];
  }
}

// Grid (head blocks x column blocks, K and V, layers).
__global__ void __launch_bounds__(256, 1) move_kv_kernel(const MoveArgs args) {
  REDRAFTER_DYNAMIC_SHARED(raw);
  const Cache& cache = args.caches[blockIdx.z];
  const bool is_key = blockIdx.y == 0;
  const int first = static_cast<int>(blockIdx.x) % args.column_blocks * args.column_bytes;
  const int bytes = min(args.column_bytes, args.row_bytes - first);
  for (int64_t head = blockIdx.x / args.column_blocks; head < cache.kv_heads;
       head += kHeadBlocks) {
    Rows rows;
    rows.base = reinterpret_cast<char*>(is_key ? cache.key : cache.value) +
                head * (is_key ? cache.key_head : cache.value_head) + first;
    rows.block_stride = is_key ? cache.key_block : cache.value_block;
    rows.token_stride = is_key ? cache.key_token : cache.value_token;
    rows.slots = cache.blocks * args.block_size;
    const int64_t alignment = reinterpret_cast<int64_t>(rows.base) | rows.block_stride |
                              rows.token_stride | bytes;
    if (alignment % 16 == 0) {
      move_rows<uint4>(args, rows, bytes, raw);
    } else if (alignment % 4 == 0) {
      move_rows<uint32_t>(args, rows, bytes, raw);
    } else if (alignment % 2 == 0) {
      move_rows<uint16_t>(args, rows, bytes, raw);
    } else {
      move_rows<uint8_t>(args, rows, bytes, raw);
    }
  }
}

}  // namespace redrafter::cuda
