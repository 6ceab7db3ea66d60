// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace redrafter {

// Memory of the calling thread, aligned to 64 bytes, valid until its next call; grows and is then
// reused, so that a steady state allocates nothing. Contents are not kept.
char* scratch_memory(std::size_t bytes);

}  // namespace redrafter
