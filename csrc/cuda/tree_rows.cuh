// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// What the kernels that make trees have in common: the numbers of nodes, and ancestor masks.
#pragma once

#include <cstdint>

#include "common/tree_constants.h"
#include "cuda/device.h"
#include "cuda/strided.h"

namespace redrafter::cuda {

// In place of a parent that does not exist.
constexpr int kBroken = -2;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Sum of `flag` over the lanes below this one.
__device__ inline int lanes_below(unsigned ballot) {
  return __popc(ballot & ((1u << (threadIdx.x % 32)) - 1));
}

// By one warp. node_of holds the number of what lies in the best chain, 0 for the other candidates
// of the tree and -1 for what is left out; `order` lists the candidates, null for 0, 1, ... The
// others get the numbers that follow the chain, in that order. Returns how many nodes there are,
// the root included.
__device__ inline int number_the_others(int* node_of, const int* order, int candidates) {
  const int lane = static_cast<int>(threadIdx.x);
  int count = 1;
  for (int first = 0; first < candidates; first += 32) {
    const int at = first + lane;
    const bool in_chain = at < candidates && node_of[order ? order[at] : at] > 0;
    count += __popc(__ballot_sync(kWholeWarp, in_chain));
  }
  for (int first = 0; first < candidates; first += 32) {
    const int at = first + lane;
    const int i = at >= candidates ? -1 : order ? order[at] : at;
    const bool mine = i >= 0 && node_of[i] == 0;
    const unsigned ballot = __ballot_sync(kWholeWarp, mine);
    if (mine) node_of[i] = count + lanes_below(ballot);
    count += __popc(ballot);
  }
  return count;
}

// By a block: rows of `count` nodes, of which `parent` holds the parent nodes, and of padding.
__device__ inline void write_masks(const int* parent, int count, int most, int words,
                                   const Strided<int64_t>& out, int64_t b) {
  for (int at = static_cast<int>(threadIdx.x); at < most * words;
       at += static_cast<int>(blockDim.x)) {
    const int node = at / words, word = at % words;
    unsigned long long bits = 0;
    for (int up = node;; up = parent[up]) {
      if (up / 64 == word) bits |= 1ull << (up % 64);
      if (up == 0 || up >= count) break;
    }
    out.at(b, node, word) = static_cast<int64_t>(bits);
  }
}

}  // namespace redrafter::cuda
