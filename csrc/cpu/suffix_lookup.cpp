// SPDX-License-Identifier: Apache-2.0
// redrafter::suffix_lookup on the CPU: the rules of vllm_redrafter/lookup/suffix.py.
//
// One thread: a search costs what reading the text does, and two threads read 32 texts of 131,072
// tokens only 1.4 times as fast, 32 of 32,000 no faster.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/suffix_lookup_args.h"
#include "cpu/suffix_lookup_kernel.h"

namespace redrafter {
namespace {

struct Occurrence {
  int64_t at, matched;
};

// What one request after the other needs besides the outputs.
struct Scratch {
  explicit Scratch(const SuffixLookupArgs& args)
      : positions(std::min(args.window, args.columns)),
        found(positions.size()),
        so_far(args.chains) {}
  std::vector<int64_t> positions;
  std::vector<Occurrence> found;
  std::vector<char> so_far;  // chains that are equal to one chain up to some depth
};

// log(CERTAINTY * (1 - MISS ** m)): short matches again and again, so they are computed once.
double log_certainty(int64_t m) {
  constexpr int64_t kKept = 64;
  const auto compute = [](int64_t m) {
    return std::log(kCertainty * (1 - std::pow(kMiss, static_cast<double>(m))));
  };
  static const std::vector<double> kept = [&] {
    std::vector<double> values;
    for (int64_t m = 0; m < kKept; ++m) values.push_back(compute(m));
    return values;
  }();
  return m < kKept ? kept[m] : compute(m);
}

// How many tokens up to position `at` agree with those up to the end of the text.
int64_t matched_tokens(const int32_t* row, int64_t end, int64_t at, int64_t longest) {
  const int64_t most = std::min(longest, at + 1);
  int64_t matched = 1;
  while (matched < most && row[at - matched] == row[end - matched]) ++matched;
  return matched;
}

// The `kept` longest matches of the last token in front, of equal ones the more recent first.
int64_t find(const SuffixLookupArgs& args, const int32_t* row, int64_t length, Scratch& scratch) {
  if (length < 2) return 0;
  const int64_t end = length - 1;
  const int64_t most = std::min(args.window, end);
  FindLastArgs last = {row, end, row[end], scratch.positions.data(), most, 0};
  REDRAFTER_VARIANT_OF(find_last)(last);
  for (int64_t i = 0; i < last.count; ++i) {
    const int64_t at = scratch.positions[i];
    scratch.found[i] = {at, matched_tokens(row, end, at, args.longest)};
  }
  const int64_t kept = std::min(args.chains, last.count);
  Occurrence* first = scratch.found.data();
  std::partial_sort(first, first + kept, first + last.count,
                    [](const Occurrence& a, const Occurrence& b) {
                      return a.matched != b.matched ? a.matched > b.matched : a.at > b.at;
                    });
  return kept;
}

// Scores of chain c among the `kept` ones of tokens[kept, depth].
void write_scores(const int64_t* tokens, int64_t kept, int64_t depth, int64_t c, int64_t matched,
                  char* so_far, float* scores) {
  double score = 0.0;
  int64_t before = kept;
  std::fill(so_far, so_far + kept, 1);
  for (int64_t d = 0; d < depth; ++d) {
    int64_t same = before;
    for (int64_t k = 0; k < kept && before > 1; ++k) {
      if (so_far[k] && tokens[k * depth + d] != tokens[c * depth + d]) {
        so_far[k] = 0;
        --same;
      }
    }
    if (same < before) score += std::log(static_cast<double>(same) / static_cast<double>(before));
    score += log_certainty(matched + d);
    scores[d] = static_cast<float>(score);
    before = same;
  }
}

void look_up(const SuffixLookupArgs& args, int64_t b, Scratch& scratch) {
  const int32_t* row = args.text + args.slots[b] * args.text_stride[0] + args.starts[b];
  const int64_t length = args.ends[b] - args.starts[b];
  const int64_t chains = args.chains, depth = args.depth;
  int64_t* tokens = args.tokens + b * chains * depth;
  int64_t* matched = args.matched + b * chains;
  float* scores = args.scores + b * chains * depth;
  const int64_t kept = find(args, row, length, scratch);
  for (int64_t c = 0; c < kept; ++c) {
    const Occurrence& occurrence = scratch.found[c];
    int64_t from = occurrence.at;
    for (int64_t d = 0; d < depth; ++d) {
      from = from == length - 1 ? occurrence.at + 1 : from + 1;  // behind the end: its own start
      tokens[c * depth + d] = row[from];
    }
    matched[c] = occurrence.matched;
  }
  for (int64_t c = 0; c < kept; ++c) {
    write_scores(tokens, kept, depth, c, matched[c], scratch.so_far.data(), scores + c * depth);
  }
  std::fill(tokens + kept * depth, tokens + chains * depth, 0);
  std::fill(matched + kept, matched + chains, 0);
  std::fill(scores + kept * depth, scores + chains * depth, kNoScore);
}

void check_values(const SuffixLookupArgs& args) {
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t slot = args.slots[b], start = args.starts[b], end = args.ends[b];
    STD_TORCH_CHECK(slot >= 0 && slot < args.rows, "slots holds ", slot, "; with ", args.rows,
                    " rows of text it must be 0 to ", args.rows - 1, ".");
    STD_TORCH_CHECK(start >= 0 && start <= end && end <= args.columns, "A text from ", start,
                    " to ", end, " is none in rows of ", args.columns, " tokens.");
  }
}

void suffix_lookup_cpu(const Tensor& tokens, const Tensor& matched, const Tensor& scores,
                       const Tensor& text, const Tensor& slots, const Tensor& starts,
                       const Tensor& ends, int64_t window, int64_t longest) {
  const SuffixLookupArgs args =
      suffix_lookup_args(tokens, matched, scores, text, slots, starts, ends, window, longest);
  STD_TORCH_CHECK(args.columns < 2 || args.text_stride[1] == 1,
                  "text must have contiguous rows, but the stride within a row is ",
                  args.text_stride[1], ".");
  if (args.batch == 0) return;
  check_values(args);
  Scratch scratch(args);
  for (int64_t b = 0; b < args.batch; ++b) look_up(args, b, scratch);
}

}  // namespace
}  // namespace redrafter

STABLE_TORCH_LIBRARY_IMPL(redrafter, CPU, m) {
  m.impl("suffix_lookup", TORCH_BOX(&redrafter::suffix_lookup_cpu));
}
