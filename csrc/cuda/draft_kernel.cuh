// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// What a draft does between its matrix products, an element per thread. These kernels move
// activations, a few rows of them, where the products read all weights: what counts is how few they
// are, not how they read.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "cuda/device.h"

namespace redrafter::cuda {

constexpr int kDraftThreads = 256;
constexpr float kFillerScore = -50000.0f;  // drafter/beam_search.py says why

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half(x);
}
__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

// Rows of an argument, which need not have the weights' dtype.
struct DraftTable {
  const void* data;
  ScalarType type;
  int64_t stride;  // in elements

  __device__ float at(int64_t row, int64_t column) const {
    const int64_t i = row * stride + column;
    if (type == ScalarType::Float) return static_cast<const float*>(data)[i];
    if (type == ScalarType::BFloat16) {
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    }
    return __half2float(static_cast<const __half*>(data)[i]);
  }
};

// Activations have the weights' dtype T, as products read and write it; arithmetic is float32.
template <class T>
struct DraftArgs {
  DraftTable context, embedding;
  int64_t embedding_rows;
  const int64_t* token;
  int64_t token_stride;
  const int64_t* tokens;   // [batch][length][width], as beam_step wrote them
  const int64_t* parents;
  int64_t batch, width, length, hidden, exit_dim;
  float* first_scores;     // [batch][width]
  T* contexts;             // [batch][hidden]
  T* embedded;             // [rows][hidden]; null without a cell
  T* states[2];            // [rows][hidden]
  const T* of_embedded;    // products, [rows][hidden]
  const T* of_state;
  const float* cell_bias;
  const T* of_context;     // products, [batch][exit_dim] and [rows][exit_dim]
  const T* of_new_state;
  const float* split_bias;
  bool has_input_proj;
  T* x;                    // [rows][exit_dim]
  bool concatenate;        // the head reads [context; state] itself
  const T* of_x;           // product, [rows][exit_dim]
  // Of this step.
  int64_t step, per_request;  // rows a request: one at first
  const T* kept_states;       // those that the last step's beams chose among
  T* next_states;             // with a cell what U is to be applied to, without one the new states
  T* new_states;              // what the layers read

  // A new state, and [context; state] where that is needed.
  __device__ void put_state(int64_t row, int64_t column, T state) const {
    new_states[row * hidden + column] = state;
    if (!concatenate) return;
    x[row * exit_dim + column] = contexts[row / per_request * hidden + column];
    x[row * exit_dim + hidden + column] = state;
  }
};

__device__ inline int64_t draft_column() {
  return static_cast<int64_t>(blockIdx.x) * kDraftThreads + threadIdx.x;
}

// Grid (columns of hidden, rows), like the next: what a step reads of each beam's last token and of
// its parent's state. The first step also prepares what all of them need.
template <class T>
__global__ void __launch_bounds__(kDraftThreads) draft_gather(const DraftArgs<T> args) {
  const int64_t row = blockIdx.y, column = draft_column();
  const int64_t b = row / args.per_request, w = row % args.per_request;
  if (args.step == 0 && blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < args.width; i += kDraftThreads) {
      args.first_scores[b * args.width + i] = i == 0 ? 0.0f : kFillerScore;
    }
  }
  if (column >= args.hidden) return;
  int64_t token, from = -1;
  if (args.step == 0) {
    token = args.token[b * args.token_stride];
    args.contexts[b * args.hidden + column] = from_float<T>(args.context.at(b, column));
  } else {
    const int64_t at = (b * args.length + args.step - 1) * args.width + w;
    token = args.tokens[at];
    // In the first step all beams share one row.
    from = args.step == 1 ? b : b * args.width + args.parents[at];
  }
  // The host cannot look at tokens without waiting for the device: one without a row is embedded as
  // zeros.
  const bool known = token >= 0 && token < args.embedding_rows;
  const T embedded = from_float<T>(known ? args.embedding.at(token, column) : 0.0f);
  const int64_t at = row * args.hidden + column;
  if (args.embedded) {
    args.embedded[at] = embedded;
    if (from >= 0) args.next_states[at] = args.kept_states[from * args.hidden + column];
  } else {
    const float before = from >= 0 ? to_float(args.kept_states[from * args.hidden + column]) : 0.0f;
    args.put_state(row, column, from_float<T>(to_float(embedded) + before));
  }
}

template <class T>
__global__ void __launch_bounds__(kDraftThreads) draft_cell(const DraftArgs<T> args) {
  const int64_t row = blockIdx.y, column = draft_column(), at = row * args.hidden + column;
  if (column >= args.hidden) return;
  float sum = to_float(args.of_embedded[at]) + args.cell_bias[column];
  // The first state is zero, and so is what U makes of it.
  if (args.step > 0) sum += to_float(args.of_state[at]);
  args.put_state(row, column, from_float<T>(silu(sum)));
}

// Grid (columns of exit_dim, rows), like the next. input_proj, or the first residual block.
template <class T>
__global__ void __launch_bounds__(kDraftThreads) draft_split(const DraftArgs<T> args) {
  const int64_t row = blockIdx.y, column = draft_column(), at = row * args.exit_dim + column;
  const int64_t b = row / args.per_request;
  if (column >= args.exit_dim) return;
  float x = to_float(args.of_context[b * args.exit_dim + column]) +
            to_float(args.of_new_state[at]) + args.split_bias[column];
  if (!args.has_input_proj) {
    const T before = column < args.hidden
                         ? args.contexts[b * args.hidden + column]
                         : args.new_states[row * args.hidden + column - args.hidden];
    x = to_float(before) + silu(x);
  }
  args.x[at] = from_float<T>(x);
}

template <class T>
__global__ void __launch_bounds__(kDraftThreads) draft_block(const DraftArgs<T> args,
                                                             const float* bias) {
  const int64_t row = blockIdx.y, column = draft_column(), at = row * args.exit_dim + column;
  if (column >= args.exit_dim) return;
  const float sum = to_float(args.of_x[at]) + bias[column];
  args.x[at] = from_float<T>(to_float(args.x[at]) + silu(sum));
}

}  // namespace redrafter::cuda
