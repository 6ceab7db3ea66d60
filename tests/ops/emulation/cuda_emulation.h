// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA to run this project's kernels on the CPU, without changing a line of them.
//
// A thread of a block is a fiber; blocks run one after another. What this finds that a GPU often
// hides: the order of blocks, and of threads between two barriers, is random (the seed can be set,
// see build.py), so a missing barrier changes results; dynamic shared memory starts as 0xFF bytes, NaN
// in every float type (static shared memory keeps what the last block left); asynchronous copies happen at the last moment that the program allows; threads
// of a block or warp that meet different barriers stop the program with a message; and with the
// address sanitizer every access outside an allocation is an error. What it cannot find: timing,
// caches, memory ordering between blocks, errors of nvcc, limits of registers.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

// ---- the language -----------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time, so the block's shared variables may be the program's.
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

struct Position {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
const Position& position();

}  // namespace emulation

#define threadIdx (::emulation::position().thread)
#define blockIdx (::emulation::position().block)
#define blockDim (::emulation::position().block_dim)
#define gridDim (::emulation::position().grid_dim)

// ---- types ------------------------------------------------------------------------------------

#define REDRAFTER_EMULATED_VECTOR(T, name)                                             \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                   \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                           \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
REDRAFTER_EMULATED_VECTOR(float, float)
REDRAFTER_EMULATED_VECTOR(int, int)
REDRAFTER_EMULATED_VECTOR(unsigned, uint)
#undef REDRAFTER_EMULATED_VECTOR

// As in CUDA: 16 bits that are nothing but storage until converted.
struct __nv_bfloat16 {
  uint16_t __x;
};
struct __half {
  uint16_t __x;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  return c10::BFloat16(v.__x, c10::BFloat16::from_bits());
}
inline __nv_bfloat16 __float2bfloat16(float v) { return {c10::BFloat16(v).x}; }
inline float __half2float(__half v) { return c10::Half(v.__x, c10::Half::from_bits()); }
inline __half __float2half(float v) { return {c10::Half(v).x}; }

// ---- scalar functions -------------------------------------------------------------------------

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// ---- synchronisation --------------------------------------------------------------------------

namespace emulation {

// Everything a lane can wait for. Lanes that should meet must name the same thing.
enum class Meeting { kBlock, kWarp, kShuffle, kVote, kReduce, kMma, kLdmatrix };

void meet(Meeting what);

constexpr int kWarpSize = 32;
constexpr int kLaneBytes = 32;

// Publishes this lane's bytes to its warp and waits for the others; `of(lane)` then reads theirs.
// The view is good until the lane's next but one exchange.
class Exchange {
 public:
  Exchange(Meeting what, const void* mine, std::size_t bytes);
  template <class T>
  T of(int lane) const {
    T value;
    std::memcpy(&value, from(lane), sizeof(T));
    return value;
  }
  int lane() const { return lane_; }

 private:
  const unsigned char* from(int lane) const;
  const unsigned char* slots_;
  int lane_;
};

template <class T>
T shuffle(T value, int (*source)(int lane, int argument), int argument) {
  const Exchange all(Meeting::kShuffle, &value, sizeof(T));
  const int from = source(all.lane(), argument);
  return from < 0 || from >= kWarpSize ? value : all.of<T>(from);
}

unsigned ballot(bool predicate);
unsigned largest_of_warp(unsigned value);
unsigned char* dynamic_shared();
void check_mask(unsigned mask);

void cp_async(void* shared, const void* global, int bytes, int total);
void cp_async_commit();
void cp_async_wait(int groups_left);
void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed);

inline float widen(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float widen(uint16_t bits, __half) { return __half2float({bits}); }

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const Exchange all(Meeting::kMma, &mine, sizeof(mine));
  const int group = all.lane() / 4, pair = all.lane() % 4;
  for (int quad = 0; quad < 4; ++quad) {
    // The lanes that hold columns 2 * quad (+ 8) of our rows of a, and those rows of b's columns.
    const auto row = all.of<Fragments>(group * 4 + quad);
    for (int half = 0; half < 2; ++half) {
      const auto column = all.of<Fragments>((pair * 2 + half) * 4 + quad);
      for (int k = 0; k < 4; ++k) {  // 2 * quad, + 1, + 8, + 9
        const int shift = k % 2 * 16, high = k / 2;
        const float b_k = widen(static_cast<uint16_t>(column.b[high] >> shift), type);
        d[half] += widen(static_cast<uint16_t>(row.a[high * 2] >> shift), type) * b_k;
        d[2 + half] += widen(static_cast<uint16_t>(row.a[high * 2 + 1] >> shift), type) * b_k;
      }
    }
  }
}

// Runs `thread` once for every thread of every block.
void launch(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes,
            const std::function<void()>& thread);

// Memory that a launcher got from torch: filled with 0xFF bytes.
void allocated(void* memory, std::size_t bytes);

// Something else may run the kernels (tests/ops/ptx). It gets what CUDA's runtime would: which
// kernel, the six sizes of grid and block, and the arguments. False: nothing else is there.
struct Argument {
  const void* data;
  std::size_t bytes, alignment;
};
bool launch_elsewhere(const void* kernel, const char* name, dim3 grid, dim3 block,
                      std::size_t shared_bytes, const Argument* arguments, std::size_t count);

template <class... Parameters, class... Given>
bool launched_elsewhere(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block,
                        std::size_t shared_bytes, const Given&... given) {
  const std::tuple<Parameters...> values(given...);
  return std::apply(
      [&](const Parameters&... value) {
        const Argument arguments[] = {{&value, sizeof(value), alignof(Parameters)}...};
        return launch_elsewhere(reinterpret_cast<const void*>(kernel), name, grid, block,
                                shared_bytes, arguments, sizeof...(Parameters));
      },
      values);
}

}  // namespace emulation

inline void __syncthreads() { ::emulation::meet(::emulation::Meeting::kBlock); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ::emulation::check_mask(mask);
  ::emulation::meet(::emulation::Meeting::kWarp);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  ::emulation::check_mask(mask);
  return ::emulation::shuffle(value, [](int, int from) { return from & 31; }, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  ::emulation::check_mask(mask);
  return ::emulation::shuffle(value, [](int lane, int bits) { return lane ^ bits; }, lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  ::emulation::check_mask(mask);
  return ::emulation::shuffle(value, [](int lane, int by) { return lane + by; },
                              static_cast<int>(by));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  ::emulation::check_mask(mask);
  return ::emulation::shuffle(value, [](int lane, int by) { return lane - by; },
                              static_cast<int>(by));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  ::emulation::check_mask(mask);
  return ::emulation::ballot(predicate != 0);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  ::emulation::check_mask(mask);
  return ::emulation::largest_of_warp(value);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Threads take turns, so nothing else is needed to be atomic.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = before > value ? before : value;
  return before;
}
template <class T>
T atomicMin(T* at, T value) {
  const T before = *at;
  *at = before < value ? before : value;
  return before;
}
template <class T>
T atomicExch(T* at, T value) {
  const T before = *at;
  *at = value;
  return before;
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}
template <class T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at = before | value;
  return before;
}

// ---- the runtime's functions that launchers use -------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // A small device: four multiprocessors, so that splits over them are few; sm_86's shared memory.
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 99 * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= 99 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
