// SPDX-License-Identifier: Apache-2.0
// redrafter::walk on the CPU: walk_one of vllm_redrafter/tree/walk.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>

#include "common/walk_args.h"

namespace redrafter {
namespace {

void walk_cpu(const Tensor& path, const Tensor& num_accepted, const Tensor& last_node,
              const Tensor& next_token, const Tensor& tokens, const Tensor& parents,
              const Tensor& num_nodes, const Tensor& target_tokens) {
  const WalkArgs args = walk_args(path, num_accepted, last_node, next_token, tokens, parents,
                                  num_nodes, target_tokens);
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t* token = args.tokens.row(b);
    const int64_t* parent = args.parents.row(b);
    const int64_t* target = args.target_tokens.row(b);
    int64_t* nodes = args.path.row(b);
    const int64_t count = std::min(args.num_nodes[b], args.columns);
    int64_t at = 0, accepted = 0;
    // Parents come first, so one pass finds every step.
    for (int64_t node = 1; node < count && accepted < args.path_columns; ++node) {
      if (parent[node] == at && token[node] == target[at]) {
        nodes[accepted++] = node;
        at = node;
      }
    }
    std::fill(nodes + accepted, nodes + args.path_columns, -1);
    args.num_accepted[b] = accepted;
    args.last_node[b] = at;
    args.next_token[b] = target[at];
  }
}

}  // namespace
}  // namespace redrafter

STABLE_TORCH_LIBRARY_IMPL(redrafter, CPU, m) {
  m.impl("walk", TORCH_BOX(&redrafter::walk_cpu));
}
