// SPDX-License-Identifier: Apache-2.0
// The position of a row's largest value: one pass for the value, one up to where it stands.
#include "argmax_kernel.h"

#include "simd.h"

namespace redrafter {
namespace REDRAFTER_VARIANT {
namespace {

constexpr int kVectors = 4;
constexpr int kBlock = kVectors * kLanes;

struct Float {
  typedef float Element;
  REDRAFTER_INLINE vf vector(const float* from) { return load(from); }
  REDRAFTER_INLINE float one(const float* from) { return *from; }
};
struct BFloat16 {
  typedef uint16_t Element;
  REDRAFTER_INLINE vf vector(const uint16_t* from) { return load_bf16(from); }
  REDRAFTER_INLINE float one(const uint16_t* from) { return bf16_to_float(*from); }
};
struct Half {
  typedef uint16_t Element;
  REDRAFTER_INLINE vf vector(const uint16_t* from) { return load_half(from); }
  REDRAFTER_INLINE float one(const uint16_t* from) { return half_to_float(*from); }
};

// Positions where `found` holds, of which the first is wanted: lanes of blocks, then the rest.
template <class Kind, class Lanes, class One>
REDRAFTER_INLINE int64_t first(const typename Kind::Element* row, int64_t n, Lanes lanes, One one) {
  int64_t at = 0;
  for (; at + kLanes <= n; at += kLanes) {
    const vi hit = lanes(Kind::vector(row + at));
    if (any_lane(hit)) return at + __builtin_ctz(lane_bits(hit));
  }
  for (; at < n; ++at) {
    if (one(Kind::one(row + at))) return at;
  }
  return 0;
}

template <class Kind>
REDRAFTER_INLINE int64_t argmax_of(const typename Kind::Element* row, int64_t n) {
  float best = Kind::one(row);
  bool nan = best != best;
  int64_t at = 0;
  if (n >= kBlock) {
    vf most[kVectors];
    vi nans = {};
    for (int v = 0; v < kVectors; ++v) most[v] = broadcast(best);
    for (; at + kBlock <= n; at += kBlock) {
      for (int v = 0; v < kVectors; ++v) {
        const vf values = Kind::vector(row + at + v * kLanes);
        nans |= values != values;
        most[v] = max(values, most[v]);
      }
    }
    nan = nan || any_lane(nans);
    best = reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
  }
  for (; at < n; ++at) {
    const float value = Kind::one(row + at);
    nan = nan || value != value;
    best = value > best ? value : best;
  }
  if (nan) {
    return first<Kind>(
        row, n, [](vf values) { return (vi)(values != values); },
        [](float value) { return value != value; });
  }
  const vf wanted = broadcast(best);
  return first<Kind>(
      row, n, [wanted](vf values) { return (vi)(values == wanted); },
      [best](float value) { return value == best; });
}

}  // namespace

int64_t argmax(const void* values, int64_t n, FloatKind kind) {
  switch (kind) {
    case FloatKind::kBFloat16:
      return argmax_of<BFloat16>(static_cast<const uint16_t*>(values), n);
    case FloatKind::kHalf:
      return argmax_of<Half>(static_cast<const uint16_t*>(values), n);
    default:
      return argmax_of<Float>(static_cast<const float*>(values), n);
  }
}

}  // namespace REDRAFTER_VARIANT
}  // namespace redrafter
