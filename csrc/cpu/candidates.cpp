// SPDX-License-Identifier: Apache-2.0
// redrafter::merge_candidates and redrafter::choose_tree on the CPU: the rules of
// vllm_redrafter/tree/candidates.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/candidates_sizes.h"
#include "common/check.h"
#include "cpu/scratch.h"
#include "cpu/tree_rows.h"

namespace redrafter {
namespace {

constexpr ScalarType kLong = ScalarType::Long;

// The order of candidates as one number, the first one lowest: score, then number (see
// CandidatesSizes). Every bit is set where no path of that name was drafted.
using Key = uint64_t;
constexpr Key kNoKey = ~static_cast<Key>(0);

inline Key key_of(float score, int number) {
  score += 0.0f;  // -0 ties with 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const uint32_t falling = bits >> 31 ? bits : ~bits & 0x7fffffffu;
  return static_cast<Key>(falling) << 32 | static_cast<uint32_t>(number);
}

inline float score_of(Key key) {
  const uint32_t falling = static_cast<uint32_t>(key >> 32);
  const uint32_t bits = falling >> 31 ? falling : ~falling & 0x7fffffffu;
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

// All paths of one request. Node 0 is the root, which is nobody's child: so 0 ends every list.
struct Prefixes {
  struct Node {
    int64_t token;
    Key key;
    int first_child, next_sibling;
    int parent, depth;
    int sources;
    int place;  // among the candidates that were taken, -1 for none
  };
  Node* nodes;
  int count;

  void clear() {
    nodes[0] = {0, 0, 0, 0, -1, 0, 0, -1};
    count = 1;
  }

  int child(int parent, int64_t token) {
    int found = nodes[parent].first_child;
    while (found && nodes[found].token != token) found = nodes[found].next_sibling;
    if (found) return found;
    nodes[count] = {token, kNoKey, 0, nodes[parent].first_child, parent, nodes[parent].depth + 1,
                    0,     -1};
    nodes[parent].first_child = count;
    return count++;
  }

  // Of equal paths the higher score counts, at the place of the first.
  void offer(int node, float score, int number, int source) {
    const Key key = key_of(score, number), before = nodes[node].key;
    nodes[node].key = std::min(key, before) >> 32 << 32 |
                      std::min(static_cast<uint32_t>(key), static_cast<uint32_t>(before));
    nodes[node].sources |= source;
  }
};

// One request's beams and chains; null where there are none.
struct Drafted {
  const int64_t* beam_tokens;
  const int64_t* beam_parents;
  const float* beam_scores;
  const int64_t* chain_tokens;
  const float* chain_scores;
};

inline bool is_real(float score) { return score > kLowestRealScore; }  // NaN is not

// Fillers become nodes too, for what hangs on them; but nothing was offered there.
void add_beams(const Drafted& from, const CandidatesSizes& sizes, int64_t limit, int* nodes_above,
               int* nodes_here, Prefixes& paths) {
  for (int depth = 0; depth < sizes.length && depth < limit; ++depth) {
    for (int rank = 0; rank < sizes.width; ++rank) {
      const int at = depth * sizes.width + rank;
      const int above = depth == 0 ? 0 : nodes_above[from.beam_parents[at]];
      const int node = paths.child(above, from.beam_tokens[at]);
      const float score = from.beam_scores[at];
      if (is_real(score)) paths.offer(node, score, sizes.of_beam(depth, rank), kFromDrafter);
      nodes_here[rank] = node;
    }
    std::swap(nodes_above, nodes_here);
  }
}

void add_chains(const Drafted& from, const CandidatesSizes& sizes, int64_t limit, Prefixes& paths) {
  for (int chain = 0; chain < sizes.chains; ++chain) {
    const int64_t* tokens = from.chain_tokens + chain * sizes.depth;
    const float* scores = from.chain_scores + chain * sizes.depth;
    int depths = static_cast<int>(std::min<int64_t>(sizes.depth, std::max<int64_t>(limit, 0)));
    while (depths > 0 && !is_real(scores[depths - 1])) --depths;
    int node = 0;
    for (int depth = 0; depth < depths; ++depth) {
      node = paths.child(node, tokens[depth]);
      if (!is_real(scores[depth])) continue;
      paths.offer(node, scores[depth], sizes.of_chain(depth, chain), kFromLookup);
    }
  }
}

// One request's rows of the outputs.
struct Taken {
  int64_t* tokens;
  int64_t* parents;
  int64_t* depths;
  float* scores;
  int64_t* sources;
  int64_t count;
  int64_t most;

  void add(const Prefixes::Node& node, const Prefixes& paths) {
    tokens[count] = node.token;
    parents[count] = paths.nodes[node.parent].place;  // the root has place -1
    depths[count] = node.depth;
    scores[count] = score_of(node.key);
    sources[count] = node.sources;
    ++count;
  }
  void pad() {
    std::fill(tokens + count, tokens + most, 0);
    std::fill(parents + count, parents + most, -1);
    std::fill(depths + count, depths + most, 0);
    std::fill(scores + count, scores + most, kFillerScore);
    std::fill(sources + count, sources + most, 0);
  }
};

// Children of what was taken, the last one to be taken first. There are few: moving them along is
// faster than a heap.
struct Frontier {
  Key* keys;
  int* nodes;
  int count;

  void add_children(const Prefixes& paths, int node) {
    for (int child = paths.nodes[node].first_child; child;
         child = paths.nodes[child].next_sibling) {
      const Key key = paths.nodes[child].key;
      if (key == kNoKey) continue;
      int at = count++;
      for (; at > 0 && keys[at - 1] < key; --at) {
        keys[at] = keys[at - 1];
        nodes[at] = nodes[at - 1];
      }
      keys[at] = key;
      nodes[at] = child;
    }
  }
  int take_first() { return nodes[--count]; }
};

void refuse(const Prefixes::Node& node, int64_t b) {
  STD_TORCH_CHECK(false, "request ", b, ": the candidate of token ", node.token, " at depth ",
                  node.depth, " scores higher than its parent, or its parent has no score; scores "
                  "must not rise along a path.");
}

// The likeliest nodes: as no child comes before its parent, they grow from the root.
void take_best(Prefixes& paths, Frontier& frontier, int64_t b, Taken& taken) {
  frontier.count = 0;
  frontier.add_children(paths, 0);
  Key last = 0;
  while (taken.count < taken.most && frontier.count > 0) {
    const int at = frontier.take_first();
    Prefixes::Node& node = paths.nodes[at];
    if (node.key < last) refuse(node, b);
    last = node.key;
    node.place = static_cast<int>(taken.count);
    taken.add(node, paths);
    frontier.add_children(paths, at);
  }
  if (taken.most == 0) return;
  // What should have been taken, but does not hang on anything that was.
  if (taken.count < taken.most) last = kNoKey - 1;
  for (int i = 1; i < paths.count; ++i) {
    if (paths.nodes[i].key <= last && paths.nodes[i].place < 0) refuse(paths.nodes[i], b);
  }
}

void check_parents(const int64_t* parents, int64_t batch, const CandidatesSizes& sizes) {
  const int64_t kept = static_cast<int64_t>(sizes.length) * sizes.width;
  for (int64_t i = 0; i < batch * kept; ++i) {
    // At the first depth every parent is a copy of the root, whatever its number.
    STD_TORCH_CHECK(i % kept < sizes.width || (parents[i] >= 0 && parents[i] < sizes.width),
                    "beam_parents holds ", parents[i], "; with a beam width of ", sizes.width,
                    " it must be 0 to ", sizes.width - 1, ".");
  }
}

void merge_candidates_cpu(
    const Tensor& out_tokens, const Tensor& out_parents, const Tensor& out_depths,
    const Tensor& out_scores, const Tensor& out_sources, const Tensor& out_counts,
    const std::optional<Tensor>& beam_tokens, const std::optional<Tensor>& beam_parents,
    const std::optional<Tensor>& beam_scores, const std::optional<Tensor>& chain_tokens,
    const std::optional<Tensor>& chain_scores, const std::optional<Tensor>& max_depth) {
  const CandidatesSizes sizes =
      candidates_sizes(beam_tokens, beam_parents, beam_scores, chain_tokens, chain_scores);
  check_dims(out_tokens, 2, "out_tokens");
  const int64_t batch = out_tokens.size(0), most = out_tokens.size(1);
  const int64_t length = sizes.length, width = sizes.width;
  const int64_t chains = sizes.chains, depth = sizes.depth;
  Drafted all = {};
  if (beam_tokens.has_value()) {
    all.beam_tokens =
        contiguous_data<int64_t>(*beam_tokens, kLong, {batch, length, width}, "beam_tokens");
    all.beam_parents =
        contiguous_data<int64_t>(*beam_parents, kLong, {batch, length, width}, "beam_parents");
    all.beam_scores = contiguous_data<float>(*beam_scores, ScalarType::Float,
                                             {batch, length, width}, "beam_scores");
    check_parents(all.beam_parents, batch, sizes);
  }
  if (chain_tokens.has_value()) {
    all.chain_tokens =
        contiguous_data<int64_t>(*chain_tokens, kLong, {batch, chains, depth}, "chain_tokens");
    all.chain_scores = contiguous_data<float>(*chain_scores, ScalarType::Float,
                                              {batch, chains, depth}, "chain_scores");
  }
  const int64_t* limits =
      max_depth.has_value() ? contiguous_data<int64_t>(*max_depth, kLong, {batch}, "max_depth")
                            : nullptr;
  const auto rows = [&](const Tensor& tensor, const char* name) {
    return contiguous_data<int64_t>(tensor, kLong, {batch, most}, name);
  };
  const Taken outputs = {
      rows(out_tokens, "out_tokens"),
      rows(out_parents, "out_parents"),
      rows(out_depths, "out_depths"),
      contiguous_data<float>(out_scores, ScalarType::Float, {batch, most}, "out_scores"),
      rows(out_sources, "out_sources"),
      0,
      most};
  int64_t* counts = contiguous_data<int64_t>(out_counts, kLong, {batch}, "out_counts");

  const std::size_t nodes = static_cast<std::size_t>(sizes.count()) + 1;
  char* memory = scratch_memory(nodes * (sizeof(Prefixes::Node) + sizeof(Key) + sizeof(int)) +
                                2 * sizeof(int) * sizes.width);
  Prefixes paths = {reinterpret_cast<Prefixes::Node*>(memory), 0};
  Frontier frontier = {reinterpret_cast<Key*>(paths.nodes + nodes), nullptr, 0};
  frontier.nodes = reinterpret_cast<int*>(frontier.keys + nodes);
  int* nodes_above = frontier.nodes + nodes;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t limit = limits ? limits[b] : sizes.depths();
    const int64_t beam = b * length * width, chain = b * chains * depth;
    const Drafted mine = {all.beam_tokens + beam, all.beam_parents + beam, all.beam_scores + beam,
                          all.chain_tokens + chain, all.chain_scores + chain};
    const int64_t row = b * most;
    Taken taken = {outputs.tokens + row, outputs.parents + row, outputs.depths + row,
                   outputs.scores + row, outputs.sources + row, 0, most};
    paths.clear();
    add_beams(mine, sizes, limit, nodes_above, nodes_above + sizes.width, paths);
    add_chains(mine, sizes, limit, paths);
    take_best(paths, frontier, b, taken);
    taken.pad();
    counts[b] = taken.count;
  }
}

// The first `count` candidates of a request as nodes, the best chain first.
void number_nodes(const int64_t* parents, int64_t count, int64_t* chosen, int* node_of) {
  int64_t nodes = 1, last = -1;
  for (int64_t i = 0; i < count; ++i) {
    node_of[i] = 0;
    if (parents[i] != last) continue;
    chosen[nodes] = last = i;
    node_of[i] = static_cast<int>(nodes++);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (node_of[i]) continue;
    chosen[nodes] = i;
    node_of[i] = static_cast<int>(nodes++);
  }
}

void choose_tree_cpu(const Tensor& out_tokens, const Tensor& out_parents, const Tensor& out_depths,
                     const Tensor& out_masks, const Tensor& out_num_nodes,
                     const Tensor& out_chosen, const Tensor& root, const Tensor& tokens,
                     const Tensor& parents, const Tensor& depths, const Tensor& candidate_counts,
                     const Tensor& counts) {
  check_dims(tokens, 2, "tokens");
  check_dims(out_masks, 3, "out_masks");
  const int64_t batch = tokens.size(0), most = tokens.size(1);
  check_size(most, "The number of candidates");
  const int64_t columns = most + 1, words = out_masks.size(2);
  check_size(words, "The number of mask words");
  STD_TORCH_CHECK(words_hold(words, columns), "out_masks has room for ", words * 64, " nodes; ", columns,
                  " are needed.");
  const auto rows = [&](const Tensor& tensor, int64_t size, const char* name) {
    return contiguous_data<int64_t>(tensor, kLong, {batch, size}, name);
  };
  const auto numbers = [&](const Tensor& tensor, const char* name) {
    return contiguous_data<int64_t>(tensor, kLong, {batch}, name);
  };
  int64_t* token_rows = rows(out_tokens, columns, "out_tokens");
  int64_t* parent_rows = rows(out_parents, columns, "out_parents");
  int64_t* depth_rows = rows(out_depths, columns, "out_depths");
  int64_t* chosen_rows = rows(out_chosen, columns, "out_chosen");
  int64_t* masks =
      contiguous_data<int64_t>(out_masks, kLong, {batch, columns, words}, "out_masks");
  int64_t* num_nodes = numbers(out_num_nodes, "out_num_nodes");
  const int64_t* roots = numbers(root, "root");
  const int64_t* all_tokens = rows(tokens, most, "tokens");
  const int64_t* all_parents = rows(parents, most, "parents");
  const int64_t* all_depths = rows(depths, most, "depths");
  const int64_t* have = numbers(candidate_counts, "candidate_counts");
  const int64_t* wanted = numbers(counts, "counts");

  int* node_of = reinterpret_cast<int*>(scratch_memory(most * sizeof(int)));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* parent = all_parents + b * most;
    const int64_t count = std::max<int64_t>(0, std::min({wanted[b], have[b], most}));
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(parent[i] >= -1 && parent[i] < i, "parents holds ", parent[i],
                      " for candidate ", i, "; a parent must come before its children.");
    }
    int64_t* chosen = chosen_rows + b * columns;
    Nodes nodes = {token_rows + b * columns, parent_rows + b * columns, depth_rows + b * columns,
                   1 + count, columns};
    number_nodes(parent, count, chosen, node_of);
    nodes.tokens[0] = roots[b];
    nodes.parents[0] = chosen[0] = -1;
    nodes.depths[0] = 0;
    for (int64_t node = 1; node <= count; ++node) {
      const int64_t i = chosen[node];
      nodes.tokens[node] = all_tokens[b * most + i];
      nodes.parents[node] = parent[i] < 0 ? 0 : node_of[parent[i]];
      nodes.depths[node] = all_depths[b * most + i];
    }
    pad_nodes(nodes);
    std::fill(chosen + 1 + count, chosen + columns, -1);
    write_masks(nodes.parents, columns, words, masks + b * columns * words);
    num_nodes[b] = 1 + count;
  }
}

}  // namespace
}  // namespace redrafter

STABLE_TORCH_LIBRARY_IMPL(redrafter, CPU, m) {
  m.impl("merge_candidates", TORCH_BOX(&redrafter::merge_candidates_cpu));
  m.impl("choose_tree", TORCH_BOX(&redrafter::choose_tree_cpu));
}
