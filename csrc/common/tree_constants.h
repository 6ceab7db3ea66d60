// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace redrafter {

// Fillers of the beam search score below this; build.py's LOWEST_REAL_SCORE.
constexpr float kLowestRealScore = -25000.0f;
// Scores of padding; beam_search.py's FILLER_SCORE.
constexpr float kFillerScore = -50000.0f;

}  // namespace redrafter
