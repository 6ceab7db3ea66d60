// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// The rules of vllm_redrafter/tree/candidates.py, a block per request.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/candidates_sizes.h"
#include "cuda/device.h"
#include "cuda/tree_rows.cuh"

namespace redrafter::cuda {

// Candidates are numbered as CandidatesSizes says; data of what was not given is null.
struct MergeArgs {
  Strided<int64_t> out_tokens, out_parents, out_depths, out_sources, out_counts;
  Strided<float> out_scores;
  Strided<const int64_t> beam_tokens, beam_parents, chain_tokens, max_depth;
  Strided<const float> beam_scores, chain_scores;
  CandidatesSizes sizes;
  int most;
};

// The block's shared memory, an entry per candidate. The candidates of one path are a group, named
// after its first; the first of them with a score leads it and stands for the path.
struct MergeShared {
  int64_t* token;
  float* score;  // of a path, at its leader; -inf where there is none or it is left out
  int* above;    // the group of the path above, -1 for the root; of leaders later its leader
  int* group;    // kBroken for all that hangs on a parent outside the width
  int* leader;   // of a group, at its first; -1 for none
  int* depth;    // of leaders
  int* sources;  // of leaders
  int* count;    // alone: what was taken
  // When all groups are known:
  __device__ int* place() const { return group; }     // of leaders, in the order of scores
  __device__ int* by_place() const { return leader; }
};

inline std::size_t merge_shared_bytes(const CandidatesSizes& sizes) {
  const std::size_t one = sizeof(int64_t) + sizeof(float) + 5 * sizeof(int);
  return static_cast<std::size_t>(sizes.count()) * one + sizeof(int);
}

__device__ inline MergeShared merge_shared(unsigned char* memory, int candidates) {
  MergeShared s;
  s.token = reinterpret_cast<int64_t*>(memory);
  s.score = reinterpret_cast<float*>(s.token + candidates);
  s.above = reinterpret_cast<int*>(s.score + candidates);
  s.group = s.above + candidates;
  s.leader = s.group + candidates;
  s.depth = s.leader + candidates;
  s.sources = s.depth + candidates;
  s.count = s.sources + candidates;
  return s;
}

// What was drafted at one depth; the groups of the depth above are known.
__device__ inline void load_depth(const MergeArgs& args, const MergeShared& s, int64_t b, int at) {
  const CandidatesSizes& sizes = args.sizes;
  const bool too_deep = args.max_depth.data && at >= args.max_depth.at(b);
  const int begin = sizes.first(at), end = sizes.first(at + 1), beams = sizes.beams_at(at);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += static_cast<int>(blockDim.x)) {
    int above = -1;
    float score;
    if (i - begin < beams) {
      const int rank = i - begin;
      const int64_t parent = at == 0 ? 0 : args.beam_parents.at(b, at, rank);
      const bool exists = parent >= 0 && parent < sizes.width;
      if (!exists) above = kBroken;
      else if (at > 0) above = s.group[sizes.of_beam(at - 1, static_cast<int>(parent))];
      s.token[i] = args.beam_tokens.at(b, at, rank);
      score = args.beam_scores.at(b, at, rank);
    } else {
      const int chain = i - begin - beams;
      if (at > 0) above = s.group[sizes.of_chain(at - 1, chain)];
      s.token[i] = args.chain_tokens.at(b, chain, at);
      score = args.chain_scores.at(b, chain, at);
    }
    s.above[i] = above;
    const bool counts = score > kLowestRealScore && above != kBroken && !too_deep;  // NaN does not
    s.score[i] = counts ? score : -INFINITY;
  }
}

__device__ inline void group_depth(const MergeArgs& args, const MergeShared& s, int at) {
  const int begin = args.sizes.first(at), end = args.sizes.first(at + 1);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += static_cast<int>(blockDim.x)) {
    const int above = s.above[i];
    int first = kBroken;
    if (above != kBroken) {
      first = begin;
      while (s.above[first] != above || s.token[first] != s.token[i]) ++first;
    }
    s.group[i] = first;
  }
}

// A path counts if the path above counts and scores no lower.
__device__ inline void lead_depth(const MergeArgs& args, const MergeShared& s, int at) {
  const int begin = args.sizes.first(at), end = args.sizes.first(at + 1);
  const int beams_end = begin + args.sizes.beams_at(at);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += static_cast<int>(blockDim.x)) {
    if (s.group[i] != i) continue;
    int leader = -1, sources = 0;
    float score = -INFINITY;
    for (int j = i; j < end; ++j) {
      if (s.group[j] != i || s.score[j] == -INFINITY) continue;
      if (leader < 0) leader = j;
      score = max(score, s.score[j]);
      sources |= j < beams_end ? kFromDrafter : kFromLookup;
      s.score[j] = -INFINITY;
    }
    const int above = s.above[i] < 0 ? -1 : s.leader[s.above[i]];
    const bool hangs = at == 0 || (above >= 0 && s.score[above] >= score);
    s.leader[i] = hangs ? leader : -1;
    if (leader < 0 || !hangs) continue;
    s.score[leader] = score;
    s.above[leader] = above;
    s.depth[leader] = at + 1;
    s.sources[leader] = sources;
  }
}

// Of equal scores the lower number comes first.
__device__ inline void rank_paths(const MergeArgs& args, const MergeShared& s, int candidates) {
  for (int i = static_cast<int>(threadIdx.x); i < candidates; i += static_cast<int>(blockDim.x)) {
    const float mine = s.score[i];
    if (mine == -INFINITY) continue;
    int rank = 0, all = 0;
    for (int j = 0; j < candidates; ++j) {
      const float other = s.score[j];
      rank += other > mine || (other == mine && j < i);
      all += other > -INFINITY;
    }
    s.place()[i] = rank;
    s.by_place()[rank] = i;
    if (rank == 0) *s.count = min(all, args.most);
  }
}

// A block a multiprocessor will do: without the 1 ptxas spills registers to fit more.
__global__ void __launch_bounds__(512, 1) merge_candidates_kernel(MergeArgs args) {
  REDRAFTER_DYNAMIC_SHARED(raw);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t b = static_cast<int64_t>(blockIdx.x);
  const int candidates = args.sizes.count();
  const MergeShared s = merge_shared(raw, candidates);
  if (thread == 0) *s.count = 0;
  for (int at = 0; at < args.sizes.depths(); ++at) {
    load_depth(args, s, b, at);
    __syncthreads();
    group_depth(args, s, at);
    __syncthreads();
    lead_depth(args, s, at);
    __syncthreads();
  }
  rank_paths(args, s, candidates);
  __syncthreads();

  const int count = *s.count;
  for (int at = thread; at < args.most; at += threads) {
    const bool taken = at < count;
    const int i = taken ? s.by_place()[at] : 0;
    args.out_tokens.at(b, at) = taken ? s.token[i] : 0;
    args.out_parents.at(b, at) = taken && s.above[i] >= 0 ? s.place()[s.above[i]] : -1;
    args.out_depths.at(b, at) = taken ? s.depth[i] : 0;
    args.out_scores.at(b, at) = taken ? s.score[i] : kFillerScore;
    args.out_sources.at(b, at) = taken ? s.sources[i] : 0;
  }
  if (thread == 0) args.out_counts.at(b) = count;
}

struct ChooseArgs {
  Strided<int64_t> out_tokens, out_parents, out_depths, out_masks, out_num_nodes, out_chosen;
  Strided<const int64_t> root, tokens, parents, depths, candidate_counts, counts;
  int most, words;
};

struct ChooseShared {
  int* above;    // [most] the parent candidate, -1 for the root, kBroken for one that cannot be
  int* node_of;  // [most] as number_the_others wants it
  int* source;   // [most + 1] the candidate of a node
  int* parent;   // [most + 1] the parent node
  int* count;    // nodes
};

inline std::size_t choose_shared_bytes(int64_t most) {
  return static_cast<std::size_t>(4 * most + 3) * sizeof(int);
}

// By one warp: from the root always to the first child among the candidates.
__device__ inline void number_chain(const ChooseShared& s, int candidates) {
  const int lane = static_cast<int>(threadIdx.x);
  int last = -1, node = 0;
  for (int first = 0; first < candidates; first += 32) {
    const int above = first + lane < candidates ? s.above[first + lane] : kBroken;
    while (const unsigned children = __ballot_sync(kWholeWarp, above == last)) {
      const int lowest = __ffs(static_cast<int>(children)) - 1;
      last = first + lowest;
      ++node;
      if (lane == lowest) s.node_of[last] = node;
    }
  }
  __syncwarp();
}

__global__ void __launch_bounds__(512) choose_tree_kernel(ChooseArgs args) {
  REDRAFTER_DYNAMIC_SHARED(raw);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t b = static_cast<int64_t>(blockIdx.x);
  const int most = args.most;
  ChooseShared s;
  s.above = reinterpret_cast<int*>(raw);
  s.node_of = s.above + most;
  s.source = s.node_of + most;
  s.parent = s.source + most + 1;
  s.count = s.parent + most + 1;

  const int64_t wanted = min(args.counts.at(b), args.candidate_counts.at(b));
  const int candidates = static_cast<int>(max(min(wanted, static_cast<int64_t>(most)),
                                              static_cast<int64_t>(0)));
  for (int i = thread; i < candidates; i += threads) {
    const int64_t above = args.parents.at(b, i);
    s.above[i] = above >= -1 && above < i ? static_cast<int>(above) : kBroken;
  }
  __syncthreads();
  for (int i = thread; i < candidates; i += threads) {
    int up = s.above[i];
    while (up >= 0) up = s.above[up];
    s.node_of[i] = up == kBroken ? -1 : 0;
  }
  __syncthreads();
  if (thread < 32) {
    number_chain(s, candidates);
    const int count = number_the_others(s.node_of, nullptr, candidates);
    if (thread == 0) *s.count = count;
  }
  __syncthreads();
  for (int i = thread; i < candidates; i += threads) {
    const int node = s.node_of[i];
    if (node < 0) continue;
    s.source[node] = i;
    s.parent[node] = s.above[i] < 0 ? 0 : s.node_of[s.above[i]];
  }
  __syncthreads();

  const int count = *s.count;
  for (int node = thread; node <= most; node += threads) {
    const bool drafted = node > 0 && node < count;
    const int i = drafted ? s.source[node] : 0;
    args.out_tokens.at(b, node) = drafted     ? args.tokens.at(b, i)
                                  : node == 0 ? args.root.at(b)
                                              : 0;
    args.out_parents.at(b, node) = drafted ? s.parent[node] : -1;
    args.out_depths.at(b, node) = drafted ? args.depths.at(b, i) : 0;
    args.out_chosen.at(b, node) = drafted ? i : -1;
  }
  write_masks(s.parent, count, most + 1, args.words, args.out_masks, b);
  if (thread == 0) args.out_num_nodes.at(b) = count;
}

}  // namespace redrafter::cuda
