// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the draft operator, compiled once per instruction set (see dispatch.h).
//
// Packed weights. A linear layer of N outputs and K inputs is stored in panels of 32 outputs. A
// panel is a run of groups, one per 4 bytes of input: two inputs of bf16 weights or one of fp32
// weights. A group holds those inputs' weights for the 32 outputs side by side, so it is always 128
// bytes, and a panel is read front to back, once, by whoever computes its 32 outputs. N and K are
// padded with zeros. All variants read this one layout.
//
// Operands. The inputs of a product, one row per beam, in the form that the variant multiplies:
// pairs of bf16 where it has a bf16 dot product, floats elsewhere (rounded to bf16 if the weights
// are, so that variants differ by no more than the order of a sum).
//
// The order of each sum depends on K alone: not on the batch, the threads or the panel.
#pragma once

#include <stdint.h>

#include "dispatch.h"

namespace redrafter {

constexpr int64_t kPanel = 32;
constexpr int64_t kGroupBytes = kPanel * 4;
// A thread computes and scans this many panels of logits at a time, so they stay in its cache.
constexpr int64_t kChunkPanels = 8;
constexpr int64_t kChunk = kChunkPanels * kPanel;

// What NaN and -inf count as among logits (+inf counts as -kFloor), and the least log-probability.
constexpr float kFloor = -1e9f;

struct Segment {
  const void* weights;
  int64_t groups;  // per panel
  const void* input;
  int64_t input_stride;  // bytes between rows
};

// out[row][0 .. 32 * panels) = sum over segments of panels [first, first + panels) times inputs.
struct ProductArgs {
  Segment segments[2];
  int segment_count;
  int64_t rows;
  int64_t first_panel;
  int64_t panels;
  float* out;
  int64_t out_stride;  // floats between rows
};

// For `count` columns: y = sums + bias, then SiLU if asked for, then + residual (may be null).
// Written as floats to `out` and as an operand to `operand`, each of which may be null. `operand`
// is the row's start and `column` the first column in it; the other pointers are at the column.
struct FinishArgs {
  const float* sums;
  const float* bias;
  const float* residual;
  bool silu;
  int64_t count;
  float* out;
  void* operand;
  int64_t column;
};

enum class Source { kFloat, kBf16, kHalf };

// The largest logits seen by one thread in one row: a binary heap, the least one at the front.
// A key orders by (logit, then lowest index): see make_key.
struct TopHeap {
  uint64_t* keys;
  int32_t capacity;
  int32_t size;
  // Entries that equal the least one kept and were turned away or pushed out.
  int32_t ties;
  float least;  // meaningful once full
};

// One row's logits of one chunk; `logits` holds kChunk floats, of which `count` mean something.
// Chunks may come in any order.
struct ScanArgs {
  float* logits;
  int64_t count;
  int64_t first_index;
  bool want_sum;
  TopHeap* heap;
  float* max;
  float* sum;  // of exp(logit - *max); only if want_sum
};

}  // namespace redrafter

REDRAFTER_DECLARE_VARIANTS(void draft_product_bf16(const ProductArgs& args))
REDRAFTER_DECLARE_VARIANTS(void draft_product_float(const ProductArgs& args))
REDRAFTER_DECLARE_VARIANTS(void draft_finish(const FinishArgs& args, bool bf16))
REDRAFTER_DECLARE_VARIANTS(void draft_scan(const ScanArgs& args))
// Reads `count` numbers of a table's row as floats.
REDRAFTER_DECLARE_VARIANTS(void draft_read(const void* source, Source type, int64_t count,
                                           float* out))
// Bytes of one input in an operand.
REDRAFTER_DECLARE_VARIANTS(int64_t draft_operand_bytes(bool bf16))
