// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// redrafter::suffix_lookup on CUDA; a block per request, text of any strides.
#include "cuda/suffix_lookup_kernel.cuh"

#include "cuda/launch.h"

namespace redrafter::cuda {
namespace {

void suffix_lookup_cuda(const Tensor& tokens, const Tensor& matched, const Tensor& scores,
                        const Tensor& text, const Tensor& slots, const Tensor& starts,
                        const Tensor& ends, int64_t window, int64_t longest) {
  const SuffixLookupArgs args =
      suffix_lookup_args(tokens, matched, scores, text, slots, starts, ends, window, longest);
  check_device(tokens, "tokens");
  check_device(matched, "matched");
  check_device(scores, "scores");
  check_device(text, "text");
  check_device(slots, "slots");
  check_device(starts, "starts");
  check_device(ends, "ends");
  STD_TORCH_CHECK(window <= kMaxOccurrences, "window is ", window, "; on CUDA it may be at most ",
                  kMaxOccurrences, ".");
  if (args.batch == 0) return;
  const DeviceGuard guard(tokens);
  REDRAFTER_LAUNCH((suffix_lookup_kernel), dim3(static_cast<unsigned>(args.batch)),
                   dim3(kLookupThreads), 0, stream_of(tokens), args);
}

}  // namespace
}  // namespace redrafter::cuda

STABLE_TORCH_LIBRARY_IMPL(REDRAFTER_LIBRARY, REDRAFTER_CUDA_KEY, m) {
  m.impl("suffix_lookup", TORCH_BOX(&redrafter::cuda::suffix_lookup_cuda));
}
