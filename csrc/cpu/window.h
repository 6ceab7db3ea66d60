// SPDX-License-Identifier: Apache-2.0
// A sliding window over tree rows: a row sees the last `window` of all keys that it would see.
//
// Keys of the context lie by position and a row's ancestors by depth, so that is the window by
// position: context + depth for a row. By row number it would be another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tree_attention_kernel.h"

namespace redrafter {

class Windows {
 public:
  // Args must be checked already, except for the block table. Does nothing for a window of 0.
  Windows(TreeAttentionArgs& args, int64_t window, int64_t tokens) {
    if (window == 0) return;
    first_key_.assign(args.requests, 0);
    first_seen_.assign(tokens, 0);
    for (int r = 0; r < args.requests; ++r) {
      const int rows = args.row_count[r], context = args.context_lens[r];
      int first = context;
      for (int i = 0; i < rows; ++i) {
        const int64_t row = args.row_start[r] + i;
        // For the context. A row that its own mask leaves out counts as one all the same.
        const int64_t left = window - std::max(count(args, row, rows), 1);
        if (left < 0) leave_out(args, row, rows, -left, tokens);
        const int64_t seen = std::min<int64_t>(std::max<int64_t>(left, 0), context);
        first_seen_[row] = static_cast<int32_t>(context - seen);
        first = std::min(first, first_seen_[row]);
      }
      first_key_[r] = first;
    }
    args.first_key = first_key_.data();
    args.first_seen = first_seen_.data();
    if (!masks_.empty()) {
      args.masks = masks_.data();
      args.mask_stride = args.mask_words;
    }
  }

 private:
  // Word w of a row's mask without bits behind the request's last row.
  static uint64_t word_of(const int64_t* mask, int w, int rows) {
    const int left = rows - 64 * w;
    const uint64_t inside =
        left >= 64 ? ~uint64_t{0} : left > 0 ? (uint64_t{1} << left) - 1 : uint64_t{0};
    return static_cast<uint64_t>(mask[w]) & inside;
  }

  static int count(const TreeAttentionArgs& args, int64_t row, int rows) {
    int total = 0;
    for (int w = 0; w < args.mask_words; ++w) {
      total += __builtin_popcountll(word_of(args.masks + row * args.mask_stride, w, rows));
    }
    return total;
  }

  // Take the first `many` rows that a row sees from its mask, in a copy of all masks.
  void leave_out(const TreeAttentionArgs& args, int64_t row, int rows, int64_t many,
                 int64_t tokens) {
    if (masks_.empty()) {
      masks_.resize(tokens * args.mask_words);
      for (int r = 0; r < args.requests; ++r) {
        for (int64_t t = args.row_start[r]; t < args.row_start[r] + args.row_count[r]; ++t) {
          std::copy_n(args.masks + t * args.mask_stride, args.mask_words,
                      masks_.begin() + t * args.mask_words);
        }
      }
    }
    for (int w = 0; w < args.mask_words && many > 0; ++w) {
      uint64_t bits = word_of(args.masks + row * args.mask_stride, w, rows);
      for (; bits && many > 0; --many) bits &= bits - 1;
      masks_[row * args.mask_words + w] = static_cast<int64_t>(bits);
    }
  }

  std::vector<int32_t> first_key_, first_seen_;
  std::vector<int64_t> masks_;
};

}  // namespace redrafter
