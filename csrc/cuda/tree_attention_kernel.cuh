// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// Attention of tree rows over the paged cache, in the manner of flash-decoding.
//
// A block has one request, one KV head, one piece of that request's keys and up to 64 query rows:
// all query heads of the KV head for all nodes lie side by side, so that the keys are read once for
// all of them. Where they are more than 64, the blocks that read the same keys have neighbouring
// numbers: they run at the same time, and all but the first find the keys in the L2 cache. Pieces
// leave a sum, a maximum and an unnormalised result each; a second kernel merges them. With one
// piece the result is written at once.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/mma.h"

namespace redrafter::cuda {

// Strides in elements of the tensor's type.
struct TreeAttentionArgs {
  void* out;
  const void* query;
  const void* key_cache;
  const void* value_cache;
  int64_t out_stride[3], query_stride[3];
  int64_t key_stride[4], value_stride[4];  // block, head, token, feature
  const int32_t* block_table;
  int64_t block_table_stride;
  const int32_t* request_index;
  const int32_t* row_start;
  const int32_t* row_count;
  const int32_t* context_lens;
  const int64_t* masks;
  int64_t mask_stride;
  int mask_words;
  int64_t tokens;         // T, rows of query
  int64_t table_rows, table_columns, blocks;
  int requests, query_heads, kv_heads, head_dim, block_size;
  float scale, softcap;
  int window;          // 0: none
  const float* sinks;  // [query_heads], or null
  int pieces;
  // [pieces][T][query_heads] of head_dim sums, and of (maximum, sum) pairs; null with one piece.
  float* partial;
  float* partial_state;
};

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kRows = 64;  // query rows of a block
constexpr int kWarps = 4;

template <class T>
struct Number;
template <>
struct Number<float> {
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};
template <>
struct Number<__nv_bfloat16> {
  static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16(x); }
};
template <>
struct Number<__half> {
  static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half narrow(float x) { return __float2half(x); }
};

// One request as the device sees it. Counts that do not fit the tensors are cut, as nothing can be
// reported from here.
struct Request {
  int64_t first_row;
  int rows, context, keys;
  // Of a window: keys in front of `first` are seen by no row, from `last` on by all.
  int first = 0, last = 0;
  const int32_t* blocks;

  __device__ Request(const TreeAttentionArgs& args, int r) {
    first_row = args.row_start[r];
    const int64_t index = args.request_index[r];
    const int64_t space = args.table_columns * args.block_size;
    const bool fits = first_row >= 0 && index >= 0 && index < args.table_rows;
    int64_t count = fits ? args.row_count[r] : 0;
    count = min(count, static_cast<int64_t>(args.mask_words) * 64);
    count = min(count, args.tokens - first_row);
    context = max(args.context_lens[r], 0);
    count = min(count, space - context);
    rows = static_cast<int>(max(count, static_cast<int64_t>(0)));
    keys = context + rows;
    blocks = args.block_table + (fits ? index : 0) * args.block_table_stride;
    if (args.window > 0) {
      const int64_t before = static_cast<int64_t>(context) - args.window;
      first = static_cast<int>(max(before + 1, static_cast<int64_t>(0)));
      last = static_cast<int>(max(before + rows, static_cast<int64_t>(0)));
    }
  }
};

// Where the token at a logical position lies.
struct Place {
  int64_t block = -1;  // -1: nowhere
  int within = 0;

  __device__ __forceinline__ Place(const TreeAttentionArgs& args, const Request& request,
                                   int position) {
    // Blocks in front of a window may be another request's by now.
    if (position >= request.keys || position < request.first) return;
    const auto at = static_cast<unsigned>(position), size = static_cast<unsigned>(args.block_size);
    const int64_t found = request.blocks[at / size];
    if (found < 0 || found >= args.blocks) return;
    block = found;
    within = static_cast<int>(at % size);
  }
  // Of its features in a cache, in elements; -1 if nowhere.
  __device__ __forceinline__ int64_t offset(int head, const int64_t (&stride)[4]) const {
    return block < 0 ? -1 : block * stride[0] + head * stride[1] + within * stride[2];
  }
};

// How many of a request's rows, from row `from` on, row `node` sees.
__device__ inline int count_from(const TreeAttentionArgs& args, const Request& request, int node,
                                 int from) {
  const int64_t* mask = args.masks + (request.first_row + node) * args.mask_stride;
  int count = 0;
  for (int w = from / 64; w * 64 < request.rows; ++w) {
    auto bits = static_cast<unsigned long long>(mask[w]);
    if (w == from / 64) bits &= ~0ull << from % 64;
    if (request.rows - w * 64 < 64) bits &= (1ull << (request.rows - w * 64)) - 1;
    count += __popcll(bits);
  }
  return count;
}

// The first position that row `node` sees through its window: the last `window` of the keys that
// it would see, one of which is its own. Behind the end of the context if it has lost a row too.
__device__ __forceinline__ int seen_from(const TreeAttentionArgs& args, const Request& request,
                                         int node) {
  if (args.window == 0 || node >= request.rows) return 0;
  return request.context + max(count_from(args, request, node, 0), 1) - args.window;
}

// Whether row `node` sees the key at this position. first: its `seen_from`.
__device__ __forceinline__ bool sees(const TreeAttentionArgs& args, const Request& request,
                                     int node, int position, int first) {
  if (position < request.context) return position >= first;
  const int other = position - request.context;
  if (other >= request.rows) return false;
  const int64_t* mask = args.masks + (request.first_row + node) * args.mask_stride;
  if (!(mask[other / 64] >> (other % 64) & 1)) return false;
  return first <= request.context || count_from(args, request, node, other) <= args.window;
}

// What a row's sum of values is multiplied with. max: of its scores, in units of log 2.
__device__ __forceinline__ float inverse(const TreeAttentionArgs& args, int head, float max,
                                         float sum) {
  if (!(sum > 0.0f)) return 0.0f;
  if (!args.sinks) return 1.0f / sum;
  // The sink counts in the sum and has no value. It may be larger than every score.
  const float sink = args.sinks[head] * kLog2E, best = fmaxf(sink, max);
  const float weight = exp2f(max - best);
  return weight / (sum * weight + exp2f(sink - best));
}

// A score in units of log 2, after the soft cap.
__device__ __forceinline__ float scaled(const TreeAttentionArgs& args, float score) {
  if (args.softcap > 0.0f) {
    return args.softcap * kLog2E * tanhf(score * (args.scale / args.softcap));
  }
  return score * (args.scale * kLog2E);
}

// What a block works on. Grid (pieces x tiles of query rows, KV heads, requests), tiles fastest.
struct Work {
  int piece, tile, head, request;
  __device__ explicit Work(const TreeAttentionArgs& args) {
    const int tiles = static_cast<int>(gridDim.x) / args.pieces;
    piece = static_cast<int>(blockIdx.x) / tiles;
    tile = static_cast<int>(blockIdx.x) % tiles;
    head = static_cast<int>(blockIdx.y);
    request = static_cast<int>(blockIdx.z);
  }
};

// The keys of one piece: [begin, end), cut at multiples of a tile.
struct Piece {
  int begin, end;
  __device__ Piece(const TreeAttentionArgs& args, const Request& request, int piece, int tile) {
    const int before = request.first / tile;
    const int tiles = (request.keys + tile - 1) / tile - before;
    const int each = (tiles + args.pieces - 1) / args.pieces * tile;
    begin = min(before * tile + piece * each, request.keys);
    end = min(begin + each, request.keys);
  }
};

// Where a query row's result goes: the output itself, or the piece's partial result.
template <class T>
struct Target {
  T* out = nullptr;
  int64_t out_stride = 0;
  float* partial = nullptr;
  float factor = 1.0f;

  __device__ Target(const TreeAttentionArgs& args, int64_t row, int head, int piece, float max,
                    float sum) {
    if (args.pieces == 1) {
      out = static_cast<T*>(args.out) + row * args.out_stride[0] + head * args.out_stride[1];
      out_stride = args.out_stride[2];
      factor = inverse(args, head, max, sum);
      return;
    }
    const int64_t at = (piece * args.tokens + row) * args.query_heads + head;
    partial = args.partial + at * args.head_dim;
    args.partial_state[at * 2] = max;
    args.partial_state[at * 2 + 1] = sum;
  }
  __device__ __forceinline__ void write(int feature, float value) const {
    if (out) {
      // A row that sees nothing has sums of 0.
      out[feature * out_stride] = Number<T>::narrow(value * factor);
    } else {
      partial[feature] = value;
    }
  }
};

// ---- tensor cores: bfloat16 and float16, head sizes known to the compiler -----------------------

template <class T, int kDim>
struct Tiles {
  // Keys of a tile: large heads leave room for few.
  static constexpr int kKeys = kDim > 128 ? 16 : 64;
  // A row's padding: eight rows then start in different banks.
  static constexpr int kStride = kDim + 8;
  static constexpr int kStages = 2;
  static constexpr int kBytes =
      (kRows * kStride + kStages * 2 * kKeys * kStride) * static_cast<int>(sizeof(T));
};

// Calls visit(row, feature) for this thread's 16-byte parts of kCount rows of a tile.
template <int kCount, int kDim, class Visit>
__device__ __forceinline__ void for_each_part(int thread, Visit&& visit) {
  constexpr int kParts = kDim / 8, kThreads = kWarps * 32;
  if constexpr (kThreads % kParts == 0) {  // the same features of every row
    const int first = thread / kParts, feature = thread % kParts * 8;
#pragma unroll
    for (int row = 0; row < kCount; row += kThreads / kParts) visit(first + row, feature);
  } else {
#pragma unroll
    for (int i = 0; i < kCount * kParts; i += kThreads) {
      visit((i + thread) / kParts, (i + thread) % kParts * 8);
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kWarps * 32) tree_attention_mma(const TreeAttentionArgs args) {
  using Tile = Tiles<T, kDim>;
  constexpr int kKeys = Tile::kKeys, kStride = Tile::kStride;
  REDRAFTER_DYNAMIC_SHARED(raw);
  T* query_tile = reinterpret_cast<T*>(raw);
  T* key_tiles = query_tile + kRows * kStride;
  T* value_tiles = key_tiles + Tile::kStages * kKeys * kStride;

  const Work work(args);
  const int piece_index = work.piece, head = work.head, first = work.tile * kRows;
  const Request request(args, work.request);
  const int group = args.query_heads / args.kv_heads;
  const int rows = min(request.rows * group - first, kRows);
  if (rows <= 0) return;
  const Piece piece(args, request, piece_index, kKeys);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;

  const T* keys = static_cast<const T*>(args.key_cache);
  const T* values = static_cast<const T*>(args.value_cache);
  // Where a tile's keys and values lie, looked up once a token and a tile ahead; -1 for none.
  __shared__ int64_t offsets[Tile::kStages][2][kKeys];
  const auto look_up = [&](int tile_first, int stage) {
    for (int key = thread; key < kKeys; key += kWarps * 32) {
      const Place place(args, request, tile_first + key);
      offsets[stage][0][key] = place.offset(head, args.key_stride);
      offsets[stage][1][key] = place.offset(head, args.value_stride);
    }
  };
  const auto load_tile = [&](int stage) {
    const int64_t* k = offsets[stage][0];
    const int64_t* v = offsets[stage][1];
    for_each_part<kKeys, kDim>(thread, [&](int key, int feature) {
      const int at = (stage * kKeys + key) * kStride + feature;
      cp_async_16(key_tiles + at, keys + feature + max(k[key], int64_t{0}), k[key] >= 0);
      cp_async_16(value_tiles + at, values + feature + max(v[key], int64_t{0}), v[key] >= 0);
    });
    cp_async_commit();
  };

  if (args.pieces > 1 && piece.begin >= piece.end) {  // the merge looks at nothing but the sum
    for (int i = thread; i < rows; i += kWarps * 32) {
      const int index = first + i;
      Target<T>(args, request.first_row + index / group, head * group + index % group, piece_index,
                -INFINITY, 0.0f);
    }
    return;
  }
  // Arrives with the first tile.
  for_each_part<kRows, kDim>(thread, [&](int row, int feature) {
    const int index = row < rows ? first + row : 0;
    const int64_t at = (request.first_row + index / group) * args.query_stride[0] +
                       (head * group + index % group) * args.query_stride[1] + feature;
    cp_async_16(query_tile + row * kStride + feature, static_cast<const T*>(args.query) + at,
                row < rows);
  });
  look_up(piece.begin, 0);
  look_up(piece.begin + kKeys, 1);
  __syncthreads();
  if (piece.begin < piece.end) load_tile(0);

  // All loops over fragments are unrolled: an array that is indexed at run time lies in memory.
  float result[kDim / 8][4];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) result[i][j] = 0.0f;
  }
  // Scores become units of log 2 only in exponents; with a soft cap they are in them already.
  const float factor = args.softcap > 0.0f ? 1.0f : args.scale * kLog2E;
  // This lane's two rows (lane / 4, and 8 below) of the warp's 16.
  float max_seen[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  int node[2], from[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    node[half] = (first + warp * 16 + lane / 4 + half * 8) / group;
    from[half] = seen_from(args, request, node[half]);
  }

  int stage = 0;
  for (int at = piece.begin; at < piece.end; at += kKeys, stage ^= 1) {
    if (at + kKeys < piece.end) {
      load_tile(stage ^ 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    if (at + 2 * kKeys < piece.end) look_up(at + 2 * kKeys, stage);

    float scores[kKeys / 8][4];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i][j] = 0.0f;
    }
    const T* key_tile = key_tiles + stage * kKeys * kStride;
    const T* value_tile = value_tiles + stage * kKeys * kStride;
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, query_tile + (warp * 16 + lane % 16) * kStride + k + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kKeys; n += 16) {
        uint32_t b[4];
        ldmatrix_x4(b, key_tile + (n + lane / 16 * 8 + lane % 8) * kStride + k + lane / 8 % 2 * 8);
        mma_m16n8k16(scores[n / 8], a, {b[0], b[1]}, T{});
        mma_m16n8k16(scores[n / 8 + 1], a, {b[2], b[3]}, T{});
      }
    }

    float best[2] = {max_seen[0], max_seen[1]};
    if (at + kKeys > request.context || args.softcap > 0.0f || at < request.last) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int position = at + i * 8 + lane % 4 * 2 + j % 2;
          const bool seen =
              node[j / 2] < request.rows &&
              sees(args, request, node[j / 2], position, from[j / 2]);
          const float score = args.softcap > 0.0f ? scaled(args, scores[i][j]) : scores[i][j];
          scores[i][j] = seen ? score : -INFINITY;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) best[j / 2] = fmaxf(best[j / 2], scores[i][j]);
    }
    float reference[2], decay[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      best[half] = fmaxf(best[half], __shfl_xor_sync(0xffffffffu, best[half], 1));
      best[half] = fmaxf(best[half], __shfl_xor_sync(0xffffffffu, best[half], 2));
      // Nothing visible so far: any finite reference gives weights of 0 and not NaN.
      reference[half] = best[half] == -INFINITY ? 0.0f : best[half] * factor;
      decay[half] = exp2f(fmaf(max_seen[half], factor, -reference[half]));
      max_seen[half] = best[half];
      sum[half] *= decay[half];
    }
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) result[i][j] *= decay[j / 2];
    }
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
      // The scores' fragments, two by two, are the weights' fragment of the second product.
      uint32_t a[4];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int i = n / 8 + part / 2, half = part % 2;
        const auto weight = [&](int j) {
          return exp2f(fmaf(scores[i][half * 2 + j], factor, -reference[half]));
        };
        const uint32_t packed = pack(weight(0), weight(1), T{});
        // The sum of the rounded weights: they then add up to one.
        sum[half] += unpack_low(packed, T{}) + unpack_high(packed, T{});
        a[part] = packed;
      }
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, value_tile + (n + lane % 16) * kStride + d + lane / 16 * 8);
        mma_m16n8k16(result[d / 8], a, {b[0], b[1]}, T{});
        mma_m16n8k16(result[d / 8 + 1], a, {b[2], b[3]}, T{});
      }
    }
    __syncthreads();  // before the stage is loaded again
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    const int row = warp * 16 + lane / 4 + half * 8;
    if (row >= rows) continue;
    const int query_head = head * group + (first + row) % group;
    const Target<T> target(args, request.first_row + node[half], query_head, piece_index,
                           max_seen[half] * factor, sum[half]);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        target.write(i * 8 + lane % 4 * 2 + j, result[i][half * 2 + j]);
      }
    }
  }
}

// ---- any type and head size: a warp per query row, sums in float32 -------------------------------

constexpr int kMaxDim = 256;

// The 1 lets ptxas have the registers that it wants.
template <class T>
__global__ void __launch_bounds__(kWarps * 32, 1) tree_attention_plain(const TreeAttentionArgs args) {
  REDRAFTER_DYNAMIC_SHARED(raw);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int dim = args.head_dim;
  float* query = reinterpret_cast<float*>(raw) + warp * dim;

  const Work work(args);
  const int piece_index = work.piece, head = work.head;
  const Request request(args, work.request);
  const int group = args.query_heads / args.kv_heads;
  const int row = work.tile * kWarps + warp;
  if (row >= request.rows * group) return;  // the whole warp
  const int node = row / group, query_head = head * group + row % group;
  const Piece piece(args, request, piece_index, 32);
  const int from = seen_from(args, request, node);

  for (int d = lane; d < dim; d += 32) {
    query[d] = Number<T>::widen(
        static_cast<const T*>(args.query)[(request.first_row + node) * args.query_stride[0] +
                                          query_head * args.query_stride[1] +
                                          d * args.query_stride[2]]);
  }
  __syncwarp();

  float result[kMaxDim / 32];
  for (int i = 0; i < kMaxDim / 32; ++i) result[i] = 0.0f;
  float max_seen = -INFINITY, sum = 0.0f;
  const T* keys = static_cast<const T*>(args.key_cache);
  const T* values = static_cast<const T*>(args.value_cache);
  for (int at = piece.begin; at < piece.end; at += 32) {
    const int position = at + lane;
    const Place place(args, request, position);
    const int64_t k = place.offset(head, args.key_stride);
    const int64_t value_of_lane = place.offset(head, args.value_stride);
    float score = -INFINITY;
    if (k >= 0 && sees(args, request, node, position, from)) {
      score = 0.0f;
      for (int d = 0; d < dim; ++d) {
        score = fmaf(query[d], Number<T>::widen(keys[k + d * args.key_stride[3]]), score);
      }
      score = scaled(args, score);
    }
    float best = fmaxf(score, max_seen);
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, lanes));
    }
    const float reference = best == -INFINITY ? 0.0f : best;
    const float decay = exp2f(max_seen - reference), weight = exp2f(score - reference);
    max_seen = best;
    sum = sum * decay + weight;
    for (int i = 0; i < kMaxDim / 32; ++i) result[i] *= decay;
    for (int other = 0; other < 32; ++other) {
      const float w = __shfl_sync(0xffffffffu, weight, other);
      const int64_t v = __shfl_sync(0xffffffffu, value_of_lane, other);
      if (w == 0.0f || v < 0) continue;  // values that are not seen are not read
      for (int i = 0; i < kMaxDim / 32; ++i) {
        const int d = i * 32 + lane;
        if (d < dim) {
          result[i] = fmaf(w, Number<T>::widen(values[v + d * args.value_stride[3]]), result[i]);
        }
      }
    }
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  const Target<T> target(args, request.first_row + node, query_head, piece_index, max_seen, sum);
  for (int i = 0; i < kMaxDim / 32; ++i) {
    const int d = i * 32 + lane;
    if (d < dim) target.write(d, result[i]);
  }
}

// ---- the pieces of a row together ---------------------------------------------------------------

constexpr int kMaxPieces = 32;  // a lane each

// At once where they lie side by side.
template <class T>
__device__ __forceinline__ void store_four(T* out, int64_t stride, const float4& value) {
  if constexpr (sizeof(T) == 2) {
    if (stride == 1 && reinterpret_cast<uintptr_t>(out) % 8 == 0) {
      *reinterpret_cast<uint2*>(out) =
          make_uint2(pack(value.x, value.y, T{}), pack(value.z, value.w, T{}));
      return;
    }
  }
  out[0] = Number<T>::narrow(value.x);
  out[stride] = Number<T>::narrow(value.y);
  out[2 * stride] = Number<T>::narrow(value.z);
  out[3 * stride] = Number<T>::narrow(value.w);
}

// Grid (rows x heads / kWarps, 1, requests), a warp per row and head, four features a lane.
template <class T>
__global__ void __launch_bounds__(kWarps * 32) tree_attention_merge(const TreeAttentionArgs args) {
  const Request request(args, static_cast<int>(blockIdx.z));
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int index = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (index >= request.rows * args.query_heads) return;  // the whole warp
  const int64_t row = request.first_row + index / args.query_heads;
  const int head = index % args.query_heads;
  const int64_t first = row * args.query_heads + head, step = args.tokens * args.query_heads;
  // Each lane makes the weight of one piece.
  const bool real = lane < args.pieces;
  const float* state = args.partial_state + (first + (real ? lane : 0) * step) * 2;
  const float sum = real ? state[1] : 0.0f;
  float best = sum == 0.0f ? -INFINITY : state[0];
  float weight = best;
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, lanes));
  }
  weight = sum == 0.0f ? 0.0f : exp2f(weight - best);
  float total = sum * weight;
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, lanes);
  }
  if (args.sinks) {
    weight *= inverse(args, head, best, total);
  } else {
    weight = total == 0.0f ? 0.0f : weight / total;
  }

  T* out = static_cast<T*>(args.out) + row * args.out_stride[0] + head * args.out_stride[1];
  for (int group = 0; group < args.head_dim; group += 128) {
    const int feature = group + lane * 4;
    const bool mine = feature < args.head_dim;
    const float* partial = args.partial + first * args.head_dim + feature;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int piece = 0; piece < args.pieces; ++piece, partial += step * args.head_dim) {
      const float w = __shfl_sync(0xffffffffu, weight, piece);
      if (w == 0.0f || !mine) continue;  // what has no weight was not written
      const float4 p = *reinterpret_cast<const float4*>(partial);
      value.x = fmaf(p.x, w, value.x);
      value.y = fmaf(p.y, w, value.y);
      value.z = fmaf(p.z, w, value.z);
      value.w = fmaf(p.w, w, value.w);
    }
    if (mine) store_four(out + feature * args.out_stride[2], args.out_stride[2], value);
  }
}

}  // namespace redrafter::cuda
