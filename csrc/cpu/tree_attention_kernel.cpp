// SPDX-License-Identifier: Apache-2.0
// Attention of tree rows over the paged cache: one pass with an online softmax.
//
// Work is cut into units (request, KV head, up to kMaxRows query rows: all query heads of that KV
// head together, so that a cache block is read and converted once for all of them). The keys of all
// units, laid end to end, are divided evenly among the threads; a unit that is cut leaves partial
// results, merged at the end by their log-sum-exp. Inside a unit, tiles of 64 keys are multiplied
// with six query rows at a time.
#include "tree_attention_kernel.h"

#include "common/threads.h"
#include "simd.h"

namespace redrafter {
namespace REDRAFTER_VARIANT {
namespace {

constexpr int kMaxTile = 128;  // keys per tile, at most
constexpr int kMaskWords = kMaxTile / 64;
constexpr int kGranule = 16;      // keys; cuts between threads fall on multiples of it
constexpr int kMaxRows = 96;      // query rows of a unit: bounds the scratch memory
constexpr int kGroup = 6;         // query rows that share one pass over a tile in registers
constexpr int kMinCost = 12 * 4;  // row-granules below which another thread does not pay
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumns = 4;  // vectors of kLanes columns held in registers: 6 * 4 of 32
#else
constexpr int kColumns = 2;  // 6 * 2 of 16
#endif
constexpr float kMinusInf = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

// ---- element types ----------------------------------------------------------------------------

struct Float {
  typedef float type;
  REDRAFTER_INLINE vf load(const type* p) { return REDRAFTER_VARIANT::load(p); }
  REDRAFTER_INLINE void store(type* p, vf v) { REDRAFTER_VARIANT::store(p, v); }
  REDRAFTER_INLINE float widen(type x) { return x; }
};
struct BFloat16 {
  typedef uint16_t type;
  REDRAFTER_INLINE vf load(const type* p) { return load_bf16(p); }
  REDRAFTER_INLINE void store(type* p, vf v) { store_bf16(p, v); }
  REDRAFTER_INLINE float widen(type x) { return bf16_to_float(x); }
};
struct Half {
  typedef uint16_t type;
  REDRAFTER_INLINE vf load(const type* p) { return load_half(p); }
  REDRAFTER_INLINE void store(type* p, vf v) { store_half(p, v); }
  REDRAFTER_INLINE float widen(type x) { return half_to_float(x); }
};

// ---- where keys and values of a tile lie ------------------------------------------------------

// Keys [first, first + count) of one request, for one KV head.
struct TileSource {
  const TreeAttentionArgs* args;
  const int32_t* blocks;  // the request's row of the block table
  int head;
  int first;
  int count;
};

// fn(tile column, block's region offset in elements, token in block, run length) for every run of
// keys of the tile that lie in one block.
template <class Fn>
REDRAFTER_INLINE void for_each_run(const TileSource& tile, const int64_t (&stride)[2], Fn fn) {
  const int block_size = tile.args->block_size;
  int column = 0;
  while (column < tile.count) {
    const int position = tile.first + column;
    const int token = position % block_size;
    int run = block_size - token;
    if (run > tile.count - column) run = tile.count - column;
    const int64_t region =
        (int64_t)tile.blocks[position / block_size] * stride[0] + (int64_t)tile.head * stride[1];
    fn(column, region, token, run);
    column += run;
  }
}

// ---- products in float ------------------------------------------------------------------------

// Everything that differs between the two ways to multiply: how a tile of keys and values is
// prepared, how queries and probabilities are stored, and the two products.
template <class Element>
struct FloatMath {
  typedef typename Element::type type;
  typedef float Operand;            // queries and probabilities
  static constexpr int kTile = 64;  // keys at a time: a tile fits the L1 cache
  REDRAFTER_INLINE int key_floats(int head_dim) { return head_dim * kTile; }
  REDRAFTER_INLINE int value_floats(int head_dim) { return head_dim * kTile; }

  struct Keys {
    const float* rows;  // [head_dim][tile columns]
    int64_t stride;
  };
  struct Values {
    const float* rows;  // [tile columns][head_dim]
    int64_t stride;
  };

  // Cached floats that lie as the product wants them are used where they are. `padded` tokens must
  // be in the block since whole vectors are loaded.
  REDRAFTER_INLINE bool in_place(const TileSource& tile, int padded) {
    return sizeof(type) == sizeof(float) &&
           tile.first % tile.args->block_size + padded <= tile.args->block_size;
  }

  // Tiles end where blocks do as long as that leaves them large: then nothing is copied.
  REDRAFTER_INLINE int tile_count(const TreeAttentionArgs& args, int first, int end) {
    int most = end - first < kTile ? end - first : kTile;
    const int in_block = args.block_size - first % args.block_size;
    if (sizeof(type) == sizeof(float) && in_block < most && args.block_size >= kTile)
      most = in_block;
    return most;
  }

  REDRAFTER_INLINE Keys prepare_keys(const TileSource& tile, float* scratch) {
    const TreeAttentionArgs& args = *tile.args;
    const type* cache = (const type*)args.key_cache;
    const int head_dim = args.head_dim, block_size = args.block_size;
    const bool minor = args.key_layout == KvLayout::kTokenMinor;
    if (minor && in_place(tile, (tile.count + kLanes - 1) / kLanes * kLanes)) {
      const float* found = nullptr;
      for_each_run(tile, args.key_stride, [&](int, int64_t region, int token, int) {
        found = (const float*)(const void*)(cache + region + token);
      });
      return {found, block_size};
    }
    for_each_run(tile, args.key_stride, [&](int column, int64_t region, int token, int run) {
      const type* source = cache + region;
      for (int d = 0; d < head_dim; ++d) {
        float* target = scratch + d * kTile + column;
        int i = 0;
        if (minor) {
          const type* row = source + (int64_t)d * block_size + token;
          for (; i + kLanes <= run; i += kLanes) {
            REDRAFTER_VARIANT::store(target + i, Element::load(row + i));
          }
          for (; i < run; ++i) target[i] = Element::widen(row[i]);
        } else {
          const int32_t* map = args.key_map + (int64_t)token * head_dim + d;
          for (; i < run; ++i) target[i] = Element::widen(source[map[(int64_t)i * head_dim]]);
        }
      }
    });
    return {scratch, kTile};
  }

  REDRAFTER_INLINE Values prepare_values(const TileSource& tile, float* scratch) {
    const TreeAttentionArgs& args = *tile.args;
    const type* cache = (const type*)args.value_cache;
    const int head_dim = args.head_dim;
    const bool major = args.value_layout == KvLayout::kTokenMajor;
    if (major && in_place(tile, tile.count)) {
      const float* found = nullptr;
      for_each_run(tile, args.value_stride, [&](int, int64_t region, int token, int) {
        found = (const float*)(const void*)(cache + region + (int64_t)token * head_dim);
      });
      return {found, head_dim};
    }
    for_each_run(tile, args.value_stride, [&](int column, int64_t region, int token, int run) {
      for (int i = 0; i < run; ++i) {
        float* target = scratch + (int64_t)(column + i) * head_dim;
        const int64_t first = (int64_t)(token + i) * head_dim;
        if (major) {
          for (int d = 0; d < head_dim; d += kLanes) {
            REDRAFTER_VARIANT::store(target + d, Element::load(cache + region + first + d));
          }
        } else {
          for (int d = 0; d < head_dim; ++d) {
            target[d] = Element::widen(cache[region + args.value_map[first + d]]);
          }
        }
      }
    });
    return {scratch, head_dim};
  }

  REDRAFTER_INLINE void pack_query(const type* source, int64_t stride, int head_dim, float* to) {
    if (stride == 1) {
      for (int d = 0; d < head_dim; d += kLanes) {
        REDRAFTER_VARIANT::store(to + d, Element::load(source + d));
      }
    } else {
      for (int d = 0; d < head_dim; ++d) to[d] = Element::widen(source[d * stride]);
    }
  }

  // scores[r][c] = sum over d of query[r][d] * keys[d][c], c over kV vectors
  template <int kR, int kV>
  static inline __attribute__((always_inline)) void score(const float* query, int head_dim,
                                                          const Keys& keys, int column,
                                                          float* scores) {
    vf acc[kR][kV] = {};
    const float* row = keys.rows + column;
    for (int d = 0; d < head_dim; ++d, row += keys.stride) {
      vf k[kV];
      for (int v = 0; v < kV; ++v) k[v] = REDRAFTER_VARIANT::load(row + v * kLanes);
      for (int r = 0; r < kR; ++r) {
        const vf q = broadcast(query[r * head_dim + d]);
        for (int v = 0; v < kV; ++v) acc[r][v] = fmadd(q, k[v], acc[r][v]);
      }
    }
    for (int r = 0; r < kR; ++r) {
      for (int v = 0; v < kV; ++v) {
        REDRAFTER_VARIANT::store(scores + r * kTile + column + v * kLanes, acc[r][v]);
      }
    }
  }

  // The weights 2^(scores * factor - offset) of one row, in place, and their sum.
  typedef float* Weights;
  REDRAFTER_INLINE Weights weights_in(float* scores, Operand*) { return scores; }
  REDRAFTER_INLINE vf weigh(float* row, int count, vf factor, vf offset, Weights) {
    vf sum = zero();
    for (int c = 0; c < count; c += kLanes) {
      const vf p = exp2_weight<6>(REDRAFTER_VARIANT::load(row + c) * factor - offset);
      REDRAFTER_VARIANT::store(row + c, p);
      sum += p;
    }
    return sum;
  }

  // out[r][c] = out[r][c] * decay[r] + sum over t of p[r][t] * values[t][c], c over kV vectors. The
  // sum of a tile is made apart: adding every term to a long context's total would lose accuracy.
  template <int kR, int kV>
  static inline __attribute__((always_inline)) void accumulate(const float* p, int count,
                                                               const Values& values, int column,
                                                               const float* decay, float* out,
                                                               int head_dim) {
    vf acc[kR][kV] = {};
    const float* row = values.rows + column;
    for (int t = 0; t < count; ++t, row += values.stride) {
      vf x[kV];
      for (int v = 0; v < kV; ++v) x[v] = REDRAFTER_VARIANT::load(row + v * kLanes);
      for (int r = 0; r < kR; ++r) {
        const vf weight = broadcast(p[r * kTile + t]);
        for (int v = 0; v < kV; ++v) acc[r][v] = fmadd(weight, x[v], acc[r][v]);
      }
    }
    for (int r = 0; r < kR; ++r) {
      for (int v = 0; v < kV; ++v) {
        float* to = out + r * head_dim + column + v * kLanes;
        REDRAFTER_VARIANT::store(
            to, fmadd(REDRAFTER_VARIANT::load(to), broadcast(decay[r]), acc[r][v]));
      }
    }
  }
};

// ---- products of bfloat16 pairs, summed in float ----------------------------------------------

#ifdef REDRAFTER_HAS_BF16_DOT
// Keys and values become rows of 32-bit pairs: two neighbours along the summed axis side by side.
// Probabilities are rounded to bfloat16 too, and the softmax is normalised by the sum of the
// *rounded* ones, so that the weights still add up to one.
struct Bf16Math {
  typedef uint16_t type;
  typedef uint16_t Operand;
  static constexpr int kTile = 128;
  REDRAFTER_INLINE int key_floats(int head_dim) { return head_dim / 2 * kTile; }
  REDRAFTER_INLINE int value_floats(int head_dim) { return head_dim * kTile / 2; }

  // Row i of a vector of columns v (kLanes of them) is at rows + i * stride + v * vector_stride:
  // what AMX wants is stored that way already and used where it is.
  struct Pairs {
    const uint32_t* rows;
    int64_t stride;
    int64_t vector_stride;
  };
  typedef Pairs Keys;    // [head_dim / 2][tile columns]
  typedef Pairs Values;  // [tile columns / 2][head_dim]

  REDRAFTER_INLINE uint32_t pair(uint16_t a, uint16_t b) { return a | (uint32_t)b << 16; }

  // to[i] = (a[i], b[i]) for i < count; b counts as zeros where it is null.
  REDRAFTER_INLINE void interleave(const type* a, const type* b, int count, uint32_t* to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __mmask32 use_b = b ? ~(__mmask32)0 : 0;
    if (!b) b = a;
    int i = 0;
    for (; i + 32 <= count; i += 32) {
      const __m512i x = _mm512_loadu_si512(a + i), y = _mm512_maskz_loadu_epi16(use_b, b + i);
      _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(x, low, y));
      _mm512_storeu_si512(to + i + 16, _mm512_permutex2var_epi16(x, high, y));
    }
    if (i < count) {
      const __mmask32 rest = ((__mmask32)1 << (count - i)) - 1;
      const __m512i x = _mm512_maskz_loadu_epi16(rest, a + i);
      const __m512i y = _mm512_maskz_loadu_epi16(rest & use_b, b + i);
      _mm512_mask_storeu_epi32(to + i, (__mmask16)rest, _mm512_permutex2var_epi16(x, low, y));
      _mm512_mask_storeu_epi32(to + i + 16, (__mmask16)(rest >> 16),
                               _mm512_permutex2var_epi16(x, high, y));
    }
  }

  REDRAFTER_INLINE int tile_count(const TreeAttentionArgs& args, int first, int end) {
    int most = end - first < kTile ? end - first : kTile;
    const int in_block = args.block_size - first % args.block_size;
    const bool pairs = args.key_layout == KvLayout::kKeyPairs;
    if (pairs && in_block < most && args.block_size >= kTile) most = in_block;
    return most;
  }

  // The tile is inside one block, and starts where a group of 16 tokens does.
  REDRAFTER_INLINE bool in_place(const TileSource& tile) {
    const int block_size = tile.args->block_size, token = tile.first % block_size;
    return block_size % 16 == 0 && token + tile.count <= block_size;
  }
  REDRAFTER_INLINE const uint32_t* region_of(const TileSource& tile, const void* cache,
                                             const int64_t (&stride)[2]) {
    const int64_t block = tile.blocks[tile.first / tile.args->block_size];
    return (const uint32_t*)(const void*)((const type*)cache + block * stride[0] +
                                          tile.head * stride[1]);
  }

  REDRAFTER_INLINE Keys prepare_keys(const TileSource& tile, float* scratch) {
    const TreeAttentionArgs& args = *tile.args;
    const type* cache = (const type*)args.key_cache;
    const int head_dim = args.head_dim;
    if (args.key_layout == KvLayout::kKeyPairs && in_place(tile)) {
      const int64_t group = 8 * (int64_t)head_dim;  // pairs of 16 tokens
      return {region_of(tile, cache, args.key_stride) + tile.first % args.block_size / 16 * group,
              16, group};
    }
    uint32_t* rows = (uint32_t*)(void*)scratch;
    for_each_run(tile, args.key_stride, [&](int column, int64_t region, int token, int run) {
      const type* source = cache + region;
      for (int d = 0; d < head_dim; d += 2) {
        uint32_t* target = rows + d / 2 * kTile + column;
        if (args.key_layout == KvLayout::kTokenMinor) {
          const type* a = source + (int64_t)d * args.block_size + token;
          interleave(a, a + args.block_size, run, target);
        } else {
          const int32_t* map = args.key_map + (int64_t)token * head_dim + d;
          for (int i = 0; i < run; ++i, map += head_dim) {
            target[i] = pair(source[map[0]], source[map[1]]);
          }
        }
      }
    });
    return {rows, kTile, kLanes};
  }

  REDRAFTER_INLINE Values prepare_values(const TileSource& tile, float* scratch) {
    const TreeAttentionArgs& args = *tile.args;
    const type* cache = (const type*)args.value_cache;
    const int head_dim = args.head_dim;
    // An odd last token has a partner that was never written: it must be packed as zero.
    if (args.value_layout == KvLayout::kValuePairs && in_place(tile) && tile.count % 2 == 0) {
      return {region_of(tile, cache, args.value_stride) + tile.first % args.block_size / 2 * 16, 16,
              8 * (int64_t)args.block_size};
    }
    uint32_t* rows = (uint32_t*)(void*)scratch;
    int64_t first[kTile];  // offset of each token: in the cache, or (mapped) in the map
    int64_t regions[kTile];
    for_each_run(tile, args.value_stride, [&](int column, int64_t region, int token, int run) {
      for (int i = 0; i < run; ++i) {
        first[column + i] = (int64_t)(token + i) * head_dim;
        regions[column + i] = region;
      }
    });
    for (int t = 0; t < tile.count; t += 2) {
      uint32_t* target = rows + t / 2 * head_dim;
      const bool lone = t + 1 == tile.count;
      if (args.value_layout == KvLayout::kTokenMajor) {
        interleave(cache + regions[t] + first[t],
                   lone ? nullptr : cache + regions[t + 1] + first[t + 1], head_dim, target);
      } else {
        for (int d = 0; d < head_dim; ++d) {
          const type a = cache[regions[t] + args.value_map[first[t] + d]];
          const type b = lone ? 0 : cache[regions[t + 1] + args.value_map[first[t + 1] + d]];
          target[d] = pair(a, b);
        }
      }
    }
    return {rows, head_dim, kLanes};
  }

  REDRAFTER_INLINE void pack_query(const type* source, int64_t stride, int head_dim, type* to) {
    for (int d = 0; d < head_dim; ++d) to[d] = source[d * stride];
  }

  REDRAFTER_INLINE vu broadcast_pair(const uint16_t* source) {
    return broadcast_u(load_as<uint32_t>(source));
  }

  template <int kR, int kV>
  static inline __attribute__((always_inline)) void score(const type* query, int head_dim,
                                                          const Keys& keys, int column,
                                                          float* scores) {
    vf acc[kR][kV] = {};
    const uint32_t* row = keys.rows + column / kLanes * keys.vector_stride;
    for (int d = 0; d < head_dim; d += 2, row += keys.stride) {
      vu k[kV];
      for (int v = 0; v < kV; ++v) k[v] = load_as<vu>(row + v * keys.vector_stride);
      for (int r = 0; r < kR; ++r) {
        const vu q = broadcast_pair(query + r * head_dim + d);
        for (int v = 0; v < kV; ++v) acc[r][v] = dot_bf16(acc[r][v], k[v], q);
      }
    }
    for (int r = 0; r < kR; ++r) {
      for (int v = 0; v < kV; ++v) {
        REDRAFTER_VARIANT::store(scores + r * kTile + column + v * kLanes, acc[r][v]);
      }
    }
  }

  // The weights of one row, rounded, and the sum of the rounded ones.
  typedef type* Weights;
  REDRAFTER_INLINE Weights weights_in(float*, Operand* rounded) { return rounded; }
  REDRAFTER_INLINE vf weigh(const float* row, int count, vf factor, vf offset, Weights to) {
    const vu ones = broadcast_u(0x3f803f80u);
    vf sum = zero();
    for (int c = 0; c < count; c += 2 * kLanes) {
      const vf low = exp2_weight<4>(load(row + c) * factor - offset);
      const vf high =
          c + kLanes < count ? exp2_weight<4>(load(row + c + kLanes) * factor - offset) : zero();
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      memcpy(to + c, &both, sizeof(both));
      sum = dot_bf16(sum, bits_as<vu>(both), ones);
    }
    return sum;
  }

  template <int kR, int kV>
  static inline __attribute__((always_inline)) void accumulate(const type* p, int count,
                                                               const Values& values, int column,
                                                               const float* decay, float* out,
                                                               int head_dim) {
    vf acc[kR][kV] = {};
    const uint32_t* row = values.rows + column / kLanes * values.vector_stride;
    for (int t = 0; t < count; t += 2, row += values.stride) {
      vu x[kV];
      for (int v = 0; v < kV; ++v) x[v] = load_as<vu>(row + v * values.vector_stride);
      for (int r = 0; r < kR; ++r) {
        const vu weight = broadcast_pair(p + r * kTile + t);
        for (int v = 0; v < kV; ++v) acc[r][v] = dot_bf16(acc[r][v], x[v], weight);
      }
    }
    for (int r = 0; r < kR; ++r) {
      for (int v = 0; v < kV; ++v) {
        float* to = out + r * head_dim + column + v * kLanes;
        REDRAFTER_VARIANT::store(
            to, fmadd(REDRAFTER_VARIANT::load(to), broadcast(decay[r]), acc[r][v]));
      }
    }
  }
};
#endif

// ---- one unit ---------------------------------------------------------------------------------

struct Unit {
  int request;
  int head;       // KV head
  int first_row;  // of the request's rows times query heads per KV head
  int rows;
};

// Keys [begin, end) of a unit, for one thread. slot: where the partial result goes, -1: complete.
struct Piece {
  Unit unit;
  int begin, end;
  int part;
  int slot;
};

// Results of `rows` query rows so far. `max` is of scores in units of the exponent, scale *
// log2(e): the rounded number itself is kept, so that the same one is subtracted from scores and
// compared later. Weights are relative to 2^max.
struct State {
  float* out;  // [rows][head_dim], not yet divided by the sum
  float* max;  // [rows]
  float* sum;  // [rows][kLanes], to be added up
};

// Which of the 64 keys from logical position `first` on a row may see: all of the context, then
// the row's own mask bits. `first_seen`: the first key that the row's window leaves it.
REDRAFTER_INLINE uint64_t visible(const int64_t* mask, int words, int context, int first) {
  const int64_t offset = (int64_t)first - context;
  if (offset <= -64) return ~(uint64_t)0;
  if (offset < 0) {
    const uint64_t context_bits = ((uint64_t)1 << -offset) - 1;
    return context_bits | (uint64_t)mask[0] << -offset;
  }
  const int word = (int)(offset / 64), shift = (int)(offset % 64);
  uint64_t bits = word < words ? (uint64_t)mask[word] >> shift : 0;
  if (shift && word + 1 < words) bits |= (uint64_t)mask[word + 1] << (64 - shift);
  return bits;
}

// Which of the 64 keys from `first` on are `first_seen` or later.
REDRAFTER_INLINE uint64_t in_window(int first_seen, int first) {
  const int64_t left_out = (int64_t)first_seen - first;
  return left_out <= 0 ? ~(uint64_t)0 : left_out >= 64 ? 0 : ~(uint64_t)0 << left_out;
}

// The vector mask of columns [first, first + kLanes) of a tile.
REDRAFTER_INLINE vi lanes_of(const uint64_t* bits, int first) {
  vu bit;
  for (int i = 0; i < kLanes; ++i) bit[i] = 1u << i;
  return (vi)((broadcast_u((uint32_t)(bits[first / 64] >> first % 64)) & bit) != 0);
}

template <class Math, int kR>
static inline void scores_of(const typename Math::Operand* query, int head_dim,
                             const typename Math::Keys& keys, int count, float* scores) {
  int column = 0;
  for (; column + (kColumns - 1) * kLanes < count; column += kColumns * kLanes) {
    Math::template score<kR, kColumns>(query, head_dim, keys, column, scores);
  }
  if (kColumns == 4 && column + 1 * kLanes < count) {
    Math::template score<kR, 2>(query, head_dim, keys, column, scores);
    column += 2 * kLanes;
  }
  if (column < count) Math::template score<kR, 1>(query, head_dim, keys, column, scores);
}

template <class Math, int kR>
static inline void add_values(const typename Math::Operand* p, int count,
                              const typename Math::Values& values, const float* decay, float* out,
                              int head_dim) {
  int column = 0;
  for (; column + kColumns * kLanes <= head_dim; column += kColumns * kLanes) {
    Math::template accumulate<kR, kColumns>(p, count, values, column, decay, out, head_dim);
  }
  for (; column < head_dim; column += kLanes) {
    Math::template accumulate<kR, 1>(p, count, values, column, decay, out, head_dim);
  }
}

// One tile for kR rows: scores, mask, softmax update, values. `bits`: null, or kMaskWords per row.
template <class Math, int kR>
__attribute__((noinline)) void tile_rows(const TreeAttentionArgs& args, int count,
                                         const typename Math::Operand* query,
                                         const typename Math::Keys& keys,
                                         const typename Math::Values& values, const uint64_t* bits,
                                         const State& state) {
  constexpr int kTile = Math::kTile;
  alignas(64) float scores[kR * kTile];
  alignas(64) typename Math::Operand rounded[kR * kTile];
  alignas(64) float offset[kR], decay[kGroup + kLanes];
  const int head_dim = args.head_dim;
  scores_of<Math, kR>(query, head_dim, keys, count, scores);

  const float factor = args.softcap > 0.0f ? kLog2E : args.scale * kLog2E;
  for (int r = 0; r < kR; ++r) {
    float* row = scores + r * kTile;
    if (args.softcap > 0.0f) {
      for (int c = 0; c < count; c += kLanes) {
        store(row + c, tanh(load(row + c) * (args.scale / args.softcap)) * args.softcap);
      }
    }
    vf best = broadcast(kMinusInf);
    for (int c = 0; c < count; c += kLanes) {
      vf s = load(row + c);
      if (bits) {
        s = select(lanes_of(bits + r * kMaskWords, c), s, broadcast(kMinusInf));
        store(row + c, s);
      }
      best = max(s, best);
    }
    const float old = state.max[r], tile_max = reduce_max(best) * factor;
    const float now = tile_max > old ? tile_max : old;
    state.max[r] = now;
    // Nothing visible so far: any finite reference gives weights of 0 and not NaN.
    offset[r] = now == kMinusInf ? 0.0f : now;
    decay[r] = old - offset[r];
  }
  for (int r = 0; r < kR; r += kLanes) store(decay + r, exp2_weight<6>(load(decay + r)));
  const typename Math::Weights weights = Math::weights_in(scores, rounded);
  for (int r = 0; r < kR; ++r) {
    const vf sum = Math::weigh(scores + r * kTile, count, broadcast(factor), broadcast(offset[r]),
                               weights + r * kTile);
    float* total = state.sum + r * kLanes;
    store(total, fmadd(load(total), broadcast(decay[r]), sum));
  }
  add_values<Math, kR>(weights, count, values, decay, state.out, head_dim);
}

template <class Math>
static void run_piece(const TreeAttentionArgs& args, const Piece& piece, char* scratch,
                      const State& state) {
  typedef typename Math::type type;
  typedef typename Math::Operand Operand;
  const int head_dim = args.head_dim, rows = piece.unit.rows, request = piece.unit.request;
  const int group = args.query_heads / args.kv_heads;
  const int context = args.context_lens[request];

  float* key_scratch = (float*)(void*)scratch;
  float* value_scratch = key_scratch + Math::key_floats(head_dim);
  Operand* query = (Operand*)(void*)(value_scratch + Math::value_floats(head_dim));
  uint64_t bits[kMaxRows * kMaskWords];
  int window_begin = 0;  // from here on every row sees all of the context

  for (int m = 0; m < rows; ++m) {
    const int index = piece.unit.first_row + m;
    const type* source =
        (const type*)args.query +
        (args.row_start[request] + (int64_t)(index / group)) * args.query_stride[0] +
        ((int64_t)piece.unit.head * group + index % group) * args.query_stride[1];
    Math::pack_query(source, args.query_stride[2], head_dim, query + (int64_t)m * head_dim);
    state.max[m] = kMinusInf;
    if (args.first_seen) {
      const int first_seen = args.first_seen[args.row_start[request] + index / group];
      window_begin = first_seen > window_begin ? first_seen : window_begin;
    }
  }
  memset(state.out, 0, sizeof(float) * rows * head_dim);
  memset(state.sum, 0, sizeof(float) * rows * kLanes);

  TileSource tile = {&args,
                     args.block_table + args.request_index[request] * args.block_table_stride,
                     piece.unit.head, piece.begin, 0};
  for (; tile.first < piece.end; tile.first += tile.count) {
    tile.count = Math::tile_count(args, tile.first, piece.end);
    const bool masked = tile.first + tile.count > context || tile.count % kLanes != 0 ||
                        tile.first < window_begin;
    if (masked) {
      for (int m = 0; m < rows; ++m) {
        const int64_t row = args.row_start[request] + (piece.unit.first_row + m) / group;
        const int64_t* mask = args.masks + row * args.mask_stride;
        for (int w = 0; w < kMaskWords; ++w) {
          const int left = tile.count - 64 * w;
          const uint64_t inside = left >= 64 ? ~(uint64_t)0
                                  : left > 0 ? ((uint64_t)1 << left) - 1
                                             : 0;
          bits[m * kMaskWords + w] =
              inside & visible(mask, args.mask_words, context, tile.first + 64 * w);
          if (args.first_seen) {
            bits[m * kMaskWords + w] &= in_window(args.first_seen[row], tile.first + 64 * w);
          }
        }
      }
    }
    const typename Math::Keys keys = Math::prepare_keys(tile, key_scratch);
    const typename Math::Values values = Math::prepare_values(tile, value_scratch);
    for (int m = 0; m < rows; m += kGroup) {
      const State at = {state.out + m * head_dim, state.max + m, state.sum + m * kLanes};
      const Operand* q = query + (int64_t)m * head_dim;
      const uint64_t* at_bits = masked ? bits + m * kMaskWords : nullptr;
#define REDRAFTER_ROWS(n)                                               \
  case n:                                                               \
    tile_rows<Math, n>(args, tile.count, q, keys, values, at_bits, at); \
    break;
      switch (rows - m) {
        REDRAFTER_ROWS(1)
        REDRAFTER_ROWS(2)
        REDRAFTER_ROWS(3)
        REDRAFTER_ROWS(4)
        REDRAFTER_ROWS(5)
        default:
          tile_rows<Math, kGroup>(args, tile.count, q, keys, values, at_bits, at);
      }
#undef REDRAFTER_ROWS
    }
  }
}

// ---- results ----------------------------------------------------------------------------------

template <class Element>
REDRAFTER_INLINE void write_row(const TreeAttentionArgs& args, const Unit& unit, int m,
                                const float* values, float factor) {
  typedef typename Element::type type;
  const int group = args.query_heads / args.kv_heads;
  const int index = unit.first_row + m;
  type* target = (type*)args.out +
                 (args.row_start[unit.request] + (int64_t)(index / group)) * args.out_stride[0] +
                 ((int64_t)unit.head * group + index % group) * args.out_stride[1];
  for (int d = 0; d < args.head_dim; d += kLanes) {
    const vf v = load(values + d) * factor;
    if (args.out_stride[2] == 1) {
      Element::store(target + d, v);
    } else {
      type narrow[kLanes];
      Element::store(narrow, v);
      for (int i = 0; i < kLanes; ++i) target[(d + i) * args.out_stride[2]] = narrow[i];
    }
  }
}

// What a row's result is multiplied with. A row that sees nothing has sum 0 and result 0.
REDRAFTER_INLINE float inverse(const TreeAttentionArgs& args, const Unit& unit, int m, float max,
                               float sum) {
  if (sum == 0.0f) return 0.0f;
  if (!args.sinks) return 1.0f / sum;
  // The sink counts in the sum and has no value. It may be larger than every score.
  const int group = args.query_heads / args.kv_heads;
  const float sink = args.sinks[unit.head * group + (unit.first_row + m) % group] * kLog2E;
  const float best = sink > max ? sink : max;
  const float weight = exp2_weight<6>(broadcast(max - best))[0];
  return weight / (sum * weight + exp2_weight<6>(broadcast(sink - best))[0]);
}

// One row of a unit whose keys were cut into `count` pieces; out = sum of the pieces' results, each
// weighted by 2^(its max - the largest max).
template <class Element>
static void merge_row(const TreeAttentionArgs& args, const Unit& unit, int m, const State* pieces,
                      int count, float* result) {
  const int head_dim = args.head_dim;
  float best = kMinusInf;
  for (int i = 0; i < count; ++i) best = pieces[i].max[m] > best ? pieces[i].max[m] : best;
  const float reference = best == kMinusInf ? 0.0f : best;
  vf total = zero();
  memset(result, 0, sizeof(float) * head_dim);
  for (int i = 0; i < count; ++i) {
    const vf weight = exp2_weight<6>(broadcast(pieces[i].max[m] - reference));
    total = fmadd(load(pieces[i].sum + m * kLanes), weight, total);
    const float* out = pieces[i].out + (int64_t)m * head_dim;
    for (int d = 0; d < head_dim; d += kLanes) {
      store(result + d, fmadd(load(out + d), weight, load(result + d)));
    }
  }
  write_row<Element>(args, unit, m, result, inverse(args, unit, m, best, reduce_add(total)));
}

// ---- the whole call ---------------------------------------------------------------------------

REDRAFTER_INLINE size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct Split {
  Unit unit;
  int first_slot;
  int count;
};

// Granules of keys of a request: [first, end).
struct Granules {
  int first, end;
  REDRAFTER_INLINE Granules of(const TreeAttentionArgs& args, int request) {
    const int keys = args.context_lens[request] + args.row_count[request];
    return {args.first_key ? args.first_key[request] / kGranule : 0,
            (keys + kGranule - 1) / kGranule};
  }
};

template <class Element, class Math>
static void run(const TreeAttentionArgs& args) {
  const int group = args.query_heads / args.kv_heads, head_dim = args.head_dim;

  // Cost of a granule of keys: a row of query is 1, preparing the keys as much as a few rows.
  const int kPrepare = 6;
  int64_t total = 0;
  int units = 0, most_rows = 0;
  for (int r = 0; r < args.requests; ++r) {
    const int rows = args.row_count[r] * group;
    if (rows <= 0) continue;
    const Granules range = Granules::of(args, r);
    const int granules = range.end - range.first;
    for (int first = 0; first < rows; first += kMaxRows) {
      const int m = rows - first < kMaxRows ? rows - first : kMaxRows;
      most_rows = m > most_rows ? m : most_rows;
      total += (int64_t)args.kv_heads * granules * (m + kPrepare);
      units += args.kv_heads;
    }
  }
  if (units == 0) return;
  int parts = omp_in_parallel() ? 1 : omp_get_max_threads();
  if (parts > total / kMinCost) parts = (int)(total / kMinCost);
  if (parts < 1) parts = 1;

  // Memory: the plan, then per part the prepared tile, the queries and the state of a complete
  // unit, then the states of the slots.
  const size_t state_bytes = aligned(sizeof(float) * most_rows * head_dim) +
                             aligned(sizeof(float) * most_rows) +
                             aligned(sizeof(float) * most_rows * kLanes);
  const size_t part_bytes =
      aligned(sizeof(float) * (Math::key_floats(head_dim) + Math::value_floats(head_dim))) +
      aligned(sizeof(float) * most_rows * head_dim) + state_bytes +
      aligned(sizeof(float) * head_dim);
  const int max_slots = 2 * parts, max_pieces = units + parts;
  const size_t plan_bytes = aligned(sizeof(Piece) * max_pieces) + aligned(sizeof(Split) * parts) +
                            aligned(sizeof(State) * max_slots);
  char* memory = args.scratch(plan_bytes + part_bytes * parts + state_bytes * max_slots);
  Piece* pieces = (Piece*)(void*)memory;
  Split* splits = (Split*)(void*)(memory + aligned(sizeof(Piece) * max_pieces));
  State* slots = (State*)(void*)((char*)splits + aligned(sizeof(Split) * parts));
  char* part_memory = memory + plan_bytes;
  const auto state_at = [&](char* p) {
    State state;
    state.out = (float*)(void*)p;
    state.max = (float*)(void*)(p + aligned(sizeof(float) * most_rows * head_dim));
    state.sum = (float*)(void*)((char*)state.max + aligned(sizeof(float) * most_rows));
    return state;
  };
  for (int s = 0; s < max_slots; ++s) {
    slots[s] = state_at(part_memory + part_bytes * parts + state_bytes * s);
  }

  // Lay the units end to end and cut at equal costs.
  int num_pieces = 0, num_splits = 0, num_slots = 0, part = 0;
  int64_t done = 0;
  for (int r = 0; r < args.requests; ++r) {
    const int rows = args.row_count[r] * group;
    const int keys = args.context_lens[r] + args.row_count[r];
    const Granules range = Granules::of(args, r);
    const int granules = range.end;
    // Keys in front of the first are in a block that may be another request's by now.
    const int first_key = args.first_key ? args.first_key[r] / args.block_size * args.block_size : 0;
    for (int first = 0; first < rows; first += kMaxRows) {
      const int m = rows - first < kMaxRows ? rows - first : kMaxRows;
      for (int head = 0; head < args.kv_heads; ++head) {
        const Unit unit = {r, head, first, m};
        const int64_t cost = m + kPrepare;
        const int first_piece = num_pieces;
        int begin = range.first;
        while (begin < granules) {
          int end = granules;
          if (part + 1 < parts) {
            // The next cut, to the nearest granule; a sliver at either end is not worth a merge.
            const int64_t cut = total * (part + 1) / parts - done;
            const int64_t at = range.first + (cut + cost / 2) / cost;
            if (at < granules) end = (int)at;
            if (end - begin < 2) end = begin;
            if (granules - end < 2) end = granules;
          }
          if (end > begin) {
            const int last = end * kGranule < keys ? end * kGranule : keys;
            const int from = begin * kGranule > first_key ? begin * kGranule : first_key;
            pieces[num_pieces++] = {unit, from, last, part, -1};
          }
          if (end < granules ||
              (part + 1 < parts &&
               done + cost * (granules - range.first) >= total * (part + 1) / parts)) {
            ++part;
          }
          begin = end;
        }
        done += cost * (granules - range.first);
        const int count = num_pieces - first_piece;
        if (count > 1) {
          splits[num_splits++] = {unit, num_slots, count};
          for (int i = 0; i < count; ++i) pieces[first_piece + i].slot = num_slots++;
        }
      }
    }
  }

  REDRAFTER_OMP(parallel num_threads(parts) if (parts > 1)) {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    char* own = part_memory + part_bytes * thread;
    float* row_result = (float*)(void*)own;
    char* own_state = own + aligned(sizeof(float) * head_dim);
    const State complete = state_at(own_state);
    char* tile_memory = own_state + state_bytes;
    for (int i = 0; i < num_pieces; ++i) {
      if (pieces[i].part % threads != thread) continue;
      const Piece& piece = pieces[i];
      const State& state = piece.slot < 0 ? complete : slots[piece.slot];
      run_piece<Math>(args, piece, tile_memory, state);
      if (piece.slot >= 0) continue;
      for (int m = 0; m < piece.unit.rows; ++m) {
        write_row<Element>(args, piece.unit, m, state.out + (int64_t)m * head_dim,
                           inverse(args, piece.unit, m, state.max[m],
                                   reduce_add(load(state.sum + m * kLanes))));
      }
    }
    if (num_splits > 0) {
      REDRAFTER_OMP(barrier)
      int index = 0;
      for (int s = 0; s < num_splits; ++s) {
        for (int m = 0; m < splits[s].unit.rows; ++m) {
          if (index++ % threads != thread) continue;
          merge_row<Element>(args, splits[s].unit, m, slots + splits[s].first_slot, splits[s].count,
                             row_result);
        }
      }
    }
  }
}

}  // namespace

void tree_attention(const TreeAttentionArgs& args) {
  switch (args.dtype) {
    case Dtype::kFloat:
      run<Float, FloatMath<Float>>(args);
      break;
    case Dtype::kHalf:
      run<Half, FloatMath<Half>>(args);
      break;
    case Dtype::kBFloat16:
#ifdef REDRAFTER_HAS_BF16_DOT
      run<BFloat16, Bf16Math>(args);
#else
      run<BFloat16, FloatMath<BFloat16>>(args);
#endif
      break;
  }
}

}  // namespace REDRAFTER_VARIANT
}  // namespace redrafter
