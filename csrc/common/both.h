// SPDX-License-Identifier: Apache-2.0
// For functions that the launchers and the kernels of CUDA share with the CPU.
#pragma once

#ifdef __CUDACC__
#define REDRAFTER_BOTH __host__ __device__
#else
#define REDRAFTER_BOTH
#endif
