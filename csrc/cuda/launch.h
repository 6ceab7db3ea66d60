// SPDX-License-Identifier: Apache-2.0
// What launchers include: the stream and the size of a tensor's device, and the launch itself.
// Nothing here waits for the device, so every launch can be captured in a CUDA graph.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "common/check.h"
#include "common/registry.h"
#include "cuda/device.h"

#ifdef __CUDACC__

// Weak: the same library loads beside a torch without CUDA, where the symbol does not exist.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** ret_stream);

#define REDRAFTER_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)       \
  do {                                                                         \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__);        \
    ::redrafter::cuda::check(cudaGetLastError(), "launching " #kernel);        \
  } while (0)

#else

#define REDRAFTER_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                     \
  do {                                                                                       \
    (void)(stream);                                                                          \
    if (::emulation::launched_elsewhere(+kernel, #kernel, (grid), (block), (shared_bytes),   \
                                        __VA_ARGS__)) {                                      \
      break;                                                                                 \
    }                                                                                        \
    ::emulation::launch(#kernel, (grid), (block), (shared_bytes), [&] { (kernel)(__VA_ARGS__); }); \
  } while (0)

#endif

namespace redrafter::cuda {

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "redrafter: ", what, " failed: ",
                  cudaGetErrorString(status), ".");
}

// The tensor must be where this library's kernels can reach it.
inline void check_device(const torch::stable::Tensor& tensor, const char* name) {
#ifdef __CUDACC__
  STD_TORCH_CHECK(tensor.is_cuda(), name, " is not on a CUDA device.");
#else
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, where kernels are emulated.");
#endif
}

// Makes the tensor's device the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor& tensor) {
    const int wanted = tensor.get_device_index();
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (wanted >= 0 && wanted != before_) {
      check(cudaSetDevice(wanted), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// torch's current stream on the tensor's device.
inline cudaStream_t stream_of(const torch::stable::Tensor& tensor) {
#ifdef __CUDACC__
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "redrafter: this torch was built without CUDA.");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "redrafter: torch has no current CUDA stream.");
  return static_cast<cudaStream_t>(stream);
#else
  (void)tensor;
  return nullptr;
#endif
}

// Memory from torch's allocator on the tensor's device, without contents.
inline torch::stable::Tensor scratch(const torch::stable::Tensor& like,
                                     std::initializer_list<int64_t> sizes, ScalarType type) {
  torch::stable::Tensor made = torch::stable::new_empty(like, sizes, type);
#ifndef __CUDACC__
  ::emulation::allocated(made.mutable_data_ptr(), made.numel() * made.element_size());
#endif
  return made;
}

inline int device_attribute(const torch::stable::Tensor& tensor, cudaDeviceAttr attribute) {
  int value = 0;
  const int device = tensor.get_device_index();
  check(cudaDeviceGetAttribute(&value, attribute, device < 0 ? 0 : device),
        "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors(const torch::stable::Tensor& tensor) {
  return device_attribute(tensor, cudaDevAttrMultiProcessorCount);
}

// The most dynamic shared memory that a block may ask for, in bytes.
inline std::size_t max_shared_memory(const torch::stable::Tensor& tensor) {
  return device_attribute(tensor, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Needed before launching a kernel with more than 48 KiB of dynamic shared memory.
template <class Kernel>
void allow_shared_memory(Kernel kernel, std::size_t bytes) {
  if (bytes <= 48 * 1024) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "asking for shared memory");
}

}  // namespace redrafter::cuda
