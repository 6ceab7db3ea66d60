// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// redrafter::walk on CUDA; a warp per request.
#include "cuda/walk_kernel.cuh"

#include "cuda/launch.h"

namespace redrafter::cuda {
namespace {

void walk_cuda(const Tensor& path, const Tensor& num_accepted, const Tensor& last_node,
               const Tensor& next_token, const Tensor& tokens, const Tensor& parents,
               const Tensor& num_nodes, const Tensor& target_tokens) {
  const WalkArgs args = walk_args(path, num_accepted, last_node, next_token, tokens, parents,
                                  num_nodes, target_tokens);
  check_device(path, "path");
  check_device(num_accepted, "num_accepted");
  check_device(last_node, "last_node");
  check_device(next_token, "next_token");
  check_device(tokens, "tokens");
  check_device(parents, "parents");
  check_device(num_nodes, "num_nodes");
  check_device(target_tokens, "target_tokens");
  if (args.batch == 0) return;
  const DeviceGuard guard(tokens);
  const unsigned blocks = static_cast<unsigned>((args.batch + kWalkWarps - 1) / kWalkWarps);
  REDRAFTER_LAUNCH((walk_kernel), dim3(blocks), dim3(32 * kWalkWarps), 0, stream_of(tokens), args);
}

}  // namespace
}  // namespace redrafter::cuda

STABLE_TORCH_LIBRARY_IMPL(REDRAFTER_LIBRARY, REDRAFTER_CUDA_KEY, m) {
  m.impl("walk", TORCH_BOX(&redrafter::cuda::walk_cuda));
}
