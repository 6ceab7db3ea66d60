// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// One request's suffix lookup (the rules of vllm_redrafter/lookup/suffix.py) by one block.
//
// The text may be host memory behind PCIe, so it is read from its end in tiles, with many loads in
// flight, and no further than the search needs. The rest works on at most kMaxOccurrences.
#pragma once

#include <cstdint>

#include "common/suffix_lookup_args.h"
#include "cuda/device.h"

namespace redrafter::cuda {

constexpr int kMaxOccurrences = 64;  // two a lane: ops/suffix_lookup.py's MAX_CUDA_WINDOW
constexpr int kLookupThreads = 512;
constexpr int kLookupWarps = kLookupThreads / 32;
constexpr int kLoads = 8;  // tokens of a tile that one thread holds
constexpr int kTile = kLookupThreads * kLoads;
constexpr int kWords = kTile / 32;  // ballots of a tile
constexpr int kWordsPerLane = kWords / 32;
constexpr unsigned kEveryLane = 0xffffffffu;
static_assert(kWords % 32 == 0, "a warp collects the ballots of a tile");

// A request's text, counted from its start.
struct Text {
  const int32_t* first;
  int64_t stride;
  int64_t length;  // 0 for a request that cannot be
  __device__ int32_t at(int64_t i) const { return first[i * stride]; }
};

// The block's shared memory. Occurrences are numbered from the most recent one.
struct LookupShared {
  unsigned hits[kWords];
  int64_t position[kMaxOccurrences];
  int64_t matched[kMaxOccurrences];
  int chosen[kMaxOccurrences];  // the occurrence that each chain follows
  int count;                    // occurrences
};

__device__ inline Text text_of(const SuffixLookupArgs& args, int64_t b) {
  const int64_t slot = args.slots[b], start = args.starts[b], end = args.ends[b];
  const bool good = slot >= 0 && slot < args.rows && start >= 0 && start <= end &&
                    end <= args.columns;
  if (!good) return {args.text, 0, 0};
  return {args.text + slot * args.text_stride[0] + start * args.text_stride[1],
          args.text_stride[1], end - start};
}

// By one warp: bit `lane` of s.hits[word] stands for position `end - 1 - (word * 32 + lane)`.
__device__ inline void collect(LookupShared& s, int64_t end, int lane, int window) {
  unsigned words[kWordsPerLane];
  int mine = 0;
  for (int i = 0; i < kWordsPerLane; ++i) {
    words[i] = s.hits[lane * kWordsPerLane + i];
    mine += __popc(words[i]);
  }
  int upto = mine;  // of all lanes up to this one
  for (int by = 1; by < 32; by *= 2) {
    const int below = __shfl_up_sync(kEveryLane, upto, static_cast<unsigned>(by));
    if (lane >= by) upto += below;
  }
  const int total = __shfl_sync(kEveryLane, upto, 31);
  const int before = s.count;
  int at = before + upto - mine;
  for (int i = 0; i < kWordsPerLane; ++i) {
    for (unsigned bits = words[i]; bits != 0 && at < window; bits &= bits - 1, ++at) {
      const int bit = __ffs(static_cast<int>(bits)) - 1;
      s.position[at] = end - 1 - ((lane * kWordsPerLane + i) * 32 + bit);
    }
  }
  __syncwarp();  // all lanes have read the count
  if (lane == 0) s.count = min(before + total, window);
}

// The `window` most recent occurrences of the last token before the end.
__device__ inline void find_last(const Text& text, LookupShared& s, int window) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  if (thread == 0) s.count = 0;
  if (text.length < 2) return;
  const int32_t wanted = text.at(text.length - 1);
  for (int64_t end = text.length - 1; end > 0; end -= kTile) {
    int32_t token[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t at = end - 1 - (i * kLookupThreads + thread);
      token[i] = at >= 0 ? text.at(at) : ~wanted;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const unsigned equal = __ballot_sync(kEveryLane, token[i] == wanted);
      if (lane == 0) s.hits[i * kLookupWarps + warp] = equal;
    }
    __syncthreads();
    if (warp == 0) collect(s, end, lane, window);
    __syncthreads();
    if (s.count == window) return;
  }
}

// By one warp: how many tokens up to `at` agree with those up to the end of the text.
__device__ inline int64_t matched_tokens(const Text& text, int64_t at, int64_t longest, int lane) {
  const int64_t last = text.length - 1, most = min(longest, at + 1);
  for (int64_t first = 1;; first += 32) {
    const int64_t i = first + lane;
    const bool same = i < most && text.at(at - i) == text.at(last - i);
    const unsigned differ = __ballot_sync(kEveryLane, !same);
    if (differ != 0) return first + __ffs(static_cast<int>(differ)) - 1;
  }
}

// log(CERTAINTY * (1 - MISS ** m)), in single precision but exact to its last digits.
__device__ inline float log_certainty(int64_t m) {
  constexpr float kLogCertainty = -0.020202707317519466f, kLogMiss = -0.2876820724517809f;
  return kLogCertainty + log1pf(-expf(static_cast<float>(m) * kLogMiss));
}

// Double precision for the difference; where chains part, and only there.
__device__ inline float log_share(int same, int of) {
  return static_cast<float>(log(static_cast<double>(same)) - log(static_cast<double>(of)));
}

// By one warp: the scores of chain c of a request, from the tokens of its `kept` chains. Lanes are
// chains (two each) while they are compared, then depths.
__device__ inline void write_scores(const SuffixLookupArgs& args, const int64_t* tokens, int kept,
                                    int c, int64_t matched, int lane, float* scores) {
  const int64_t depth = args.depth;
  const bool two = kept > 32;
  bool low = lane < kept, high = lane + 32 < kept;  // equal to chain c so far
  int before = kept;
  float total = 0.0f;  // of the depths done
  for (int64_t first = 0; first < depth; first += 32) {
    int of = 1, same = 1;  // at this lane's depth
    const int here = static_cast<int>(min(depth - first, static_cast<int64_t>(32)));
    for (int i = 0; i < here; ++i) {
      const int64_t token = tokens[c * depth + first + i];
      low = low && tokens[lane * depth + first + i] == token;
      int now = __popc(__ballot_sync(kEveryLane, low));
      if (two) {
        high = high && tokens[(lane + 32) * depth + first + i] == token;
        now += __popc(__ballot_sync(kEveryLane, high));
      }
      if (lane == i) {
        of = before;
        same = now;
      }
      before = now;
    }
    float score = log_certainty(matched + first + lane);
    if (same < of) score += log_share(same, of);
    for (int by = 1; by < 32; by *= 2) {
      const float below = __shfl_up_sync(kEveryLane, score, static_cast<unsigned>(by));
      if (lane >= by) score += below;
    }
    score += total;
    if (lane < here) scores[c * depth + first + lane] = score;
    total = __shfl_sync(kEveryLane, score, 31);
  }
}

__global__ void __launch_bounds__(kLookupThreads, 1) suffix_lookup_kernel(SuffixLookupArgs args) {
  __shared__ LookupShared s;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t b = static_cast<int64_t>(blockIdx.x);
  const int64_t chains = args.chains, depth = args.depth;
  int64_t* tokens = args.tokens + b * chains * depth;
  int64_t* matched = args.matched + b * chains;
  float* scores = args.scores + b * chains * depth;
  const Text text = text_of(args, b);
  find_last(text, s, static_cast<int>(args.window));
  __syncthreads();

  const int count = s.count;
  const int kept = static_cast<int>(min(static_cast<int64_t>(count), chains));
  for (int i = warp; i < count; i += kLookupWarps) {
    const int64_t found = matched_tokens(text, s.position[i], args.longest, lane);
    if (lane == 0) s.matched[i] = found;
  }
  __syncthreads();
  if (thread < count) {
    int rank = 0;
    for (int i = 0; i < count; ++i) {
      rank += s.matched[i] > s.matched[thread] ||
              (s.matched[i] == s.matched[thread] && i < thread);
    }
    s.chosen[rank] = thread;
  }
  __syncthreads();

  for (int64_t c = warp; c < chains; c += kLookupWarps) {
    const bool real = c < kept;
    const int64_t at = real ? s.position[s.chosen[c]] : 0;
    // 32 bits, as `ends` has: a 64 bit remainder would be a function call.
    const unsigned period = real ? static_cast<unsigned>(text.length - 1 - at) : 1;
    for (int64_t d = lane; d < depth; d += 32) {
      tokens[c * depth + d] = real ? text.at(at + 1 + static_cast<unsigned>(d) % period) : 0;
      if (!real) scores[c * depth + d] = kNoScore;
    }
    if (lane == 0) matched[c] = real ? s.matched[s.chosen[c]] : 0;
  }
  __syncthreads();  // the scores are made from the tokens
  for (int c = warp; c < kept; c += kLookupWarps) {
    write_scores(args, tokens, kept, c, s.matched[s.chosen[c]], lane, scores);
  }
}

}  // namespace redrafter::cuda
