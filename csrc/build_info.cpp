// SPDX-License-Identifier: Apache-2.0
// What this library was built for; ops/library.py asks through ctypes.

#ifndef REDRAFTER_CUDA_ARCHITECTURES
#define REDRAFTER_CUDA_ARCHITECTURES ""
#endif

// The compute capabilities of its CUDA kernels, such as "8.0;9.0+PTX"; empty without any.
extern "C" __attribute__((visibility("default"))) const char* redrafter_cuda_architectures() {
  return REDRAFTER_CUDA_ARCHITECTURES;
}
