// SPDX-License-Identifier: Apache-2.0
// The launches of redrafter::beam_step, for other launchers too.
#pragma once

#include "common/beam_step_args.h"
#include "cuda/launch.h"

namespace redrafter::cuda {

// Scan, selection and, where there are states, their reordering, on the current stream of `like`'s
// device. `like` is any tensor there; the workspace is allocated from it. Raises for a beam width
// or top_k beyond what the kernels keep.
void launch_beam_step(const BeamStepArgs& args, const torch::stable::Tensor& like);

}  // namespace redrafter::cuda
