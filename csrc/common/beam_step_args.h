// SPDX-License-Identifier: Apache-2.0
// The arguments of redrafter::beam_step, checked, for both devices; the meaning is documented in
// vllm_redrafter/ops/beam_step.py.
#pragma once

#include <cstdint>
#include <optional>

#include "common/both.h"
#include "common/check.h"

namespace redrafter {

// Far beyond any use. Tensors may be expanded, so that their memory is no bound.
constexpr int64_t kWidest = 1 << 20;

// Strides in elements, except those of states, in bytes.
struct BeamStepArgs {
  const void* logits;  // [batch, rows, vocab]
  ScalarType dtype;
  int64_t batch, rows, width, vocab, top_k;
  int64_t logits_stride[2];
  const float* beam_scores;
  int64_t beam_scores_stride[2];
  int64_t* tokens;
  int64_t* parents;
  float* scores;
  int64_t tokens_stride[2], parents_stride[2], scores_stride[2];
  const int64_t* draft_vocab;  // may be null
  const char* state;
  char* out_state;
  int64_t state_stride[2], out_state_stride[2], state_bytes;  // of one state; 0 without states

  REDRAFTER_BOTH float beam_score(int64_t b, int64_t w) const {
    return beam_scores[b * beam_scores_stride[0] + w * beam_scores_stride[1]];
  }
  // The w-th best continuation: this row of the head, after this beam.
  REDRAFTER_BOTH void write(int64_t b, int64_t w, int64_t row, int64_t parent, float score) const {
    tokens[b * tokens_stride[0] + w * tokens_stride[1]] = draft_vocab ? draft_vocab[row] : row;
    parents[b * parents_stride[0] + w * parents_stride[1]] = parent;
    scores[b * scores_stride[0] + w * scores_stride[1]] = score;
  }
  // The state that beam `parent` was in; with one row all beams are copies of it.
  REDRAFTER_BOTH const char* state_row(int64_t b, int64_t parent) const {
    return state + b * state_stride[0] + (rows == 1 ? 0 : parent) * state_stride[1];
  }
  REDRAFTER_BOTH char* out_state_row(int64_t b, int64_t w) const {
    return out_state + b * out_state_stride[0] + w * out_state_stride[1];
  }
};

inline void check_beam_shape(const Tensor& tensor, ScalarType dtype, int64_t batch, int64_t width,
                             const char* name, int64_t (&stride)[2]) {
  check_dtype(tensor, dtype, name);
  check_dims(tensor, 2, name);
  STD_TORCH_CHECK(tensor.size(0) == batch && tensor.size(1) == width, name, " must be [", batch,
                  ", ", width, "], not [", tensor.size(0), ", ", tensor.size(1), "].");
  for (int i = 0; i < 2; ++i) stride[i] = tensor.stride(i);
}

inline BeamStepArgs beam_step_args(const Tensor& tokens, const Tensor& parents,
                                   const Tensor& scores, const std::optional<Tensor>& out_state,
                                   const Tensor& logits, const Tensor& beam_scores,
                                   const std::optional<Tensor>& state,
                                   const std::optional<Tensor>& draft_vocab, int64_t top_k) {
  BeamStepArgs args = {};
  check_dims(logits, 3, "logits");
  check_dims(beam_scores, 2, "beam_scores");
  args.batch = logits.size(0);
  args.rows = logits.size(1);
  args.vocab = logits.size(2);
  args.width = beam_scores.size(1);
  args.top_k = top_k < args.vocab ? top_k : args.vocab;
  args.dtype = logits.scalar_type();
  STD_TORCH_CHECK(args.dtype == ScalarType::Float || args.dtype == ScalarType::BFloat16 ||
                      args.dtype == ScalarType::Half,
                  "logits has dtype ", torch::headeronly::toString(args.dtype),
                  "; it must be float32, bfloat16 or float16.");
  STD_TORCH_CHECK(args.width >= 1 && args.width <= kWidest && args.vocab >= 1 &&
                      args.vocab < INT32_MAX && top_k >= 0,
                  "A beam width of ", args.width, ", a vocabulary of ", args.vocab, " or a top_k of ",
                  top_k, " is impossible.");
  STD_TORCH_CHECK(args.rows == 1 || args.rows == args.width, "logits has ", args.rows,
                  " rows a request; it must have one, or the ", args.width, " of beam_scores.");
  STD_TORCH_CHECK(args.vocab < 2 || logits.stride(2) == 1,
                  "The rows of logits must be contiguous, but the stride within a row is ",
                  logits.stride(2), ".");
  check_beam_shape(beam_scores, ScalarType::Float, args.batch, args.width, "beam_scores",
                   args.beam_scores_stride);
  check_beam_shape(tokens, ScalarType::Long, args.batch, args.width, "tokens", args.tokens_stride);
  check_beam_shape(parents, ScalarType::Long, args.batch, args.width, "parents",
                   args.parents_stride);
  check_beam_shape(scores, ScalarType::Float, args.batch, args.width, "scores",
                   args.scores_stride);
  if (draft_vocab.has_value()) {
    args.draft_vocab =
        vector_data<int64_t>(*draft_vocab, ScalarType::Long, args.vocab, "draft_vocab");
  }
  STD_TORCH_CHECK(state.has_value() == out_state.has_value(),
                  "state and out_state must be given together.");
  if (state.has_value()) {
    check_dims(*state, 3, "state");
    check_dims(*out_state, 3, "out_state");
    check_dtype(*out_state, state->scalar_type(), "out_state");
    STD_TORCH_CHECK(state->size(0) == args.batch && state->size(1) == args.rows &&
                        out_state->size(0) == args.batch && out_state->size(1) == args.width &&
                        out_state->size(2) == state->size(2),
                    "state must be [", args.batch, ", ", args.rows, ", H] and out_state [",
                    args.batch, ", ", args.width, ", H].");
    const auto size = static_cast<int64_t>(state->element_size());
    args.state_bytes = state->size(2) * size;
    STD_TORCH_CHECK(state->size(2) < 2 || (state->stride(2) == 1 && out_state->stride(2) == 1),
                    "The rows of state and out_state must be contiguous.");
    for (int i = 0; i < 2; ++i) {
      args.state_stride[i] = stride_bytes(*state, i);
      args.out_state_stride[i] = stride_bytes(*out_state, i);
    }
    args.state = static_cast<const char*>(state->const_data_ptr());
    args.out_state = static_cast<char*>(out_state->mutable_data_ptr());
  }
  for (int i = 0; i < 2; ++i) args.logits_stride[i] = logits.stride(i);
  args.logits = logits.const_data_ptr();
  args.beam_scores = static_cast<const float*>(beam_scores.const_data_ptr());
  args.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  args.parents = static_cast<int64_t*>(parents.mutable_data_ptr());
  args.scores = static_cast<float*>(scores.mutable_data_ptr());
  return args;
}

}  // namespace redrafter
