// SPDX-License-Identifier: Apache-2.0
// The names under which operators register. The tests' emulation of the CUDA kernels builds the
// same sources under a library and a dispatch key of its own (tests/ops/emulation).
#pragma once

#ifndef REDRAFTER_LIBRARY
#define REDRAFTER_LIBRARY redrafter
#endif
#ifndef REDRAFTER_CUDA_KEY
#define REDRAFTER_CUDA_KEY CUDA
#endif
