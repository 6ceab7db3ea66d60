// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

#include "dispatch.h"

namespace redrafter {

enum class FloatKind { kFloat, kBFloat16, kHalf };

}  // namespace redrafter

// The first position of the largest of n >= 1 values; NaN counts as larger than any number.
REDRAFTER_DECLARE_VARIANTS(int64_t argmax(const void* values, int64_t n, FloatKind kind))
