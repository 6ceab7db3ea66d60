// SPDX-License-Identifier: Apache-2.0
// The beam step of the draft operator: from what the threads kept of each row's logits to the W
// best continuations of a request.
#pragma once

#include <cstdint>
#include <vector>

#include "draft_kernel.h"

namespace redrafter {

struct Candidate {
  float score;  // beam score + log-probability, in float32
  int32_t parent;
  int32_t row;  // of the drafter's head
};

// Computes all logits of one row again, for the rare row whose kept entries do not decide it.
class LogitSource {
 public:
  virtual ~LogitSource() = default;
  virtual void logits(int64_t row, float* out) const = 0;
};

// What the head's scan left behind for all rows of one step.
struct ScanResult {
  const TopHeap* heaps;  // [threads][heap_rows]
  const int64_t* heaps_step;  // [threads]: older ones mean nothing in this step
  int64_t step;
  int threads;
  int64_t heap_rows;
  const float* chunk_max;  // [chunks][rows]; with top_k the heaps say it all
  const float* chunk_sum;
  int64_t chunks;
  int64_t rows;
  int64_t vocab;
  int top_k;
};

// The `width` best candidates of one request, best first; ties go to the lowest parent, then to
// the lowest row of the head.
//
// `first_row` is the request's first row in the scan. `copies` says that it is also its only one:
// the first step, where beams 1 and up are copies of beam 0 with a filler's score. `scores` are the
// beams' scores, `width` of them.
std::vector<Candidate> select_candidates(const ScanResult& scan, const LogitSource& source,
                                         int64_t first_row, bool copies, const float* scores,
                                         int width);

}  // namespace redrafter
