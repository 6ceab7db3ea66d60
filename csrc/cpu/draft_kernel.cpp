// SPDX-License-Identifier: Apache-2.0
#include "draft_kernel.h"

#include <math.h>

#include "simd.h"

namespace redrafter {
namespace REDRAFTER_VARIANT {
namespace {

// ---- products ----------------------------------------------------------------------------------

// How a vector of one group's weights meets that group's input.
#ifdef REDRAFTER_HAS_BF16_DOT
struct Bf16Weights {
  static constexpr int64_t kInputBytes = 4;  // per group: a pair
  using Input = vu;
  REDRAFTER_INLINE Input input(const char* at) { return broadcast_u(load_as<uint32_t>(at)); }
  REDRAFTER_INLINE vf step(vf acc, vf weights, Input input) {
    return dot_bf16(acc, bits_as<vu>(weights), input);
  }
};
#else
struct Bf16Weights {
  static constexpr int64_t kInputBytes = 8;  // per group: two floats
  struct Input {
    vf first, second;
  };
  REDRAFTER_INLINE Input input(const char* at) {
    return {broadcast(load_as<float>(at)), broadcast(load_as<float>(at + 4))};
  }
  REDRAFTER_INLINE vf step(vf acc, vf weights, const Input& input) {
    const vu pair = bits_as<vu>(weights);
    acc = fmadd(bits_as<vf>(pair << 16), input.first, acc);
    return fmadd(bits_as<vf>(pair & 0xffff0000u), input.second, acc);
  }
};
#endif

struct FloatWeights {
  static constexpr int64_t kInputBytes = 4;
  using Input = vf;
  REDRAFTER_INLINE Input input(const char* at) { return broadcast(load_as<float>(at)); }
  REDRAFTER_INLINE vf step(vf acc, vf weights, Input input) { return fmadd(weights, input, acc); }
};

// Two vectors of every panel at a time: with the rows below, as many sums as registers can hold.
constexpr int kVectors = 2;
constexpr int kPanelVectors = kPanel / kLanes;
#if defined(__AVX512F__)
constexpr int kMaxRows = 8;
#else
constexpr int kMaxRows = 4;
#endif
// Few rows give few independent sums, too few to hide an addition's latency: then take two panels.
constexpr int kMaxRowsOfPairs = kMaxRows / 2 - 1;

template <class Weights, int kRows, int kPanels>
void tile(const ProductArgs& args, int64_t panel, int vector, int64_t row, float* out) {
  vf acc[kRows][kPanels][kVectors] = {};
  for (int s = 0; s < args.segment_count; ++s) {
    const Segment& segment = args.segments[s];
    const int64_t panel_bytes = segment.groups * kGroupBytes;
    const char* weights = static_cast<const char*>(segment.weights) + panel * panel_bytes +
                          vector * static_cast<int64_t>(sizeof(vf));
    const char* input[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      input[r] = static_cast<const char*>(segment.input) + (row + r) * segment.input_stride;
    }
    for (int64_t g = 0; g < segment.groups; ++g) {
      vf w[kPanels][kVectors];
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          w[p][v] = load_as<vf>(weights + p * panel_bytes + g * kGroupBytes + v * sizeof(vf));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto x = Weights::input(input[r] + g * Weights::kInputBytes);
#pragma GCC unroll 8
        for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) acc[r][p][v] = Weights::step(acc[r][p][v], w[p][v], x);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        store(out + r * args.out_stride + p * kPanel + v * kLanes, acc[r][p][v]);
      }
    }
  }
}

template <class Weights, int kPanels>
void tile_of(int64_t rows, const ProductArgs& args, int64_t panel, int vector, int64_t row,
             float* out) {
  switch (rows) {
    case 1: return tile<Weights, 1, kPanels>(args, panel, vector, row, out);
    case 2:
      if constexpr (kPanels == 1 || kMaxRowsOfPairs >= 2)
        return tile<Weights, 2, kPanels>(args, panel, vector, row, out);
      break;
    case 3:
      if constexpr (kPanels == 1 || kMaxRowsOfPairs >= 3)
        return tile<Weights, 3, kPanels>(args, panel, vector, row, out);
      break;
    case 4:
      if constexpr (kPanels == 1) return tile<Weights, 4, 1>(args, panel, vector, row, out);
      break;
#if defined(__AVX512F__)
    case 5:
      if constexpr (kPanels == 1) return tile<Weights, 5, 1>(args, panel, vector, row, out);
      break;
    case 6:
      if constexpr (kPanels == 1) return tile<Weights, 6, 1>(args, panel, vector, row, out);
      break;
    case 7:
      if constexpr (kPanels == 1) return tile<Weights, 7, 1>(args, panel, vector, row, out);
      break;
    case 8:
      if constexpr (kPanels == 1) return tile<Weights, 8, 1>(args, panel, vector, row, out);
      break;
#endif
  }
}

template <class Weights>
void product(const ProductArgs& args) {
  const int64_t tiles = (args.rows + kMaxRows - 1) / kMaxRows;
  for (int64_t p = 0; p < args.panels;) {
    const bool pair = args.rows <= kMaxRowsOfPairs && p + 2 <= args.panels;
    for (int64_t t = 0; t < tiles; ++t) {
      // Tiles of nearly equal size: eight rows and one would waste most of the second pass.
      const int64_t row = args.rows * t / tiles;
      const int64_t rows = args.rows * (t + 1) / tiles - row;
      for (int v = 0; v < kPanelVectors; v += kVectors) {
        float* out = args.out + row * args.out_stride + p * kPanel + v * kLanes;
        if (pair) {
          tile_of<Weights, 2>(rows, args, args.first_panel + p, v, row, out);
        } else {
          tile_of<Weights, 1>(rows, args, args.first_panel + p, v, row, out);
        }
      }
    }
    p += pair ? 2 : 1;
  }
}

// ---- element-wise ------------------------------------------------------------------------------

REDRAFTER_INLINE void store_operand(void* row, int64_t column, vf value, bool bf16) {
#ifdef REDRAFTER_HAS_BF16_DOT
  if (bf16) return store_bf16(static_cast<uint16_t*>(row) + column, value);
#else
  if (bf16) {
    uint16_t rounded[kLanes];
    store_bf16(rounded, value);
    value = load_bf16(rounded);
  }
#endif
  store(static_cast<float*>(row) + column, value);
}

REDRAFTER_INLINE vf finish_vector(vf sums, vf bias, vf residual, bool activate) {
  vf y = sums + bias;
  if (activate) y = silu(y);
  return y + residual;
}

REDRAFTER_INLINE vf load_some(const float* source, int64_t count) {
  float lanes[kLanes] = {};
  if (source) memcpy(lanes, source, count * sizeof(float));
  return load(lanes);
}

// ---- the largest logits ------------------------------------------------------------------------

// Ascending keys are ascending logits and, among equal logits, descending indices.
REDRAFTER_INLINE uint64_t make_key(float logit, int64_t index) {
  const uint32_t u = bits_as<uint32_t>(logit + 0.0f);  // -0 and 0 are equal
  const uint32_t ordered = u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
  return (static_cast<uint64_t>(ordered) << 32) | (0xffffffffu - static_cast<uint32_t>(index));
}

REDRAFTER_INLINE float logit_of(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return bits_as<float>(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu));
}

void sift_down(uint64_t* keys, int size, int at) {
  const uint64_t key = keys[at];
  for (int child; (child = 2 * at + 1) < size; at = child) {
    child += child + 1 < size && keys[child + 1] < keys[child];
    if (key <= keys[child]) break;
    keys[at] = keys[child];
  }
  keys[at] = key;
}

void offer(TopHeap& heap, float logit, int64_t index) {
  if (heap.size < heap.capacity) {
    heap.keys[heap.size++] = make_key(logit, index);
    if (heap.size < heap.capacity) return;
    for (int i = heap.size / 2 - 1; i >= 0; --i) sift_down(heap.keys, heap.size, i);
    heap.least = logit_of(heap.keys[0]);
    return;
  }
  const uint64_t key = make_key(logit, index);
  if (key < heap.keys[0]) {
    heap.ties += logit == heap.least;
    return;
  }
  heap.keys[0] = key;
  sift_down(heap.keys, heap.size, 0);
  const float least = logit_of(heap.keys[0]);
  heap.ties = least == heap.least ? heap.ties + 1 : 0;
  heap.least = least;
}

}  // namespace

void draft_product_bf16(const ProductArgs& args) { product<Bf16Weights>(args); }
void draft_product_float(const ProductArgs& args) { product<FloatWeights>(args); }

int64_t draft_operand_bytes(bool bf16) { return bf16 ? Bf16Weights::kInputBytes / 2 : 4; }

void draft_finish(const FinishArgs& args, bool bf16) {
  int64_t i = 0;
  for (; i + kLanes <= args.count; i += kLanes) {
    const vf residual = args.residual ? load(args.residual + i) : zero();
    const vf y = finish_vector(load(args.sums + i), load(args.bias + i), residual, args.silu);
    if (args.out) store(args.out + i, y);
    if (args.operand) store_operand(args.operand, args.column + i, y, bf16);
  }
  const int64_t left = args.count - i;
  if (left == 0) return;
  const vf residual = load_some(args.residual ? args.residual + i : nullptr, left);
  const vf y = finish_vector(load_some(args.sums + i, left), load_some(args.bias + i, left),
                             residual, args.silu);
  if (args.out) {
    float lanes[kLanes];
    store(lanes, y);
    memcpy(args.out + i, lanes, left * sizeof(float));
  }
  if (args.operand) {
    float lanes[kLanes];
    store_operand(lanes, 0, y, bf16);
    const int64_t bytes = draft_operand_bytes(bf16);
    memcpy(static_cast<char*>(args.operand) + (args.column + i) * bytes, lanes, left * bytes);
  }
}

void draft_read(const void* source, Source type, int64_t count, float* out) {
  const auto* halves = static_cast<const uint16_t*>(source);
  if (type == Source::kFloat) {
    memcpy(out, source, count * sizeof(float));
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(out + i, type == Source::kBf16 ? load_bf16(halves + i) : load_half(halves + i));
  }
  for (; i < count; ++i) {
    out[i] = type == Source::kBf16 ? bf16_to_float(halves[i]) : half_to_float(halves[i]);
  }
}

void draft_scan(const ScanArgs& args) {
  // A whole number of vectors; what is beyond the count can neither win nor add to the sum.
  const int64_t padded = (args.count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = args.count; i < padded; ++i) args.logits[i] = -INFINITY;
  vf largest = broadcast(-INFINITY);
  vi odd = vi{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const vf x = load(args.logits + i);
    odd |= (x - x) != 0.0f;  // NaN and infinities
    largest = max(largest, x);
  }
  if (lane_bits(odd)) {
    for (int64_t i = 0; i < args.count; ++i) {
      const float x = args.logits[i];
      if (x != x || x == -INFINITY) args.logits[i] = kFloor;
      if (x == INFINITY) args.logits[i] = -kFloor;
    }
    largest = broadcast(-INFINITY);
    for (int64_t i = 0; i < padded; i += kLanes) largest = max(largest, load(args.logits + i));
  }
  const float top = reduce_max(largest);
  *args.max = top;

  if (args.want_sum) {
    vf sum = zero();
    for (int64_t i = 0; i < padded; i += kLanes) sum = sum + exp(load(args.logits + i) - top);
    *args.sum = reduce_add(sum);
  }

  TopHeap& heap = *args.heap;
  int64_t i = 0;
  while (i < args.count && heap.size < heap.capacity) {
    offer(heap, args.logits[i], args.first_index + i);
    ++i;
  }
  if (i >= args.count || top < heap.least) return;
  // From the last whole vector on; entries already offered are masked away.
  uint32_t fresh = ~0u << (i % kLanes);
  for (i -= i % kLanes; i < args.count; i += kLanes, fresh = ~0u) {
    const vf x = load(args.logits + i);
    uint32_t bits = lane_bits(x >= heap.least) & fresh;
    for (; bits; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      if (i + lane < args.count) offer(heap, args.logits[i + lane], args.first_index + i + lane);
    }
  }
}

}  // namespace REDRAFTER_VARIANT
}  // namespace redrafter
