// SPDX-License-Identifier: Apache-2.0
// What kernels include: CUDA's builtins from nvcc, or from the tests' emulation, which compiles the
// same kernels with a C++ compiler and runs them on the CPU (tests/ops/emulation).
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Declares `unsigned char* name`, the block's dynamic shared memory.
#define REDRAFTER_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#else

#include "cuda_emulation.h"

#define REDRAFTER_DYNAMIC_SHARED(name) unsigned char* name = ::emulation::dynamic_shared()

#endif
