// SPDX-License-Identifier: Apache-2.0
// redrafter::build_tree on the CPU: the rules of vllm_redrafter/tree/build.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/check.h"

namespace redrafter {
namespace {

// Fillers of the beam search score below this; build.py's LOWEST_REAL_SCORE.
constexpr float kLowestRealScore = -25000.0f;

// One request's draft: candidate i = depth * width + rank, depth 0 first.
struct Draft {
  const int64_t* tokens;
  const int64_t* parents;  // rank at the depth above
  const float* scores;
  int64_t length, width;
};

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

// Walk the beams best first; a prefix met for the first time is the next node. Equal prefixes are
// equal children of equal nodes.
void add_beams(const Draft& draft, std::vector<int64_t>& path, Nodes& nodes) {
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

template <class T>
T* output_data(const Tensor& tensor, ScalarType dtype, int64_t elements, const char* name) {
  check_dtype(tensor, dtype, name);
  STD_TORCH_CHECK(tensor.numel() == elements && tensor.is_contiguous(), name,
                  " must be contiguous and have ", elements, " elements.");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
const T* input_data(const Tensor& tensor, ScalarType dtype, int64_t elements, const char* name) {
  return output_data<T>(tensor, dtype, elements, name);
}

void build_tree_cpu(const Tensor& out_tokens, const Tensor& out_parents, const Tensor& out_depths,
                    const Tensor& out_masks, const Tensor& out_num_nodes, const Tensor& root,
                    const Tensor& tokens, const Tensor& parents, const Tensor& scores, bool best) {
  check_dims(tokens, 3, "tokens");
  check_dims(out_tokens, 2, "out_tokens");
  check_dims(out_masks, 3, "out_masks");
  const int64_t batch = tokens.size(0), length = tokens.size(1), width = tokens.size(2);
  const int64_t most = out_tokens.size(1), words = out_masks.size(2);
  const int64_t candidates = length * width;
  STD_TORCH_CHECK(most >= 1 && words * 64 >= most, "out_tokens has room for ", most,
                  " nodes and out_masks for ", words * 64,
                  "; at least 1, and as many, are needed.");
  const int64_t* roots = input_data<int64_t>(root, ScalarType::Long, batch, "root");
  const int64_t* all_tokens =
      input_data<int64_t>(tokens, ScalarType::Long, batch * candidates, "tokens");
  const int64_t* all_parents =
      input_data<int64_t>(parents, ScalarType::Long, batch * candidates, "parents");
  const float* all_scores =
      input_data<float>(scores, ScalarType::Float, batch * candidates, "scores");
  int64_t* token_rows =
      output_data<int64_t>(out_tokens, ScalarType::Long, batch * most, "out_tokens");
  int64_t* parent_rows =
      output_data<int64_t>(out_parents, ScalarType::Long, batch * most, "out_parents");
  int64_t* depth_rows =
      output_data<int64_t>(out_depths, ScalarType::Long, batch * most, "out_depths");
  uint64_t* mask_rows = reinterpret_cast<uint64_t*>(
      output_data<int64_t>(out_masks, ScalarType::Long, batch * most * words, "out_masks"));
  int64_t* counts = output_data<int64_t>(out_num_nodes, ScalarType::Long, batch, "out_num_nodes");
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
    for (int64_t i = nodes.count; i < most; ++i) {
      nodes.tokens[i] = 0;
      nodes.parents[i] = -1;
      nodes.depths[i] = 0;
    }
    uint64_t* masks = mask_rows + b * most * words;
    for (int64_t i = 0; i < most; ++i) {
      uint64_t* row = masks + i * words;
      for (int64_t w = 0; w < words; ++w) {
        row[w] = nodes.parents[i] < 0 ? 0 : masks[nodes.parents[i] * words + w];
      }
      row[i / 64] |= static_cast<uint64_t>(1) << i % 64;
    }
  }
}

}  // namespace
}  // namespace redrafter

STABLE_TORCH_LIBRARY_IMPL(redrafter, CPU, m) {
  m.impl("build_tree", TORCH_BOX(&redrafter::build_tree_cpu));
}
