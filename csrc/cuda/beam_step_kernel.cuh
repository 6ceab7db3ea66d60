// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// One step of the beam search. First every chunk of every row of logits is read once and leaves its
// largest entries and its sum of exponentials; then a block per request makes candidates of them.
// Where the largest logits do not decide (scores so low that float32 is coarse, fewer kept entries
// than beams), the block reads the request's logits again and selects as the definition does.
#pragma once

#include <cstdint>

#include "common/beam_step_args.h"
#include "cuda/device.h"

namespace redrafter::cuda {

// As in drafter/beam_search.py and csrc/cpu/draft_select.cpp, which say why.
constexpr float kFloor = -1e9f;
constexpr float kFiller = -50000.0f;
constexpr float kCoarse = -1000.0f;

constexpr int kPerLane = 16;            // logits that a lane of the scan holds
constexpr int kChunk = 32 * kPerLane;   // logits of a warp of the scan
constexpr int kScanWarps = 4;
constexpr int kMaxKept = 64;    // entries kept of a chunk and of a row
constexpr int kSelectThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

struct BeamStepWork {
  unsigned long long* keys;  // [rows][chunks][kept], largest first; 0 where there is none
  float* sums;               // [rows][chunks][2]: the maximum, the sum of exp(logit - maximum)
  int chunks, kept;
};

__device__ inline float as_float(float x) { return x; }
__device__ inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float as_float(__half x) { return __half2float(x); }

// A logit that can be compared and added.
__device__ inline float finite(float x) {
  if (!(x == x) || x == -INFINITY) return kFloor;
  return x == INFINITY ? -kFloor : x;
}

__device__ inline int64_t logits_of_row(const BeamStepArgs& args, int64_t row) {
  return row / args.rows * args.logits_stride[0] + row % args.rows * args.logits_stride[1];
}

__device__ inline float read_logit(const BeamStepArgs& args, int64_t row, int64_t column) {
  const int64_t at = logits_of_row(args, row) + column;
  if (args.dtype == ScalarType::Float) return finite(static_cast<const float*>(args.logits)[at]);
  if (args.dtype == ScalarType::BFloat16) {
    return finite(as_float(static_cast<const __nv_bfloat16*>(args.logits)[at]));
  }
  return finite(as_float(static_cast<const __half*>(args.logits)[at]));
}

// Ascending keys are ascending logits and, among equal logits, descending columns.
__device__ inline unsigned long long key_of(float logit, unsigned column) {
  const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 and 0 are equal
  const unsigned ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - column);
}
__device__ inline float logit_of(unsigned long long key) {
  const unsigned ordered = static_cast<unsigned>(key >> 32);
  return __uint_as_float(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ inline int column_of(unsigned long long key) {
  return static_cast<int>(0xffffffffu - static_cast<unsigned>(key));
}

// The largest key of a warp.
__device__ inline unsigned long long warp_max(unsigned long long key) {
  const unsigned high = static_cast<unsigned>(key >> 32), low = static_cast<unsigned>(key);
  const unsigned best_high = __reduce_max_sync(kAllLanes, high);
  const unsigned best_low = __reduce_max_sync(kAllLanes, high == best_high ? low : 0);
  return static_cast<unsigned long long>(best_high) << 32 | best_low;
}
__device__ inline float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// A lane's keys, largest first (bitonic; all indices are known to the compiler).
__device__ __forceinline__ void sort_descending(unsigned long long (&keys)[kPerLane]) {
#pragma unroll
  for (int size = 2; size <= kPerLane; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int low = 0; low < kPerLane; ++low) {
        const int high = low ^ stride;
        if (high < low) continue;
        const unsigned long long a = keys[low], b = keys[high];
        const bool swap = (a < b) == ((low & size) == 0);
        keys[low] = swap ? b : a;
        keys[high] = swap ? a : b;
      }
    }
  }
}

// Grid (chunks / kScanWarps, rows): a warp writes what is kept of its chunk, largest first. Each
// lane sorts its keys in registers; then the largest of the lanes' first ones is taken, again and
// again.
template <class T>
__global__ void __launch_bounds__(32 * kScanWarps) beam_step_scan(const BeamStepArgs args,
                                                                  const BeamStepWork work) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int chunk = static_cast<int>(blockIdx.x) * kScanWarps + static_cast<int>(threadIdx.x) / 32;
  if (chunk >= work.chunks) return;  // the whole warp
  const int64_t row = blockIdx.y;
  const T* logits = static_cast<const T*>(args.logits) + logits_of_row(args, row);
  const auto vocab = static_cast<unsigned>(args.vocab);
  const unsigned first = static_cast<unsigned>(chunk) * kChunk + lane;
  unsigned long long keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const unsigned column = first + i * 32;
    keys[i] = column < vocab ? key_of(finite(as_float(logits[column])), column) : 0;
  }
  sort_descending(keys);
  const float largest = logit_of(warp_max(keys[0]));
  // Small terms are less exact than expf's, by no more than they weigh.
  float sum = 0.0f;
  if (args.top_k == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float term = exp2f((logit_of(keys[i]) - largest) * 1.44269504f);
      sum += keys[i] != 0 ? term : 0.0f;
    }
  }
  sum = warp_sum(sum);
  const int64_t at = row * work.chunks + chunk;
  for (int i = 0; i < work.kept; ++i) {
    const unsigned long long best = warp_max(keys[0]);
    if (lane == 0) work.keys[at * work.kept + i] = best;
    if (keys[0] != best) continue;
#pragma unroll
    for (int j = 0; j + 1 < kPerLane; ++j) keys[j] = keys[j + 1];
    keys[kPerLane - 1] = 0;
  }
  if (lane == 0) {
    work.sums[at * 2] = largest;
    work.sums[at * 2 + 1] = sum;
  }
}

// What is known of one row of a request.
struct RowFacts {
  float max, log_sum;
  // The least logit that the top k leaves in, less the maximum: logits so large that they differ by
  // less than the difference rounds to are ties with it.
  float kth;
};

struct Pick {
  float score;
  int parent, column;
};
__device__ inline bool better(const Pick& a, const Pick& b) {
  if (a.score != b.score) return a.score > b.score;
  if (a.parent != b.parent) return a.parent < b.parent;
  return a.column < b.column;
}
__device__ inline float log_probability(const RowFacts& row, float logit) {
  const float shifted = logit - row.max;
  return fmaxf((shifted < row.kth ? kFiller : shifted) - row.log_sum, kFloor);
}

__device__ inline double warp_sum(double x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}
// One warp: the row's kept entries into list[0 .. kept), largest first, and its facts. False if the
// top k's ties may reach beyond what the chunks kept.
__device__ inline bool merge_row(const BeamStepArgs& args, const BeamStepWork& work, int64_t row,
                                 unsigned long long* list, RowFacts* facts) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned long long* keys = work.keys + row * work.chunks * work.kept;
  // The largest key of this lane's chunks that comes after `taken`. Chunks are sorted.
  const auto next_of_lane = [&](unsigned long long taken) {
    unsigned long long best = 0;
    for (int chunk = lane; chunk < work.chunks; chunk += 32) {
      const unsigned long long* sorted = keys + static_cast<int64_t>(chunk) * work.kept;
      int at = 0;
      while (at < work.kept && sorted[at] >= taken) ++at;
      if (at < work.kept && sorted[at] > best) best = sorted[at];
    }
    return best;
  };
  unsigned long long mine = next_of_lane(~0ull);
  for (int i = 0; i < work.kept; ++i) {
    const unsigned long long best = warp_max(mine);
    if (lane == 0) list[i] = best;
    if (best != 0 && mine == best) mine = next_of_lane(best);
  }
  __syncwarp();
  facts->max = logit_of(list[0]);
  double sum = 0.0;
  bool known = true;
  if (args.top_k == 0) {
    const float* sums = work.sums + row * work.chunks * 2;
    for (int chunk = lane; chunk < work.chunks; chunk += 32) {
      sum += static_cast<double>(sums[chunk * 2 + 1]) *
             exp(static_cast<double>(sums[chunk * 2] - facts->max));
    }
    facts->kth = -INFINITY;
  } else {
    const int64_t k = min(args.top_k, args.vocab);
    facts->kth = logit_of(list[k - 1]) - facts->max;
    for (int i = lane; i < work.kept; i += 32) {
      if (list[i] != 0 && logit_of(list[i]) - facts->max >= facts->kth) {
        sum += exp(static_cast<double>(logit_of(list[i]) - facts->max));
      }
    }
    // The list may end among equals of the k-th.
    const unsigned long long end = list[work.kept - 1];
    known = work.kept >= args.vocab || end == 0 || logit_of(end) - facts->max < facts->kth;
  }
  facts->log_sum = static_cast<float>(log(warp_sum(sum)));
  return known;
}

// ---- by definition: for requests that the kept entries do not decide -----------------------------

template <class T, class Better>
__device__ inline T block_best(T mine, T* shared, Better&& is_better) {
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = mine;
  __syncthreads();
  for (int half = kSelectThreads / 2; half > 0; half /= 2) {
    if (thread < half && is_better(shared[thread + half], shared[thread])) {
      shared[thread] = shared[thread + half];
    }
    __syncthreads();
  }
  const T best = shared[0];
  __syncthreads();
  return best;
}

__device__ inline void facts_by_definition(const BeamStepArgs& args, int64_t row, void* shared,
                                           RowFacts* facts) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* keys = static_cast<unsigned long long*>(shared);
  const auto larger = [](unsigned long long a, unsigned long long b) { return a > b; };
  const int64_t k = args.top_k > 0 ? min(args.top_k, args.vocab) : 1;
  unsigned long long last = ~0ull;
  float max = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    unsigned long long best = 0;
    for (int64_t column = thread; column < args.vocab; column += kSelectThreads) {
      const unsigned long long key =
          key_of(read_logit(args, row, column), static_cast<unsigned>(column));
      if (key < last && key > best) best = key;
    }
    last = block_best(best, keys, larger);
    if (i == 0) max = logit_of(last);
  }
  const float kth = args.top_k > 0 ? logit_of(last) - max : -INFINITY;
  double sum = 0.0;
  for (int64_t column = thread; column < args.vocab; column += kSelectThreads) {
    const float x = read_logit(args, row, column) - max;
    sum += exp(static_cast<double>(x < kth ? kFiller : x));
  }
  auto* sums = static_cast<double*>(shared);
  sums[thread] = sum;
  __syncthreads();
  for (int half = kSelectThreads / 2; half > 0; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    __syncthreads();
  }
  *facts = {max, static_cast<float>(log(sums[0])), kth};
  __syncthreads();
}

__device__ inline void select_by_definition(const BeamStepArgs& args, int64_t b, RowFacts* facts,
                                            void* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const int width = static_cast<int>(args.width), rows = static_cast<int>(args.rows);
  for (int row = 0; row < rows; ++row) {
    RowFacts found;
    facts_by_definition(args, b * rows + row, shared, &found);
    if (thread == 0) facts[row] = found;
    __syncthreads();
  }
  Pick last = {INFINITY, -1, -1};
  for (int w = 0; w < width; ++w) {
    Pick best = {-INFINITY, width, 0};
    for (int parent = 0; parent < width; ++parent) {
      const int row = rows == 1 ? 0 : parent;
      const float score = args.beam_score(b, parent);
      for (int64_t column = thread; column < args.vocab; column += kSelectThreads) {
        const float logit = read_logit(args, b * rows + row, column);
        const Pick pick = {score + log_probability(facts[row], logit), parent,
                           static_cast<int>(column)};
        if (better(last, pick) && better(pick, best)) best = pick;
      }
    }
    last = block_best(best, static_cast<Pick*>(shared), better);
    if (thread == 0) args.write(b, w, last.column, last.parent, last.score);
  }
}

// ---- the W best of a request ---------------------------------------------------------------------

inline std::size_t select_shared_bytes(int64_t rows, int64_t width, int64_t kept) {
  const std::size_t lists = rows * kept * (sizeof(unsigned long long) + sizeof(Pick));
  const std::size_t scratch = kSelectThreads * sizeof(Pick);
  return lists + rows * (sizeof(RowFacts) + 2 * sizeof(int)) + scratch +
         static_cast<std::size_t>(width) * sizeof(int) + 64;
}

// Grid (requests).
// Without the 1 ptxas spills registers to fit more blocks.
__global__ void __launch_bounds__(kSelectThreads, 1) beam_step_select(const BeamStepArgs args,
                                                                      const BeamStepWork work) {
  REDRAFTER_DYNAMIC_SHARED(raw);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t b = blockIdx.x;
  const int rows = static_cast<int>(args.rows), width = static_cast<int>(args.width);
  auto* lists = reinterpret_cast<unsigned long long*>(raw);       // [rows][kept]
  auto* scratch = lists + rows * work.kept;                       // kSelectThreads picks
  auto* picks = reinterpret_cast<Pick*>(scratch + kSelectThreads * 3 / 2);  // [rows][kept]
  auto* facts = reinterpret_cast<RowFacts*>(picks + rows * work.kept);
  int* counts = reinterpret_cast<int*>(facts + rows);             // picks of a row
  int* decided = counts + rows;
  int* parents = decided + rows;                                  // [width]

  for (int row = warp; row < rows; row += kSelectThreads / 32) {
    unsigned long long* list = lists + row * work.kept;
    RowFacts found;
    const bool known = merge_row(args, work, b * rows + row, list, &found);
    if (lane == 0) {
      const float score = args.beam_score(b, row);
      Pick* mine = picks + row * work.kept;
      int count = 0;
      bool good = known;
      for (int i = 0; i < work.kept && count < width && list[i] != 0 && good; ++i) {
        const float logit = logit_of(list[i]);
        if (logit - found.max < found.kth) break;
        const Pick pick = {score + log_probability(found, logit), row, column_of(list[i])};
        good = pick.score >= kCoarse;
        // Different logits may have one score: then the lowest column comes first.
        int at = count++;
        for (; at > 0 && better(pick, mine[at - 1]); --at) mine[at] = mine[at - 1];
        mine[at] = pick;
      }
      facts[row] = found;
      counts[row] = count;
      decided[row] = good && count == width;
    }
  }
  __syncthreads();

  // One thread takes the W best of the rows that are decided: W times the best of the rows' heads.
  int* by_definition = reinterpret_cast<int*>(scratch);
  if (thread == 0) {
    Pick worst = {-INFINITY, width, 0};
    int taken = 0;
    int* next = parents;  // [rows] here
    for (int row = 0; row < rows; ++row) next[row] = 0;
    for (; taken < width; ++taken) {
      int from = -1;
      for (int row = 0; row < rows; ++row) {
        if (!decided[row] || next[row] == counts[row]) continue;
        if (from < 0 || better(picks[row * work.kept + next[row]],
                               picks[from * work.kept + next[from]])) {
          from = row;
        }
      }
      if (from < 0) break;
      worst = picks[from * work.kept + next[from]++];
      args.write(b, taken, worst.column, worst.parent, worst.score);
    }
    // May a row that is not decided, or a copy of the only one, still have something to say?
    int undecided = taken < width;
    for (int row = 0; row < width; ++row) {
      const int source = rows == 1 ? 0 : row;
      if (rows > 1 && decided[row]) continue;
      if (rows == 1 && row == 0 && decided[0]) continue;
      const float best = args.beam_score(b, row) + log_probability(facts[source],
                                                                   facts[source].max);
      undecided |= best > worst.score || (best == worst.score && row < worst.parent);
    }
    *by_definition = undecided;
  }
  __syncthreads();
  const bool again = *by_definition != 0;
  __syncthreads();
  if (again) select_by_definition(args, b, facts, scratch);
}

// Grid (width, requests): each kept beam's state, that of its parent.
__global__ void __launch_bounds__(256) beam_step_states(const BeamStepArgs args) {
  const int64_t w = blockIdx.x, b = blockIdx.y;
  const int64_t parent = args.parents[b * args.parents_stride[0] + w * args.parents_stride[1]];
  const char* from = args.state_row(b, parent);
  char* to = args.out_state_row(b, w);
  const auto aligned = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) |
                       static_cast<uintptr_t>(args.state_bytes);
  if (aligned % 16 == 0) {
    for (int64_t i = threadIdx.x; i < args.state_bytes / 16; i += blockDim.x) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
    for (int64_t i = threadIdx.x; i < args.state_bytes; i += blockDim.x) to[i] = from[i];
  }
}

}  // namespace redrafter::cuda
