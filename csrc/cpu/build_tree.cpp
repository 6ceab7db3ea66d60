// SPDX-License-Identifier: Apache-2.0
// redrafter::build_tree on the CPU: the rules of vllm_redrafter/tree/build.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/check.h"
#include "cpu/tree_rows.h"

namespace redrafter {
namespace {

// One request's draft: candidate i = depth * width + rank, depth 0 first.
struct Draft {
  const int64_t* tokens;
  const int64_t* parents;  // rank at the depth above
  const float* scores;
  int64_t length, width;
};

// Walk the beams best first; a prefix met for the first time is the next node. Equal prefixes are
// equal children of equal nodes.
void add_beams(const Draft& draft, std::vector<int64_t>& path, Nodes& nodes) {
  if (draft.width == 0) return;
  path.resize(draft.length);
  for (int64_t beam = 0; beam < draft.width; ++beam) {
    int64_t rank = beam;
    for (int64_t depth = draft.length; depth-- > 0;) {
      path[depth] = draft.tokens[depth * draft.width + rank];
      rank = draft.parents[depth * draft.width + rank];
    }
    int64_t node = 0;
    for (const int64_t token : path) {
      int64_t child = node + 1;
      while (child < nodes.count &&
             !(nodes.parents[child] == node && nodes.tokens[child] == token)) {
        ++child;
      }
      if (child == nodes.count) {
        if (nodes.count == nodes.most) return;
        nodes.add(token, node);
      }
      node = child;
    }
  }
}

// Take the likeliest candidates of all depths, then put the best chain first.
void add_best(const Draft& draft, std::vector<int64_t>& chosen, std::vector<int64_t>& node_of,
              Nodes& nodes) {
  const int64_t candidates = draft.length * draft.width;
  const auto above = [&](int64_t i) {  // the parent candidate, -1 for the root
    return i < draft.width ? -1 : (i / draft.width - 1) * draft.width + draft.parents[i];
  };
  chosen.clear();
  for (int64_t i = 0; i < candidates; ++i) {
    if (draft.scores[i] > kLowestRealScore) chosen.push_back(i);
  }
  std::sort(chosen.begin(), chosen.end(), [&](int64_t a, int64_t b) {
    return draft.scores[a] != draft.scores[b] ? draft.scores[a] > draft.scores[b] : a < b;
  });
  if (static_cast<int64_t>(chosen.size()) >= nodes.most) chosen.resize(nodes.most - 1);

  node_of.assign(candidates, -1);
  const auto add = [&](int64_t i) {
    const int64_t parent = above(i) < 0 ? 0 : node_of[above(i)];
    STD_TORCH_CHECK(parent >= 0, "candidate ", i % draft.width, " of depth ", i / draft.width + 1,
                    " scores higher than its parent; scores must not rise along a path.");
    node_of[i] = nodes.count;
    nodes.add(draft.tokens[i], parent);
  };
  int64_t last = -1;
  for (const int64_t i : chosen) {
    if (above(i) != last) continue;
    add(i);
    last = i;
  }
  for (const int64_t i : chosen) {
    if (node_of[i] < 0) add(i);
  }
}

void build_tree_cpu(const Tensor& out_tokens, const Tensor& out_parents, const Tensor& out_depths,
                    const Tensor& out_masks, const Tensor& out_num_nodes, const Tensor& root,
                    const Tensor& tokens, const Tensor& parents, const Tensor& scores, bool best) {
  check_dims(tokens, 3, "tokens");
  check_dims(out_tokens, 2, "out_tokens");
  check_dims(out_masks, 3, "out_masks");
  const int64_t batch = tokens.size(0), length = tokens.size(1), width = tokens.size(2);
  const int64_t most = out_tokens.size(1), words = out_masks.size(2);
  check_size(length, "The draft length");
  check_size(width, "The beam width");
  check_size(words, "The number of mask words");
  STD_TORCH_CHECK(most >= 1 && words_hold(words, most), "out_tokens has room for ", most,
                  " nodes and out_masks for ", words * 64,
                  "; at least 1, and as many, are needed.");
  const int64_t candidates = length * width;
  constexpr ScalarType kLong = ScalarType::Long;
  const int64_t* roots = contiguous_data<int64_t>(root, kLong, {batch}, "root");
  const int64_t* all_tokens =
      contiguous_data<int64_t>(tokens, kLong, {batch, length, width}, "tokens");
  const int64_t* all_parents =
      contiguous_data<int64_t>(parents, kLong, {batch, length, width}, "parents");
  const float* all_scores =
      contiguous_data<float>(scores, ScalarType::Float, {batch, length, width}, "scores");
  int64_t* token_rows = contiguous_data<int64_t>(out_tokens, kLong, {batch, most}, "out_tokens");
  int64_t* parent_rows = contiguous_data<int64_t>(out_parents, kLong, {batch, most}, "out_parents");
  int64_t* depth_rows = contiguous_data<int64_t>(out_depths, kLong, {batch, most}, "out_depths");
  int64_t* mask_rows =
      contiguous_data<int64_t>(out_masks, kLong, {batch, most, words}, "out_masks");
  int64_t* counts = contiguous_data<int64_t>(out_num_nodes, kLong, {batch}, "out_num_nodes");
  for (int64_t i = 0; i < batch * candidates; ++i) {
    // At the first depth every parent is a copy of the root, whatever its number.
    STD_TORCH_CHECK(i % candidates < width || (all_parents[i] >= 0 && all_parents[i] < width),
                    "parents holds ", all_parents[i], "; with a beam width of ", width,
                    " it must be 0 to ", width - 1, ".");
  }

  std::vector<int64_t> first, second;
  for (int64_t b = 0; b < batch; ++b) {
    const Draft draft = {all_tokens + b * candidates, all_parents + b * candidates,
                         all_scores + b * candidates, length, width};
    Nodes nodes = {token_rows + b * most, parent_rows + b * most, depth_rows + b * most, 0, most};
    nodes.add(roots[b], -1);
    if (best) {
      add_best(draft, first, second, nodes);
    } else {
      add_beams(draft, first, nodes);
    }
    counts[b] = nodes.count;
    pad_nodes(nodes);
    write_masks(nodes.parents, most, words, mask_rows + b * most * words);
  }
}

}  // namespace
}  // namespace redrafter

STABLE_TORCH_LIBRARY_IMPL(redrafter, CPU, m) {
  m.impl("build_tree", TORCH_BOX(&redrafter::build_tree_cpu));
}
