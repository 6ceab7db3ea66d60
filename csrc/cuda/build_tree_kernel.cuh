// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// One request's draft to its tree: the rules of vllm_redrafter/tree/build.py, a block per request.
//
// The loops of the definition become order-free steps: ranks by counting, what is sequential by
// nature (the best chain, numbering) in one warp, outputs in parallel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/tree_rows.cuh"

namespace redrafter::cuda {

struct BuildTreeArgs {
  Strided<int64_t> out_tokens, out_parents, out_depths, out_masks, out_num_nodes;
  Strided<const int64_t> root, tokens, parents;
  Strided<const float> scores;
  int length, width, most, words;
};

// The block's shared memory. Candidate i = depth * width + rank, depth 0 first; -1 is the root above
// depth 0. `above` is kBroken where the draft names a parent that does not exist.
struct BuildTreeShared {
  int* above;     // [candidates] the parent candidate
  int* node_of;   // [candidates] the node it became, -1 for none
  int* order;     // [candidates] scratch of a rule
  int* by_order;  // [candidates] scratch of a rule
  float* score;   // [candidates] `best` only; the paths of `beams` lie in its place
  int* source;    // [most] the candidate of a node
  int* parent;    // [most] the parent node
  int* count;     // nodes
};

inline std::size_t build_tree_shared_bytes(int64_t candidates, int64_t most) {
  return static_cast<std::size_t>(5 * candidates + 2 * most + 1) * sizeof(int);
}

// `best`, by one warp: s.order holds the rank of each candidate (-1: not chosen), s.by_order the
// candidate of each of the `chosen` ranks. Chain members get order rank - candidates, so that order
// is the sequence in which the nodes are numbered.
__device__ inline void number_best(const BuildTreeArgs& args, const BuildTreeShared& s,
                                   int candidates, int chosen) {
  const int lane = static_cast<int>(threadIdx.x);
  const int width = args.width;
  // The best chain: at each depth the likeliest chosen child that comes later than its parent.
  int last = -1, last_rank = -1;
  for (int depth = 0; depth < args.length; ++depth) {
    int best = candidates;
    for (int i = depth * width + lane; i < (depth + 1) * width; i += 32) {
      if (s.above[i] == last && s.order[i] > last_rank) best = min(best, s.order[i]);
    }
    for (int by = 16; by > 0; by /= 2) best = min(best, __shfl_xor_sync(kWholeWarp, best, by));
    if (best == candidates) break;
    last = s.by_order[best];
    last_rank = best;
    if (lane == 0) s.node_of[last] = depth + 1;
    __syncwarp();
  }
  for (int i = lane; i < candidates; i += 32) {
    if (s.node_of[i] > 0) s.order[i] -= candidates;
  }
  __syncwarp();
  // A candidate stays if its parent stays and is numbered before it. Depth by depth.
  for (int depth = 0; depth < args.length; ++depth) {
    for (int i = depth * width + lane; i < (depth + 1) * width; i += 32) {
      if (s.node_of[i] > 0 || s.order[i] == -1) continue;
      const int above = s.above[i];
      const bool stays = above == -1 || (above >= 0 && s.node_of[above] >= 0 &&
                                         s.order[above] < s.order[i]);
      s.node_of[i] = stays ? 0 : -1;
    }
    __syncwarp();
  }
  // Chain members have their numbers; the others follow in the order of their ranks.
  const int count = number_the_others(s.node_of, s.by_order, chosen);
  if (lane == 0) *s.count = count;
}

__device__ inline void choose_best(const BuildTreeArgs& args, const BuildTreeShared& s, int64_t b,
                                   int candidates) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int width = args.width;
  for (int i = thread; i < candidates; i += threads) {
    const float score = args.scores.at(b, i / width, i % width);
    s.score[i] = score > kLowestRealScore ? score : -INFINITY;  // NaN too
  }
  __syncthreads();
  const int limit = args.most - 1;
  for (int i = thread; i < candidates; i += threads) {
    const float mine = s.score[i];
    int rank = mine > kLowestRealScore ? 0 : limit;
    if (rank == 0) {
      for (int j = 0; j < candidates; ++j) {
        const float other = s.score[j];
        rank += other > mine || (other == mine && j < i);
      }
    }
    s.order[i] = rank < limit ? rank : -1;
    s.node_of[i] = -1;
    if (rank < limit) s.by_order[rank] = i;
  }
  if (thread == 0) *s.count = 0;
  __syncthreads();
  if (thread < 32) {
    int chosen = 0;
    for (int first = 0; first < candidates; first += 32) {
      const bool mine = first + thread < candidates && s.order[first + thread] >= 0;
      chosen += __popc(__ballot_sync(kWholeWarp, mine));
    }
    number_best(args, s, candidates, chosen);
  }
}

// `beams`: element e = beam * length + depth stands for the first depth + 1 tokens of a beam. The
// element of the first beam with that prefix becomes a node, in the order of the elements.
__device__ inline void choose_beams(const BuildTreeArgs& args, const BuildTreeShared& s, int64_t b,
                                    int candidates) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int width = args.width, length = args.length;
  int* path = s.by_order;  // [beam, depth] the candidate; kBroken at depth 0 for a broken beam
  int* first_beam = s.order;                     // [beam, depth], -1 for a broken beam
  int* token_id = reinterpret_cast<int*>(s.score);  // [candidates] equal iff tokens are, per depth
  for (int beam = thread; beam < width; beam += threads) {
    int i = (length - 1) * width + beam;
    for (int depth = length - 1; depth >= 0; --depth) {
      path[beam * length + depth] = i;
      if (i >= 0) i = s.above[i];
    }
  }
  // A token is named by the first candidate of its depth that holds it.
  for (int i = thread; i < candidates; i += threads) {
    const int64_t token = args.tokens.at(b, i / width, i % width);
    int same = 0;
    while (args.tokens.at(b, i / width, same) != token) ++same;
    token_id[i] = same;
  }
  __syncthreads();
  for (int e = thread; e < candidates; e += threads) {
    const int beam = e / length, depth = e % length;
    const int* mine = path + beam * length;
    int first = -1;
    if (mine[0] != kBroken) {
      for (first = 0; first < beam; ++first) {
        const int* other = path + first * length;
        if (other[0] == kBroken) continue;
        int same = depth;
        while (same >= 0 && token_id[other[same]] == token_id[mine[same]]) --same;
        if (same < 0) break;
      }
    }
    first_beam[e] = first;
    s.node_of[e] = -1;  // by element, until the nodes are numbered
  }
  __syncthreads();
  if (thread >= 32) return;
  int count = 1;
  for (int first = 0; first < candidates; first += 32) {
    const int e = first + thread;
    const bool mine = e < candidates && first_beam[e] == e / length;
    const unsigned ballot = __ballot_sync(kWholeWarp, mine);
    const int node = count + lanes_below(ballot);
    if (mine && node < args.most) s.node_of[e] = node;
    count += __popc(ballot);
  }
  __syncwarp();
  count = min(count, args.most);
  // From elements to the candidates and parents of nodes.
  for (int e = thread; e < candidates; e += 32) {
    const int node = s.node_of[e], depth = e % length;
    if (node < 0) continue;
    s.source[node] = path[e];
    s.parent[node] = depth == 0 ? 0 : s.node_of[first_beam[e - 1] * length + depth - 1];
  }
  if (thread == 0) *s.count = count;
}

template <bool kBest>
__global__ void __launch_bounds__(512) build_tree_kernel(BuildTreeArgs args) {
  REDRAFTER_DYNAMIC_SHARED(raw);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t b = static_cast<int64_t>(blockIdx.x);
  const int width = args.width, candidates = args.length * args.width, most = args.most;
  int* memory = reinterpret_cast<int*>(raw);
  BuildTreeShared s;
  s.above = memory;
  s.node_of = s.above + candidates;
  s.order = s.node_of + candidates;
  s.by_order = s.order + candidates;
  s.score = reinterpret_cast<float*>(s.by_order + candidates);
  s.source = s.by_order + 2 * candidates;
  s.parent = s.source + most;
  s.count = s.parent + most;

  for (int i = thread; i < candidates; i += threads) {
    const int64_t rank = i < width ? 0 : args.parents.at(b, i / width, i % width);
    const bool exists = rank >= 0 && rank < width;
    s.above[i] = i < width ? -1 : exists ? (i / width - 1) * width + static_cast<int>(rank)
                                         : kBroken;
  }
  __syncthreads();
  if (kBest) {
    choose_best(args, s, b, candidates);
    __syncthreads();
    for (int i = thread; i < candidates; i += threads) {
      const int node = s.node_of[i];
      if (node < 0) continue;
      s.source[node] = i;
      s.parent[node] = s.above[i] < 0 ? 0 : s.node_of[s.above[i]];
    }
  } else {
    choose_beams(args, s, b, candidates);
  }
  __syncthreads();

  const int count = *s.count;
  for (int node = thread; node < most; node += threads) {
    const bool drafted = node > 0 && node < count;
    const int i = drafted ? s.source[node] : 0;
    args.out_tokens.at(b, node) = drafted     ? args.tokens.at(b, i / width, i % width)
                                  : node == 0 ? args.root.at(b)
                                              : 0;
    args.out_parents.at(b, node) = drafted ? s.parent[node] : -1;
    args.out_depths.at(b, node) = drafted ? i / width + 1 : 0;
  }
  write_masks(s.parent, count, most, args.words, args.out_masks, b);
  if (thread == 0) args.out_num_nodes.at(b) = count;
}

}  // namespace redrafter::cuda
