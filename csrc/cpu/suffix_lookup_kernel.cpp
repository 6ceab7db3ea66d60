// SPDX-License-Identifier: Apache-2.0
// The part of the suffix lookup that touches the whole text: where a token stands, backwards.
#include "suffix_lookup_kernel.h"

#include "simd.h"

namespace redrafter {
namespace REDRAFTER_VARIANT {
namespace {

constexpr int kVectors = 4;  // compared before the first branch: most blocks hold nothing
constexpr int kBlock = kVectors * kLanes;

// Both return true when no more are asked for.
REDRAFTER_INLINE bool add(FindLastArgs& args, int64_t position) {
  args.found[args.count++] = position;
  return args.count == args.most;
}

REDRAFTER_INLINE bool add_lanes(FindLastArgs& args, int64_t first, vi equal) {
  for (uint32_t bits = lane_bits(equal); bits != 0;) {
    const int lane = 31 - __builtin_clz(bits);
    if (add(args, first + lane)) return true;
    bits ^= (uint32_t)1 << lane;
  }
  return false;
}

}  // namespace

void find_last(FindLastArgs& args) {
  const vi wanted = vi{} + args.wanted;
  int64_t end = args.length;
  args.count = 0;
  for (; end >= kBlock; end -= kBlock) {
    const int32_t* block = args.row + end - kBlock;
    vi equal[kVectors], any = {};
    for (int v = 0; v < kVectors; ++v) {
      equal[v] = load_as<vi>(block + v * kLanes) == wanted;
      any |= equal[v];
    }
    if (!any_lane(any)) continue;
    for (int v = kVectors; v-- > 0;) {
      if (add_lanes(args, end - kBlock + v * kLanes, equal[v])) return;
    }
  }
  while (end-- > 0) {
    if (args.row[end] == args.wanted && add(args, end)) return;
  }
}

}  // namespace REDRAFTER_VARIANT
}  // namespace redrafter
