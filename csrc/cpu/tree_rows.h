// SPDX-License-Identifier: Apache-2.0
// Rows of trees as the operators write them: nodes, padding, ancestor masks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/tree_constants.h"

namespace redrafter {

// One request's tree under construction, in the rows of the outputs.
struct Nodes {
  int64_t* tokens;
  int64_t* parents;
  int64_t* depths;
  int64_t count;
  int64_t most;  // root included

  void add(int64_t token, int64_t parent) {
    tokens[count] = token;
    parents[count] = parent;
    depths[count] = parent < 0 ? 0 : depths[parent] + 1;
    ++count;
  }
};

inline void pad_nodes(const Nodes& nodes) {
  std::fill(nodes.tokens + nodes.count, nodes.tokens + nodes.most, 0);
  std::fill(nodes.parents + nodes.count, nodes.parents + nodes.most, -1);
  std::fill(nodes.depths + nodes.count, nodes.depths + nodes.most, 0);
}

// A row sees itself and what its parent, an earlier row, sees; padding has parent -1.
inline void write_masks(const int64_t* parents, int64_t most, int64_t words, int64_t* out) {
  uint64_t* masks = reinterpret_cast<uint64_t*>(out);
  for (int64_t i = 0; i < most; ++i) {
    uint64_t* row = masks + i * words;
    for (int64_t w = 0; w < words; ++w) {
      row[w] = parents[i] < 0 ? 0 : masks[parents[i] * words + w];
    }
    row[i / 64] |= static_cast<uint64_t>(1) << i % 64;
  }
}

}  // namespace redrafter
