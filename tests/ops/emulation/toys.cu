// SPDX-License-Identifier: Apache-2.0
// Small kernels, right and wrong on purpose, that show what the emulation does and notices.
#include "cuda/launch.h"
#include "cuda/mma.h"

namespace redrafter::cuda {
namespace {

// out[b] = sum of the block's part of x; without `barriers` only the first step of the tree of sums
// waits for the other threads.
__global__ void block_sum(const float* x, float* out, bool barriers) {
  REDRAFTER_DYNAMIC_SHARED(raw);
  float* sums = reinterpret_cast<float*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  sums[t] = x[blockIdx.x * 128 + t];
  for (int half = 64; half > 0; half /= 2) {
    if (barriers || half == 64) __syncthreads();
    if (t < half) sums[t] += sums[t + half];
  }
  if (t == 0) out[blockIdx.x] = sums[0];
}

__global__ void warp_sum(const float* x, float* out) {
  float sum = x[threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  out[threadIdx.x] = sum;
}

// d [16, 8] = a [16, 16] * b [16, 8], through cp.async, ldmatrix and the tensor core.
template <class T>
__global__ void multiply(const T* a, const T* b, float* d, bool wait) {
  REDRAFTER_DYNAMIC_SHARED(raw);
  T* a_tile = reinterpret_cast<T*>(raw);
  T* b_tile = a_tile + 256;
  const int lane = static_cast<int>(threadIdx.x);
  cp_async_16(a_tile + lane * 8, a + lane * 8, true);
  cp_async_16(b_tile + lane % 16 * 8, b + lane % 16 * 8, true);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  __syncthreads();
  uint32_t a_fragment[4], b_fragments[4];
  ldmatrix_x4(a_fragment, a_tile + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x4_trans(b_fragments, b_tile + lane % 16 * 8);
  const uint32_t b_fragment[2] = {b_fragments[0], b_fragments[1]};
  float sums[4] = {0, 0, 0, 0};
  mma_m16n8k16(sums, a_fragment, b_fragment, T{});
  const int row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + column + i % 2] = sums[i];
}

__global__ void diverge(float* out) {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void out_of_bounds(const float* x, float* out, int64_t count) {
  out[threadIdx.x] = x[count + threadIdx.x];
}

using torch::stable::Tensor;

void run(const Tensor& out, const Tensor& x, const Tensor& y, int64_t kernel) {
  const float* in = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  cudaStream_t stream = stream_of(out);
  if (kernel == 0 || kernel == 1) {
    REDRAFTER_LAUNCH((block_sum), dim3(static_cast<unsigned>(out.numel())), dim3(128), 512,
                     stream, in, to, kernel == 0);
  } else if (kernel == 2) {
    REDRAFTER_LAUNCH((warp_sum), dim3(1), dim3(32), 0, stream, in, to);
  } else if (kernel == 3 || kernel == 4) {
    if (x.scalar_type() == ScalarType::Half) {
      REDRAFTER_LAUNCH((multiply<__half>), dim3(1), dim3(32), 768, stream,
                       static_cast<const __half*>(x.const_data_ptr()),
                       static_cast<const __half*>(y.const_data_ptr()), to, kernel == 3);
    } else {
      REDRAFTER_LAUNCH((multiply<__nv_bfloat16>), dim3(1), dim3(32), 768, stream,
                       static_cast<const __nv_bfloat16*>(x.const_data_ptr()),
                       static_cast<const __nv_bfloat16*>(y.const_data_ptr()), to, kernel == 3);
    }
  } else if (kernel == 5) {
    REDRAFTER_LAUNCH((diverge), dim3(1), dim3(32), 0, stream, to);
  } else {
    REDRAFTER_LAUNCH((out_of_bounds), dim3(1), dim3(32), 0, stream, in, to, x.numel());
  }
}

}  // namespace
}  // namespace redrafter::cuda

STABLE_TORCH_LIBRARY(redrafter_toys, m) {
  m.def("run(Tensor(a!) out, Tensor x, Tensor y, int kernel) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(redrafter_toys, REDRAFTER_CUDA_KEY, m) {
  m.impl("run", TORCH_BOX(&redrafter::cuda::run));
}
