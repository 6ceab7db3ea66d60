// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// redrafter::build_tree on CUDA; a block per request, tensors of any strides.
#include "cuda/build_tree_kernel.cuh"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/strided.h"

namespace redrafter::cuda {
namespace {

void build_tree_cuda(const Tensor& out_tokens, const Tensor& out_parents, const Tensor& out_depths,
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
  STD_TORCH_CHECK(length >= 1 && width >= 1, "tokens has no candidates.");
  const std::size_t shared = build_tree_shared_bytes(length * width, most);
  STD_TORCH_CHECK(shared <= max_shared_memory(tokens), "A draft of ", length * width,
                  " candidates and a tree of ", most, " nodes need ", shared,
                  " bytes of shared memory; this device has ", max_shared_memory(tokens), ".");
  constexpr ScalarType kLong = ScalarType::Long;
  BuildTreeArgs args;
  args.out_tokens = strided<int64_t>(out_tokens, kLong, {batch, most}, "out_tokens");
  args.out_parents = strided<int64_t>(out_parents, kLong, {batch, most}, "out_parents");
  args.out_depths = strided<int64_t>(out_depths, kLong, {batch, most}, "out_depths");
  args.out_masks = strided<int64_t>(out_masks, kLong, {batch, most, words}, "out_masks");
  args.out_num_nodes = strided<int64_t>(out_num_nodes, kLong, {batch}, "out_num_nodes");
  args.root = strided<const int64_t>(root, kLong, {batch}, "root");
  args.tokens = strided<const int64_t>(tokens, kLong, {batch, length, width}, "tokens");
  args.parents = strided<const int64_t>(parents, kLong, {batch, length, width}, "parents");
  args.scores = strided<const float>(scores, ScalarType::Float, {batch, length, width}, "scores");
  args.length = static_cast<int>(length);
  args.width = static_cast<int>(width);
  args.most = static_cast<int>(most);
  args.words = static_cast<int>(words);
  if (batch == 0) return;
  const DeviceGuard guard(tokens);
  const auto kernel = best ? build_tree_kernel<true> : build_tree_kernel<false>;
  const int64_t work = (std::max(length * width, most) + 31) / 32 * 32;
  const unsigned threads = static_cast<unsigned>(std::min<int64_t>(work, 512));
  allow_shared_memory(kernel, shared);
  REDRAFTER_LAUNCH((kernel), dim3(static_cast<unsigned>(batch)), dim3(threads), shared,
                   stream_of(tokens), args);
}

}  // namespace
}  // namespace redrafter::cuda

STABLE_TORCH_LIBRARY_IMPL(REDRAFTER_LIBRARY, REDRAFTER_CUDA_KEY, m) {
  m.impl("build_tree", TORCH_BOX(&redrafter::cuda::build_tree_cuda));
}
