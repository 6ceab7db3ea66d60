// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// redrafter::beam_step on CUDA.
#include "cuda/beam_step.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "cuda/beam_step_kernel.cuh"

namespace redrafter::cuda {

void launch_beam_step(const BeamStepArgs& args, const Tensor& like) {
  STD_TORCH_CHECK(args.width <= kMaxKept && args.top_k <= kMaxKept, "A beam width of ", args.width,
                  " or a top_k of ", args.top_k, " is more than the CUDA kernels keep, ", kMaxKept,
                  ".");
  const int64_t rows = args.batch * args.rows;
  if (rows == 0) return;
  STD_TORCH_CHECK(rows <= 65535 && args.batch <= 65535, "redrafter::beam_step: ", rows,
                  " rows are too many for one launch.");
  BeamStepWork work;
  work.chunks = static_cast<int>((args.vocab + kChunk - 1) / kChunk);
  // One more than the top k: where it is smaller than the k-th, there are no ties beyond the list.
  const int64_t top = args.top_k == 0 ? 0 : std::min<int64_t>(args.top_k + 1, kMaxKept);
  work.kept = static_cast<int>(std::max(args.width, top));
  const int64_t cells = rows * work.chunks;
  const Tensor keys = scratch(like, {cells * work.kept}, ScalarType::Long);
  const Tensor sums = scratch(like, {cells * 2}, ScalarType::Float);
  work.keys = static_cast<unsigned long long*>(keys.mutable_data_ptr());
  work.sums = static_cast<float*>(sums.mutable_data_ptr());
  const cudaStream_t stream = stream_of(like);
  const dim3 grid(static_cast<unsigned>((work.chunks + kScanWarps - 1) / kScanWarps),
                  static_cast<unsigned>(rows));
  const auto scan = args.dtype == ScalarType::Float      ? beam_step_scan<float>
                    : args.dtype == ScalarType::BFloat16 ? beam_step_scan<__nv_bfloat16>
                                                         : beam_step_scan<__half>;
  REDRAFTER_LAUNCH((scan), grid, dim3(32 * kScanWarps), 0, stream, args, work);
  const std::size_t shared = select_shared_bytes(args.rows, args.width, work.kept);
  allow_shared_memory(&beam_step_select, shared);
  REDRAFTER_LAUNCH((beam_step_select), dim3(static_cast<unsigned>(args.batch)),
                   dim3(kSelectThreads), shared, stream, args, work);
  if (args.state_bytes > 0) {
    REDRAFTER_LAUNCH((beam_step_states),
                     dim3(static_cast<unsigned>(args.width), static_cast<unsigned>(args.batch)),
                     dim3(256), 0, stream, args);
  }
}

#ifndef REDRAFTER_NO_REGISTRATION
namespace {

void beam_step_cuda(const Tensor& tokens, const Tensor& parents, const Tensor& scores,
                    const std::optional<Tensor>& out_state, const Tensor& logits,
                    const Tensor& beam_scores, const std::optional<Tensor>& state,
                    const std::optional<Tensor>& draft_vocab, int64_t top_k) {
  check_device(tokens, "tokens");
  check_device(parents, "parents");
  check_device(scores, "scores");
  check_device(logits, "logits");
  check_device(beam_scores, "beam_scores");
  if (out_state.has_value()) check_device(*out_state, "out_state");
  if (state.has_value()) check_device(*state, "state");
  if (draft_vocab.has_value()) check_device(*draft_vocab, "draft_vocab");
  const DeviceGuard guard(logits);
  launch_beam_step(beam_step_args(tokens, parents, scores, out_state, logits, beam_scores, state,
                                  draft_vocab, top_k),
                   logits);
}

}  // namespace
#endif

}  // namespace redrafter::cuda

#ifndef REDRAFTER_NO_REGISTRATION
STABLE_TORCH_LIBRARY_IMPL(REDRAFTER_LIBRARY, REDRAFTER_CUDA_KEY, m) {
  m.impl("beam_step", TORCH_BOX(&redrafter::cuda::beam_step_cuda));
}
#endif
