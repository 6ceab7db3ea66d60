// SPDX-License-Identifier: Apache-2.0
// Tensor-core products and asynchronous copies (sm_80 and later): thin names for PTX instructions,
// each with an emulation that follows the PTX manual's fragment layouts.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace redrafter::cuda {

#ifdef __CUDACC__

// d += a * b for a 16x16 row-major, b 16x8 column-major, d 16x8 (mma.m16n8k16), sums in float32.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane l gives row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Two floats rounded to 16 bits each, the first one in the low half.
__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ float unpack_low(uint32_t packed, __nv_bfloat16) {
  return __uint_as_float(packed << 16);
}
__device__ __forceinline__ float unpack_high(uint32_t packed, __nv_bfloat16) {
  return __uint_as_float(packed & 0xffff0000u);
}
__device__ __forceinline__ float unpack_low(uint32_t packed, __half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(packed)));
}
__device__ __forceinline__ float unpack_high(uint32_t packed, __half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(packed >> 16)));
}

// 16 bytes to shared memory; zeros, and no read, if not valid. `global` must be a valid address
// even then.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

#else

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  ::emulation::mma_m16n8k16(d, a, b, type);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  ::emulation::ldmatrix_x4(r, row, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  ::emulation::ldmatrix_x4(r, row, true);
}
inline uint32_t pack(float low, float high, __nv_bfloat16) {
  return __float2bfloat16(low).__x | uint32_t{__float2bfloat16(high).__x} << 16;
}
inline uint32_t pack(float low, float high, __half) {
  return __float2half(low).__x | uint32_t{__float2half(high).__x} << 16;
}
template <class T>
float unpack_low(uint32_t packed, T type) {
  return ::emulation::widen(static_cast<uint16_t>(packed), type);
}
template <class T>
float unpack_high(uint32_t packed, T type) {
  return ::emulation::widen(static_cast<uint16_t>(packed >> 16), type);
}
inline void cp_async_16(void* shared, const void* global, bool valid) {
  ::emulation::cp_async(shared, global, valid ? 16 : 0, 16);
}
inline void cp_async_commit() { ::emulation::cp_async_commit(); }
template <int N>
void cp_async_wait() {
  ::emulation::cp_async_wait(N);
}

#endif

}  // namespace redrafter::cuda
