// SPDX-License-Identifier: Apache-2.0
// The arguments of redrafter::suffix_lookup, checked for every device; the meaning is documented in
// vllm_redrafter/lookup/suffix.py.
#pragma once

#include <cstdint>

#include "common/check.h"

namespace redrafter {

// suffix.py's CERTAINTY and MISS, beam_search.py's FILLER_SCORE.
constexpr double kCertainty = 0.98;
constexpr double kMiss = 0.75;
constexpr float kNoScore = -50000.0f;

struct SuffixLookupArgs {
  int64_t* tokens;   // [batch, chains, depth]
  int64_t* matched;  // [batch, chains]
  float* scores;     // [batch, chains, depth]
  const int32_t* text;  // [rows, columns]
  int64_t text_stride[2];
  int64_t rows, columns;
  const int32_t* slots;
  const int32_t* starts;
  const int32_t* ends;
  int64_t batch, chains, depth, window, longest;
};

template <class T>
T* whole_output(const Tensor& tensor, ScalarType dtype, int64_t elements, const char* name) {
  check_dtype(tensor, dtype, name);
  STD_TORCH_CHECK(tensor.numel() == elements && tensor.is_contiguous(), name,
                  " must be contiguous and have ", elements, " elements.");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline SuffixLookupArgs suffix_lookup_args(const Tensor& tokens, const Tensor& matched,
                                           const Tensor& scores, const Tensor& text,
                                           const Tensor& slots, const Tensor& starts,
                                           const Tensor& ends, int64_t window, int64_t longest) {
  check_dims(tokens, 3, "tokens");
  check_dims(text, 2, "text");
  check_dtype(text, ScalarType::Int, "text");
  SuffixLookupArgs args;
  args.batch = tokens.size(0);
  check_size(args.batch, "The number of requests");
  args.chains = tokens.size(1);
  args.depth = tokens.size(2);
  args.window = window;
  args.longest = longest;
  STD_TORCH_CHECK(args.chains >= 1 && args.depth >= 1 && window >= 1 && longest >= 1, "chains ",
                  args.chains, ", depth ", args.depth, ", window ", window, " and longest ",
                  longest, " must all be at least 1.");
  check_size(args.chains, "The number of chains");
  check_size(args.depth, "The depth of chains");
  const int64_t paths = args.batch * args.chains;
  args.tokens = whole_output<int64_t>(tokens, ScalarType::Long, paths * args.depth, "tokens");
  args.matched = whole_output<int64_t>(matched, ScalarType::Long, paths, "matched");
  args.scores = whole_output<float>(scores, ScalarType::Float, paths * args.depth, "scores");
  args.text = static_cast<const int32_t*>(text.const_data_ptr());
  args.rows = text.size(0);
  args.columns = text.size(1);
  for (int i = 0; i < 2; ++i) args.text_stride[i] = text.stride(i);
  args.slots = vector_data<int32_t>(slots, ScalarType::Int, args.batch, "slots");
  args.starts = vector_data<int32_t>(starts, ScalarType::Int, args.batch, "starts");
  args.ends = vector_data<int32_t>(ends, ScalarType::Int, args.batch, "ends");
  return args;
}

}  // namespace redrafter
