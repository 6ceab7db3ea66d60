// SPDX-License-Identifier: Apache-2.0
// Short vectors for kernels that are compiled once per instruction set (see dispatch.h).
//
// Built on the vector extensions of GCC and Clang: one source, lowered to SSE2, NEON, AVX2 or
// AVX-512 by the flags of the translation unit. Include it only from *_kernel.cpp files, and keep
// std:: templates and non-static inline functions out of those: the linker merges equal inline
// functions of all variants into one, which may be the one with instructions this CPU lacks.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef REDRAFTER_VARIANT
#error "simd.h belongs in *_kernel.cpp files, which the build compiles with REDRAFTER_VARIANT"
#endif

#define REDRAFTER_INLINE static inline __attribute__((always_inline, unused))

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define REDRAFTER_HAS_BF16_DOT 1
#endif

namespace redrafter {
namespace REDRAFTER_VARIANT {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vu16 __attribute__((vector_size(2 * kLanes)));

// ---- bits, loads, stores (no alignment asked for) ---------------------------------------------

template <class To, class From>
REDRAFTER_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

template <class Vector>
REDRAFTER_INLINE Vector load_as(const void* source) {
  Vector result;
  memcpy(&result, source, sizeof(result));
  return result;
}

REDRAFTER_INLINE vf load(const float* source) { return load_as<vf>(source); }
REDRAFTER_INLINE void store(float* target, vf value) { memcpy(target, &value, sizeof(value)); }
REDRAFTER_INLINE vf zero() { return vf{}; }
REDRAFTER_INLINE vf broadcast(float value) { return vf{} + value; }
REDRAFTER_INLINE vu broadcast_u(uint32_t value) { return vu{} + value; }

// Contracted to one fused instruction where the target has it (-ffp-contract=fast).
REDRAFTER_INLINE vf fmadd(vf a, vf b, vf c) { return a * b + c; }

// mask ? a : b, lane by lane; a mask lane is 0 or ~0, as comparisons of vectors give.
REDRAFTER_INLINE vf select(vi mask, vf a, vf b) {
  return bits_as<vf>((bits_as<vi>(a) & mask) | (bits_as<vi>(b) & ~mask));
}
// a > b ? a : b and a < b ? a : b: where one is NaN, b.
#if defined(__AVX512F__)
REDRAFTER_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
REDRAFTER_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
REDRAFTER_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
REDRAFTER_INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
REDRAFTER_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
REDRAFTER_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
#endif

// Whether a comparison holds for any lane.
REDRAFTER_INLINE bool any_lane(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  uint64_t halves[2];
  memcpy(halves, &mask, sizeof(halves));
  return (halves[0] | halves[1]) != 0;
#endif
}

// Bit i is lane i of a comparison.
REDRAFTER_INLINE uint32_t lane_bits(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(bits_as<__m256>(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i] ? 1u << i : 0u;
  return bits;
#endif
}

REDRAFTER_INLINE float reduce_add(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}

REDRAFTER_INLINE float reduce_max(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

// ---- bfloat16 and IEEE half -------------------------------------------------------------------

REDRAFTER_INLINE float bf16_to_float(uint16_t h) { return bits_as<float>((uint32_t)h << 16); }

// Round to nearest, ties to even; NaN stays a (quiet) NaN. As PyTorch does it.
REDRAFTER_INLINE uint16_t float_to_bf16(float f) {
  if (f != f) return 0x7fc0;
  const uint32_t u = bits_as<uint32_t>(f);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

REDRAFTER_INLINE vf load_bf16(const uint16_t* source) {
  return bits_as<vf>(__builtin_convertvector(load_as<vu16>(source), vu) << 16);
}

REDRAFTER_INLINE void store_bf16(uint16_t* target, vf value) {
  const vu u = bits_as<vu>(value);
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vi nan = value != value;
  const vu chosen = bits_as<vu>((bits_as<vi>(rounded) & ~nan) | (0x7fc0 & nan));
  const vu16 narrow = __builtin_convertvector(chosen, vu16);
  memcpy(target, &narrow, sizeof(narrow));
}

// Half precision without hardware: move the bits into a float with a wrong exponent, multiply it
// right (exact, subnormals included), then mend infinities and NaN.
REDRAFTER_INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const float scaled = bits_as<float>(magnitude << 13) * 0x1p112f;
  uint32_t u = bits_as<uint32_t>(scaled);
  if (magnitude >= 0x7c00u) u |= 0x7f800000u;
  return bits_as<float>(u | ((uint32_t)(h & 0x8000u) << 16));
}

REDRAFTER_INLINE uint16_t float_to_half(float f) {
  const uint32_t u = bits_as<uint32_t>(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds up to infinity
  if (magnitude < 0x38800000u) {  // subnormal half: let the adder do the rounding
    const float sum = bits_as<float>(magnitude) + 0.5f;
    return (uint16_t)(sign | (bits_as<uint32_t>(sum) - 0x3f000000u));
  }
  return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

REDRAFTER_INLINE vf load_half(const uint16_t* source) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load_as<__m256i>(source));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(load_as<__m128i>(source));
#else
  vf result;
  for (int i = 0; i < kLanes; ++i) result[i] = half_to_float(source[i]);
  return result;
#endif
}

REDRAFTER_INLINE void store_half(uint16_t* target, vf value) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
  memcpy(target, &h, sizeof(h));
#elif defined(__AVX2__)
  const __m128i h = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
  memcpy(target, &h, sizeof(h));
#else
  for (int i = 0; i < kLanes; ++i) target[i] = float_to_half(value[i]);
#endif
}

// ---- functions --------------------------------------------------------------------------------

// exp to a relative error of about 1e-7. Below -87.33 the result is 0 (also for -inf), above 88.37
// it saturates near 2.4e38 (never infinite), NaN gives NaN.
REDRAFTER_INLINE vf exp(vf x) {
  const vi underflow = x < -87.33f;
  x = x > 88.37f ? broadcast(88.37f) : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const vf shifted = fmadd(x, broadcast(1.44269504088896341f), broadcast(12582912.0f));
  const vf n = shifted - 12582912.0f;
  vf r = fmadd(n, broadcast(-0.693145751953125f), x);
  r = fmadd(n, broadcast(-1.42860682030941723e-6f), r);
  vf q = broadcast(1.3933751387987224e-3f);
  q = fmadd(q, r, broadcast(8.369236841999675e-3f));
  q = fmadd(q, r, broadcast(4.166646401078555e-2f));
  q = fmadd(q, r, broadcast(0.16666504463628357f));
  q = fmadd(q, r, broadcast(0.5000000013557447f));
  q = fmadd(q, r, broadcast(1.0000000108513993f));
  const vf mantissa = fmadd(q, r, broadcast(1.0f));
  // Unsigned: for inputs whose result is masked out these bits mean nothing and may wrap.
  const vu exponent = (bits_as<vu>(shifted) - (0x4b400000u - 127u)) << 23;
  const vf result = mantissa * bits_as<vf>(exponent);
  return bits_as<vf>(bits_as<vi>(result) & ~underflow);
}

// 2^x for x <= 0 (larger x, up to 127, work too), for softmax weights; 0 for -inf and below -126,
// NaN for NaN. Relative error: degree 6 about 1e-7 (float's own rounding), degree 4 about 4e-6.
template <int kDegree>
REDRAFTER_INLINE vf exp2_weight(vf x) {
  static_assert(kDegree == 6 || kDegree == 4, "polynomials of these degrees are here");
#if defined(__AVX512F__)
  // max(constant, x) keeps a NaN. 2^-150 rounds to 0 in scalef.
  const __m512 at_least = (__m512)max(broadcast(-150.0f), x);
  const __m512 whole = _mm512_roundscale_ps(at_least, _MM_FROUND_TO_NEAREST_INT);
  const vf r = (vf)_mm512_sub_ps(at_least, whole);
#else
  const vi underflow = x < -126.0f;
  const vf at_least = max(broadcast(-150.0f), x);
  const vf shifted = at_least + 12582912.0f;
  const vf r = at_least - (shifted - 12582912.0f);
#endif
  vf q;
  if (kDegree == 6) {
    q = broadcast(1.54531629451e-4f);
    q = fmadd(q, r, broadcast(1.33908633647e-3f));
    q = fmadd(q, r, broadcast(9.61808255728e-3f));
    q = fmadd(q, r, broadcast(5.55035711422e-2f));
    q = fmadd(q, r, broadcast(0.240226507606f));
    q = fmadd(q, r, broadcast(0.693147188026f));
  } else {
    q = broadcast(9.65671028854e-3f);
    q = fmadd(q, r, broadcast(5.58382829462e-2f));
    q = fmadd(q, r, broadcast(0.240225300974f));
    q = fmadd(q, r, broadcast(0.693136733884f));
  }
  const vf mantissa = fmadd(q, r, broadcast(1.0f));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)mantissa, whole);
#else
  // Unsigned: for inputs whose result is masked out these bits mean nothing and may wrap.
  const vu exponent = (bits_as<vu>(shifted) - (0x4b400000u - 127u)) << 23;
  const vf result = mantissa * bits_as<vf>(exponent);
  return bits_as<vf>(bits_as<vi>(result) & ~underflow);
#endif
}

// tanh to about 1e-7, absolute and (near zero) relative.
REDRAFTER_INLINE vf tanh(vf x) {
  const vi sign = bits_as<vi>(x) & INT32_MIN;
  const vf a = bits_as<vf>(bits_as<vi>(x) & INT32_MAX);
  const vf e = exp(a * -2.0f);
  const vf large = (1.0f - e) / (1.0f + e);
  const vf z = a * a;
  vf p = broadcast(2.292744816e-3f);
  p = fmadd(p, z, broadcast(-8.343945516e-3f));
  p = fmadd(p, z, broadcast(2.176891865e-2f));
  p = fmadd(p, z, broadcast(-5.395925958e-2f));
  p = fmadd(p, z, broadcast(0.1333330356f));
  p = fmadd(p, z, broadcast(-0.3333333317f));
  const vf small = fmadd(p * z, a, a);
  return bits_as<vf>(bits_as<vi>(select(a < 0.625f, small, large)) | sign);
}

// x / (1 + exp(-x))
REDRAFTER_INLINE vf silu(vf x) { return x / (1.0f + exp(-x)); }

// ---- pairs of bfloat16: acc[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1], accumulated in float -----

#ifdef REDRAFTER_HAS_BF16_DOT
REDRAFTER_INLINE vf dot_bf16(vf acc, vu a, vu b) {
  return (vf)_mm512_dpbf16_ps((__m512)acc, bits_as<__m512bh>(a), bits_as<__m512bh>(b));
}
#endif

}  // namespace REDRAFTER_VARIANT
}  // namespace redrafter
