// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// redrafter::merge_candidates and redrafter::choose_tree on CUDA; a block per request, tensors of
// any strides.
#include "cuda/candidates_kernel.cuh"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/strided.h"

namespace redrafter::cuda {
namespace {

constexpr ScalarType kLong = ScalarType::Long;

dim3 threads_for(int64_t work) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>((work + 31) / 32 * 32, 32, 512)));
}

void merge_candidates_cuda(
    const Tensor& out_tokens, const Tensor& out_parents, const Tensor& out_depths,
    const Tensor& out_scores, const Tensor& out_sources, const Tensor& out_counts,
    const std::optional<Tensor>& beam_tokens, const std::optional<Tensor>& beam_parents,
    const std::optional<Tensor>& beam_scores, const std::optional<Tensor>& chain_tokens,
    const std::optional<Tensor>& chain_scores, const std::optional<Tensor>& max_depth) {
  MergeArgs args = {};
  args.sizes = candidates_sizes(beam_tokens, beam_parents, beam_scores, chain_tokens, chain_scores);
  check_dims(out_tokens, 2, "out_tokens");
  const int64_t batch = out_tokens.size(0), most = out_tokens.size(1);
  const std::size_t shared = merge_shared_bytes(args.sizes);
  STD_TORCH_CHECK(shared <= max_shared_memory(out_tokens), args.sizes.count(),
                  " candidates need ", shared, " bytes of shared memory; this device has ",
                  max_shared_memory(out_tokens), ".");
  args.out_tokens = strided<int64_t>(out_tokens, kLong, {batch, most}, "out_tokens");
  args.out_parents = strided<int64_t>(out_parents, kLong, {batch, most}, "out_parents");
  args.out_depths = strided<int64_t>(out_depths, kLong, {batch, most}, "out_depths");
  args.out_scores = strided<float>(out_scores, ScalarType::Float, {batch, most}, "out_scores");
  args.out_sources = strided<int64_t>(out_sources, kLong, {batch, most}, "out_sources");
  args.out_counts = strided<int64_t>(out_counts, kLong, {batch}, "out_counts");
  if (beam_tokens.has_value()) {
    const int64_t length = args.sizes.length, width = args.sizes.width;
    args.beam_tokens =
        strided<const int64_t>(*beam_tokens, kLong, {batch, length, width}, "beam_tokens");
    args.beam_parents =
        strided<const int64_t>(*beam_parents, kLong, {batch, length, width}, "beam_parents");
    args.beam_scores = strided<const float>(*beam_scores, ScalarType::Float,
                                            {batch, length, width}, "beam_scores");
  }
  if (chain_tokens.has_value()) {
    const int64_t chains = args.sizes.chains, depth = args.sizes.depth;
    args.chain_tokens =
        strided<const int64_t>(*chain_tokens, kLong, {batch, chains, depth}, "chain_tokens");
    args.chain_scores = strided<const float>(*chain_scores, ScalarType::Float,
                                             {batch, chains, depth}, "chain_scores");
  }
  if (max_depth.has_value()) {
    args.max_depth = strided<const int64_t>(*max_depth, kLong, {batch}, "max_depth");
  }
  args.most = static_cast<int>(most);
  if (batch == 0) return;
  const DeviceGuard guard(out_tokens);
  allow_shared_memory(merge_candidates_kernel, shared);
  REDRAFTER_LAUNCH((merge_candidates_kernel), dim3(static_cast<unsigned>(batch)),
                   threads_for(std::max<int64_t>(args.sizes.count(), most)), shared,
                   stream_of(out_tokens), args);
}

void choose_tree_cuda(const Tensor& out_tokens, const Tensor& out_parents,
                      const Tensor& out_depths, const Tensor& out_masks,
                      const Tensor& out_num_nodes, const Tensor& out_chosen, const Tensor& root,
                      const Tensor& tokens, const Tensor& parents, const Tensor& depths,
                      const Tensor& candidate_counts, const Tensor& counts) {
  check_dims(tokens, 2, "tokens");
  check_dims(out_masks, 3, "out_masks");
  const int64_t batch = tokens.size(0), most = tokens.size(1);
  check_size(most, "The number of candidates");
  const int64_t columns = most + 1, words = out_masks.size(2);
  check_size(words, "The number of mask words");
  STD_TORCH_CHECK(words_hold(words, columns), "out_masks has room for ", words * 64, " nodes; ", columns,
                  " are needed.");
  const std::size_t shared = choose_shared_bytes(most);
  STD_TORCH_CHECK(shared <= max_shared_memory(tokens), most, " candidates need ", shared,
                  " bytes of shared memory; this device has ", max_shared_memory(tokens), ".");
  ChooseArgs args = {};
  args.out_tokens = strided<int64_t>(out_tokens, kLong, {batch, columns}, "out_tokens");
  args.out_parents = strided<int64_t>(out_parents, kLong, {batch, columns}, "out_parents");
  args.out_depths = strided<int64_t>(out_depths, kLong, {batch, columns}, "out_depths");
  args.out_masks = strided<int64_t>(out_masks, kLong, {batch, columns, words}, "out_masks");
  args.out_num_nodes = strided<int64_t>(out_num_nodes, kLong, {batch}, "out_num_nodes");
  args.out_chosen = strided<int64_t>(out_chosen, kLong, {batch, columns}, "out_chosen");
  args.root = strided<const int64_t>(root, kLong, {batch}, "root");
  args.tokens = strided<const int64_t>(tokens, kLong, {batch, most}, "tokens");
  args.parents = strided<const int64_t>(parents, kLong, {batch, most}, "parents");
  args.depths = strided<const int64_t>(depths, kLong, {batch, most}, "depths");
  args.candidate_counts =
      strided<const int64_t>(candidate_counts, kLong, {batch}, "candidate_counts");
  args.counts = strided<const int64_t>(counts, kLong, {batch}, "counts");
  args.most = static_cast<int>(most);
  args.words = static_cast<int>(words);
  if (batch == 0) return;
  const DeviceGuard guard(tokens);
  allow_shared_memory(choose_tree_kernel, shared);
  REDRAFTER_LAUNCH((choose_tree_kernel), dim3(static_cast<unsigned>(batch)), threads_for(columns),
                   shared, stream_of(tokens), args);
}

}  // namespace
}  // namespace redrafter::cuda

STABLE_TORCH_LIBRARY_IMPL(REDRAFTER_LIBRARY, REDRAFTER_CUDA_KEY, m) {
  m.impl("merge_candidates", TORCH_BOX(&redrafter::cuda::merge_candidates_cuda));
  m.impl("choose_tree", TORCH_BOX(&redrafter::cuda::choose_tree_cuda));
}
