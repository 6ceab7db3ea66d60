// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "dispatch.h"

namespace redrafter {

struct FindLastArgs {
  const int32_t* row;
  int64_t length;  // positions 0 to length - 1 are looked at, from the end
  int32_t wanted;
  int64_t* found;  // their positions, the last first
  int64_t most;    // stop at so many
  int64_t count;   // how many there are
};

}  // namespace redrafter

REDRAFTER_DECLARE_VARIANTS(void find_last(FindLastArgs& args))
