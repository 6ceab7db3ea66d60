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
  }
};

// Where in a cache the token at this logical position starts, in elements; -1 if nowhere.
__device__ __forceinline__ int64_t token_offset(const TreeAttentionArgs& args,
                                                const Request& request, int position, int head,
                                                const int64_t (&stride)[4]) {
  if (position >= request.keys) return -1;
  const int64_t block = request.blocks[position / args.block_size];
  if (block < 0 || block >= args.blocks) return -1;
  return block * stride[0] + head * stride[1] + (position % args.block_size) * stride[2];
}

// Whether row `node` sees the key at this position.
__device__ __forceinline__ bool sees(const TreeAttentionArgs& args, const Request& request,
                                     int node, int position) {
  if (position < request.context) return true;
  const int other = position - request.context;
  if (other >= request.rows) return false;
  const int64_t* mask = args.masks + (request.first_row + node) * args.mask_stride;
  return mask[other / 64] >> (other % 64) & 1;
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
    const int tiles = (request.keys + tile - 1) / tile;
    const int each = (tiles + args.pieces - 1) / args.pieces * tile;
    begin = min(piece * each, request.keys);
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
      factor = sum > 0.0f ? 1.0f / sum : 0.0f;
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

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 x) {
  return *reinterpret_cast<const uint16_t*>(&x);
}
__device__ __forceinline__ uint32_t bits_of(__half x) {
  return *reinterpret_cast<const uint16_t*>(&x);
}

template <class T, int kDim>
__global__ void __launch_bounds__(kWarps * 32) tree_attention_mma(const TreeAttentionArgs args) {
  using Tile = Tiles<T, kDim>;
  constexpr int kKeys = Tile::kKeys, kStride = Tile::kStride, kChunks = kDim / 8;
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
  const auto load_tile = [&](int tile_first, int stage) {
    for (int i = thread; i < kKeys * kChunks; i += kWarps * 32) {
      const int key = i / kChunks, feature = i % kChunks * 8;
      const int position = tile_first + key;
      const int at = (stage * kKeys + key) * kStride + feature;
      const int64_t k = token_offset(args, request, position, head, args.key_stride);
      const int64_t v = token_offset(args, request, position, head, args.value_stride);
      cp_async_16(key_tiles + at, k < 0 ? keys : keys + k + feature, k >= 0);
      cp_async_16(value_tiles + at, v < 0 ? values : values + v + feature, v >= 0);
    }
    cp_async_commit();
  };

  if (piece.begin < piece.end) load_tile(piece.begin, 0);
  for (int i = thread; i < kRows * kDim; i += kWarps * 32) {
    const int row = i / kDim, feature = i % kDim, index = first + row;
    T value = Number<T>::narrow(0.0f);
    if (row < rows) {
      const int64_t token = request.first_row + index / group;
      value = static_cast<const T*>(
          args.query)[token * args.query_stride[0] +
                      (head * group + index % group) * args.query_stride[1] +
                      feature * args.query_stride[2]];
    }
    query_tile[row * kStride + feature] = value;
  }

  float result[kDim / 8][4];
  for (int i = 0; i < kDim / 8; ++i) {
    for (int j = 0; j < 4; ++j) result[i][j] = 0.0f;
  }
  // This lane's two rows (lane / 4, and 8 below) of the warp's 16.
  float max_seen[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  int node[2];
  for (int half = 0; half < 2; ++half) {
    node[half] = (first + warp * 16 + lane / 4 + half * 8) / group;
  }

  int stage = 0;
  for (int at = piece.begin; at < piece.end; at += kKeys, stage ^= 1) {
    if (at + kKeys < piece.end) {
      load_tile(at + kKeys, stage ^ 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();

    float scores[kKeys / 8][4];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
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

    const bool masked = at + kKeys > request.context;
    float best[2] = {max_seen[0], max_seen[1]};
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int position = at + i * 8 + lane % 4 * 2 + j % 2;
        float score = scaled(args, scores[i][j]);
        if (masked && (node[j / 2] >= request.rows ||
                       !sees(args, request, node[j / 2], position))) {
          score = -INFINITY;
        }
        scores[i][j] = score;
        best[j / 2] = fmaxf(best[j / 2], score);
      }
    }
    float reference[2], decay[2];
    for (int half = 0; half < 2; ++half) {
      best[half] = fmaxf(best[half], __shfl_xor_sync(0xffffffffu, best[half], 1));
      best[half] = fmaxf(best[half], __shfl_xor_sync(0xffffffffu, best[half], 2));
      // Nothing visible so far: any finite reference gives weights of 0 and not NaN.
      reference[half] = best[half] == -INFINITY ? 0.0f : best[half];
      decay[half] = exp2f(max_seen[half] - reference[half]);
      max_seen[half] = best[half];
      sum[half] *= decay[half];
    }
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      for (int j = 0; j < 4; ++j) result[i][j] *= decay[j / 2];
    }
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
      // The scores' fragments, two by two, are the weights' fragment of the second product.
      uint32_t a[4];
      for (int part = 0; part < 4; ++part) {
        const int i = n / 8 + part / 2, half = part % 2;
        uint32_t packed = 0;
        for (int j = 0; j < 2; ++j) {
          const T weight = Number<T>::narrow(exp2f(scores[i][half * 2 + j] - reference[half]));
          // The sum of the rounded weights: they then add up to one.
          sum[half] += Number<T>::widen(weight);
          packed |= bits_of(weight) << (16 * j);
        }
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

  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    const int row = warp * 16 + lane / 4 + half * 8;
    if (row >= rows) continue;
    const int query_head = head * group + (first + row) % group;
    const Target<T> target(args, request.first_row + node[half], query_head, piece_index,
                           max_seen[half], sum[half]);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      for (int j = 0; j < 2; ++j) {
        target.write(i * 8 + lane % 4 * 2 + j, result[i][half * 2 + j]);
      }
    }
  }
}

// ---- any type and head size: a warp per query row, sums in float32 -------------------------------

constexpr int kMaxDim = 256;

template <class T>
__global__ void __launch_bounds__(kWarps * 32) tree_attention_plain(const TreeAttentionArgs args) {
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
    const int64_t k = token_offset(args, request, position, head, args.key_stride);
    float score = -INFINITY;
    if (k >= 0 && sees(args, request, node, position)) {
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
      if (w == 0.0f) continue;  // values that are not seen are not read
      const int64_t v = token_offset(args, request, at + other, head, args.value_stride);
      if (v < 0) continue;
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

template <class T>
__global__ void __launch_bounds__(kWarps * 32) tree_attention_merge(const TreeAttentionArgs args) {
  const Request request(args, static_cast<int>(blockIdx.z));
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int index = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (index >= request.rows * args.query_heads) return;  // the whole warp
  const int64_t row = request.first_row + index / args.query_heads;
  const int head = index % args.query_heads;
  const auto state_of = [&](int piece) {
    return args.partial_state + ((piece * args.tokens + row) * args.query_heads + head) * 2;
  };
  float best = -INFINITY, total = 0.0f;
  for (int piece = 0; piece < args.pieces; ++piece) best = fmaxf(best, state_of(piece)[0]);
  const float reference = best == -INFINITY ? 0.0f : best;
  for (int piece = 0; piece < args.pieces; ++piece) {
    total += state_of(piece)[1] * exp2f(state_of(piece)[0] - reference);
  }
  const float factor = total > 0.0f ? 1.0f / total : 0.0f;
  T* out = static_cast<T*>(args.out) + row * args.out_stride[0] + head * args.out_stride[1];
  for (int d = lane; d < args.head_dim; d += 32) {
    float value = 0.0f;
    for (int piece = 0; piece < args.pieces; ++piece) {
      const float* state = state_of(piece);
      if (state[1] == 0.0f) continue;
      const int64_t at = (piece * args.tokens + row) * args.query_heads + head;
      value = fmaf(args.partial[at * args.head_dim + d], exp2f(state[0] - reference), value);
    }
    out[d * args.out_stride[2]] = Number<T>::narrow(value * factor);
  }
}

}  // namespace redrafter::cuda
