// SPDX-License-Identifier: Apache-2.0
// How many candidates redrafter::merge_candidates gets and in which order they are numbered, for
// both devices; the meaning is documented in vllm_redrafter/ops/candidates.py.
#pragma once

#include <cstdint>
#include <optional>

#include "common/both.h"
#include "common/check.h"

namespace redrafter {

// Who drafted a candidate; candidates.py's FROM_DRAFTER and FROM_LOOKUP.
constexpr int kFromDrafter = 1;
constexpr int kFromLookup = 2;

// Of one request. Candidates are numbered by depth, then the beams by rank, then the chains: of
// equal scores the lower number comes first.
struct CandidatesSizes {
  int length, width, chains, depth;  // 0 without beams, or without chains

  REDRAFTER_BOTH int count() const { return length * width + chains * depth; }
  REDRAFTER_BOTH int depths() const { return length > depth ? length : depth; }
  // The first candidate at `at` tokens below the children of the root.
  REDRAFTER_BOTH int first(int at) const {
    return (at < length ? at : length) * width + (at < depth ? at : depth) * chains;
  }
  REDRAFTER_BOTH int beams_at(int at) const { return at < length ? width : 0; }
  REDRAFTER_BOTH int of_beam(int at, int rank) const { return first(at) + rank; }
  REDRAFTER_BOTH int of_chain(int at, int chain) const { return first(at) + beams_at(at) + chain; }
};

inline CandidatesSizes candidates_sizes(const std::optional<Tensor>& beam_tokens,
                                        const std::optional<Tensor>& beam_parents,
                                        const std::optional<Tensor>& beam_scores,
                                        const std::optional<Tensor>& chain_tokens,
                                        const std::optional<Tensor>& chain_scores) {
  STD_TORCH_CHECK(beam_tokens.has_value() == beam_parents.has_value() &&
                      beam_tokens.has_value() == beam_scores.has_value() &&
                      chain_tokens.has_value() == chain_scores.has_value(),
                  "Tokens, parents and scores of the beams must be given together, and so must "
                  "tokens and scores of the chains.");
  int64_t length = 0, width = 0, chains = 0, depth = 0;
  if (beam_tokens.has_value()) {
    check_dims(*beam_tokens, 3, "beam_tokens");
    length = beam_tokens->size(1);
    width = beam_tokens->size(2);
  }
  if (chain_tokens.has_value()) {
    check_dims(*chain_tokens, 3, "chain_tokens");
    chains = chain_tokens->size(1);
    depth = chain_tokens->size(2);
  }
  constexpr int64_t kLimit = INT32_MAX / 64;
  STD_TORCH_CHECK(length < kLimit && width < kLimit && chains < kLimit && depth < kLimit &&
                      length * width + chains * depth < kLimit,
                  "Beams of ", length, " x ", width,
                  " and chains of ", chains, " x ", depth, " are too many candidates.");
  return {static_cast<int>(length), static_cast<int>(width), static_cast<int>(chains),
          static_cast<int>(depth)};
}

}  // namespace redrafter
