// SPDX-License-Identifier: Apache-2.0
// Every operator of the library `redrafter`. Implementations register themselves beside their code
// (STABLE_TORCH_LIBRARY_IMPL); the meaning of the arguments is documented in vllm_redrafter/ops.
#include <torch/csrc/stable/library.h>

#include "common/registry.h"

STABLE_TORCH_LIBRARY(REDRAFTER_LIBRARY, m) {
  m.def(
      "beam_step(Tensor(a!) tokens, Tensor(b!) parents, Tensor(c!) scores, "
      "Tensor(d!)? out_state, Tensor logits, Tensor beam_scores, Tensor? state, "
      "Tensor? draft_vocab, int top_k) -> ()");
  // `layers` holds packed weights on the CPU and plain [out, in] ones on CUDA, in one order.
  m.def(
      "draft(Tensor(a!) tokens, Tensor(b!) parents, Tensor(c!) scores, Tensor context, "
      "Tensor token, Tensor embedding, Tensor? draft_vocab, Tensor[] layers, int head_rows, "
      "int exit_dim, int num_blocks, bool rnn, int top_k) -> ()");
  m.def(
      "build_tree(Tensor(a!) out_tokens, Tensor(b!) out_parents, Tensor(c!) out_depths, "
      "Tensor(d!) out_masks, Tensor(e!) out_num_nodes, Tensor root, Tensor tokens, "
      "Tensor parents, Tensor scores, bool best) -> ()");
  m.def(
      "merge_candidates(Tensor(a!) out_tokens, Tensor(b!) out_parents, Tensor(c!) out_depths, "
      "Tensor(d!) out_scores, Tensor(e!) out_sources, Tensor(f!) out_counts, "
      "Tensor? beam_tokens, Tensor? beam_parents, Tensor? beam_scores, Tensor? chain_tokens, "
      "Tensor? chain_scores, Tensor? max_depth) -> ()");
  m.def(
      "choose_tree(Tensor(a!) out_tokens, Tensor(b!) out_parents, Tensor(c!) out_depths, "
      "Tensor(d!) out_masks, Tensor(e!) out_num_nodes, Tensor(f!) out_chosen, Tensor root, "
      "Tensor tokens, Tensor parents, Tensor depths, Tensor candidate_counts, Tensor counts) "
      "-> ()");
  m.def(
      "tree_attention(Tensor(a!) out, Tensor query, Tensor key_cache, Tensor value_cache, "
      "Tensor? key_map, Tensor? value_map, Tensor block_table, Tensor request_index, "
      "Tensor row_start, Tensor row_count, Tensor context_lens, Tensor masks, float scale, "
      "float softcap, int window=0, Tensor? sinks=None) -> ()");
  m.def(
      "walk(Tensor(a!) path, Tensor(b!) num_accepted, Tensor(c!) last_node, "
      "Tensor(d!) next_token, Tensor tokens, Tensor parents, Tensor num_nodes, "
      "Tensor target_tokens) -> ()");
  m.def("argmax_rows(Tensor(a!) out, Tensor values, Tensor rows) -> ()");
  m.def(
      "suffix_lookup(Tensor(a!) tokens, Tensor(b!) matched, Tensor(c!) scores, Tensor text, "
      "Tensor slots, Tensor starts, Tensor ends, int window, int longest) -> ()");
  // `caches` holds addresses: it is marked as written for what is written through it.
  m.def(
      "move_kv(Tensor(a!) caches, Tensor? key_map, Tensor? value_map, Tensor src_slots, "
      "Tensor dst_slots, int block_size, int head_dim, int element_size) -> ()");
}
