// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// The walk of one tree by one warp: 32 nodes at a time in their order, each lane holding one.
#pragma once

#include <cstdint>

#include "common/walk_args.h"
#include "cuda/device.h"

namespace redrafter::cuda {

constexpr int kWalkWarps = 4;  // requests of one block

__global__ void walk_kernel(WalkArgs args) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWalkWarps + threadIdx.x / 32;
  if (b >= args.batch) return;  // the whole warp
  const int64_t* tokens = args.tokens.row(b);
  const int64_t* parents = args.parents.row(b);
  const int64_t* targets = args.target_tokens.row(b);
  int64_t* path = args.path.row(b);
  const int64_t count = min(args.num_nodes[b], args.columns);
  int64_t at = 0, accepted = 0;
  int64_t wanted = targets[0];
  for (int64_t first = 0; first < count && accepted < args.path_columns; first += 32) {
    const int64_t node = first + lane;
    const bool real = node > 0 && node < count;
    const int64_t parent = real ? parents[node] : -1;
    const int64_t token = real ? tokens[node] : 0;
    const int64_t target = real ? targets[node] : 0;
    // Parents come before their children, so a step never leads back to earlier nodes.
    while (accepted < args.path_columns) {
      const unsigned fit =
          __ballot_sync(kAll, real && node > at && parent == at && token == wanted);
      if (fit == 0) break;
      const int step = __ffs(static_cast<int>(fit)) - 1;
      at = first + step;
      wanted = __shfl_sync(kAll, target, step);
      if (lane == 0) path[accepted] = at;
      ++accepted;
    }
  }
  for (int64_t i = accepted + lane; i < args.path_columns; i += 32) path[i] = -1;
  if (lane == 0) {
    args.num_accepted[b] = accepted;
    args.last_node[b] = at;
    args.next_token[b] = wanted;
  }
}

}  // namespace redrafter::cuda
