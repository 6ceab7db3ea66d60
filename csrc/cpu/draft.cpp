// SPDX-License-Identifier: Apache-2.0
// redrafter::draft on the CPU: a whole beam search in one parallel region.
//
// Small batches read every weight once per step, so the time goes into reading weights. The threads
// share out the columns of each layer (draft_phases.h), and no logits are written to memory: each
// chunk of them is scanned while it is still in a core's cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/threads.h"
#include "draft_kernel.h"
#include "draft_phases.h"
#include "draft_select.h"

namespace redrafter {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kFillerScore = -50000.0f;
constexpr int64_t kRowBlock = 64;  // rows whose sums are held at once
constexpr int64_t kMaxUnitPanels = 4;  // panels of a layer that a thread takes at a time
// Below this many bytes of weights a second thread costs more than it saves.
constexpr int64_t kBytesPerThread = 64 * 1024;

// ---- the drafter's layers ----------------------------------------------------------------------

struct Linear {
  const char* weights = nullptr;
  int64_t groups = 0;
  int64_t panels = 0;
  int64_t bytes() const { return panels * groups * kGroupBytes; }
};

struct Model {
  int64_t hidden = 0, exit_dim = 0, vocab = 0;
  bool bf16 = false, rnn = false, has_input_proj = false;
  Linear rnn_w, rnn_u;
  const float* rnn_bias = nullptr;
  // The layer that reads [context; state], that is input_proj or else the first block, is split:
  // the context half is the same for all beams and steps.
  Linear context_half, state_half;
  const float* split_bias = nullptr;
  std::vector<Linear> blocks;  // without the split one
  std::vector<const float*> block_biases;
  Linear head;

  bool split() const { return context_half.weights != nullptr; }

  int64_t bytes() const {
    int64_t total = rnn_w.bytes() + rnn_u.bytes() + context_half.bytes() + state_half.bytes();
    for (const Linear& block : blocks) total += block.bytes();
    return total + head.bytes();
  }
};

// Takes the layers one by one from the list that vllm_redrafter/ops/draft.py packs.
class LayerReader {
 public:
  LayerReader(const std::vector<Tensor>& layers, bool bf16) : layers_(layers), bf16_(bf16) {}

  Linear linear(const char* name, int64_t outputs, int64_t inputs) {
    const Tensor& t = next(name);
    const int64_t per_group = bf16_ ? 2 : 1;
    const int64_t groups = (inputs + per_group - 1) / per_group;
    const int64_t panels = (outputs + kPanel - 1) / kPanel;
    STD_TORCH_CHECK(t.dim() == 4 && t.is_contiguous() && t.size(0) == panels &&
                        t.size(1) == groups && t.size(2) == kPanel && t.size(3) == per_group &&
                        t.scalar_type() == (bf16_ ? ScalarType::BFloat16 : ScalarType::Float),
                    "redrafter::draft: ", name, " is not a packed layer of ", inputs,
                    " inputs and ", outputs, " outputs; pack it with pack_linear.");
    return {static_cast<const char*>(t.const_data_ptr()), groups, panels};
  }

  const float* bias(const char* name, int64_t outputs) {
    const Tensor& t = next(name);
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == outputs && t.is_contiguous() &&
                        t.scalar_type() == ScalarType::Float,
                    "redrafter::draft: ", name, " must be a contiguous float32 vector of ", outputs,
                    " numbers.");
    return static_cast<const float*>(t.const_data_ptr());
  }

  void finish() const {
    STD_TORCH_CHECK(next_ == layers_.size(), "redrafter::draft: got ", layers_.size(),
                    " layer tensors, expected ", next_, ".");
  }

 private:
  const Tensor& next(const char* name) {
    STD_TORCH_CHECK(next_ < layers_.size(), "redrafter::draft: the layer tensor ", name,
                    " is missing.");
    const Tensor& t = layers_[next_++];
    STD_TORCH_CHECK(t.is_cpu(), "redrafter::draft: ", name, " is not on the CPU.");
    return t;
  }

  const std::vector<Tensor>& layers_;
  bool bf16_;
  size_t next_ = 0;
};

Model read_model(const std::vector<Tensor>& layers, int64_t hidden, int64_t exit_dim, int64_t vocab,
                 int64_t num_blocks, bool rnn) {
  STD_TORCH_CHECK(!layers.empty(), "redrafter::draft: there are no layers.");
  // Bounds, or the sizes that layers must have could not be computed.
  STD_TORCH_CHECK(hidden > 0 && hidden < INT32_MAX && exit_dim > 0 && exit_dim < INT32_MAX &&
                      vocab > 0 && vocab < INT32_MAX && num_blocks >= 0 &&
                      num_blocks <= static_cast<int64_t>(layers.size()),
                  "redrafter::draft: hidden ", hidden, ", exit_dim ", exit_dim, ", head_rows ",
                  vocab, " or num_blocks ", num_blocks, " is impossible.");
  Model m;
  m.hidden = hidden;
  m.exit_dim = exit_dim;
  m.vocab = vocab;
  m.rnn = rnn;
  m.has_input_proj = exit_dim != 2 * hidden;
  m.bf16 = layers.back().scalar_type() == ScalarType::BFloat16;
  LayerReader reader(layers, m.bf16);
  if (rnn) {
    m.rnn_w = reader.linear("rnn_w", hidden, hidden);
    m.rnn_u = reader.linear("rnn_u", hidden, hidden);
    m.rnn_bias = reader.bias("rnn_u.bias", hidden);
  }
  if (m.has_input_proj || num_blocks > 0) {
    m.context_half = reader.linear("the context half", exit_dim, hidden);
    m.state_half = reader.linear("the state half", exit_dim, hidden);
    m.split_bias = reader.bias("the bias of the split layer", exit_dim);
  }
  for (int64_t i = m.has_input_proj ? 0 : 1; i < num_blocks; ++i) {
    m.blocks.push_back(reader.linear("a block", exit_dim, exit_dim));
    m.block_biases.push_back(reader.bias("a block's bias", exit_dim));
  }
  m.head = reader.linear("the head", vocab, exit_dim);
  reader.finish();
  return m;
}

// ---- memory of one call ------------------------------------------------------------------------

struct Job {
  int64_t batch, width, length;
  int top_k;
  int64_t max_rows() const { return length > 1 ? batch * width : batch; }
};

// A buffer that a calling thread keeps from draft to draft: fresh pages would cost more than the
// small layers do.
class Arena {
 public:
  template <class T>
  T* take(int64_t count) {
    used_ = (used_ + 63) & ~size_t{63};
    T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += count * sizeof(T);
    return at;
  }

  template <class Layout>
  void lay_out(Layout&& layout) {
    base_ = nullptr;
    used_ = 0;
    layout(*this);
    if (used_ > size_) {
      storage_.reset(static_cast<char*>(std::aligned_alloc(64, (used_ + 63) & ~size_t{63})));
      size_ = storage_ ? used_ : 0;
      STD_TORCH_CHECK(storage_, "redrafter::draft: no memory for ", used_, " bytes.");
    }
    base_ = storage_.get();
    used_ = 0;
    layout(*this);
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> storage_;
  size_t size_ = 0, used_ = 0;
  char* base_ = nullptr;
};

// Rows of operands (see draft_kernel.h).
struct Operands {
  char* data = nullptr;
  int64_t stride = 0;  // bytes
  char* row(int64_t r) const { return data + r * stride; }
};

struct Buffers {
  Operands context, embedded, state_before, state_after, x[2];
  float *context_floats, *split_context, *state[2], *x_floats, *chunk_max, *chunk_sum;
  uint64_t* heap_keys;
  TopHeap* heaps;       // [threads][rows]
  int64_t* heaps_step;  // [threads], the step that a thread's heaps are from
  float* logits;  // [threads][kRowBlock][kChunk]
  float* sums;    // [threads][kRowBlock][kMaxUnitPanels * kPanel]
  float* read;    // [threads][hidden]

  void lay_out(Arena& a, const Model& m, const Job& job, int threads, int64_t operand_bytes) {
    const int64_t rows = job.max_rows();
    const auto operands = [&](int64_t count, int64_t width) {
      // One column more: an odd width ends in half a pair, whose other half must be zero.
      const int64_t stride = ((width + 1) * operand_bytes + 63) / 64 * 64;
      return Operands{a.take<char>(count * stride), stride};
    };
    context = operands(job.batch, m.hidden);
    embedded = operands(rows, m.hidden);
    state_before = operands(rows, m.hidden);
    state_after = operands(rows, m.hidden);
    for (Operands& o : x) o = operands(rows, m.exit_dim);
    context_floats = a.take<float>(job.batch * m.hidden);
    split_context = a.take<float>(job.batch * m.exit_dim);
    for (float*& s : state) s = a.take<float>(rows * m.hidden);
    x_floats = a.take<float>(rows * m.exit_dim);
    const int64_t chunks = (m.head.panels + kChunkPanels - 1) / kChunkPanels;
    chunk_max = a.take<float>(chunks * rows);
    chunk_sum = a.take<float>(chunks * rows);
    const int64_t capacity = std::min<int64_t>(std::max<int64_t>(job.width, job.top_k), m.vocab);
    heap_keys = a.take<uint64_t>(threads * rows * capacity);
    heaps = a.take<TopHeap>(threads * rows);
    heaps_step = a.take<int64_t>(threads);
    logits = a.take<float>(threads * kRowBlock * kChunk);
    sums = a.take<float>(threads * kRowBlock * kMaxUnitPanels * kPanel);
    read = a.take<float>(threads * m.hidden);
    if (!heaps) return;
    std::fill_n(heaps_step, threads, -1);
    for (int64_t i = 0; i < threads * rows; ++i) {
      heaps[i] = TopHeap{heap_keys + i * capacity, static_cast<int32_t>(capacity), 0, 0, 0.0f};
    }
  }
};

// ---- tensors the draft reads and writes --------------------------------------------------------

struct Table {
  const char* data;
  int64_t row_bytes;
  Source type;
};

Table table_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, "redrafter::draft: ", name,
                  " must be a matrix on the CPU.");
  STD_TORCH_CHECK(t.stride(1) == 1 || t.size(1) <= 1, "redrafter::draft: the rows of ", name,
                  " must be contiguous, but the stride within a row is ", t.stride(1), ".");
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "redrafter::draft: ", name, " must be float32, bfloat16 or float16.");
  return {static_cast<const char*>(t.const_data_ptr()),
          stride_bytes(t, 0),
          type == ScalarType::Float      ? Source::kFloat
          : type == ScalarType::BFloat16 ? Source::kBf16
                                         : Source::kHalf};
}

struct Tables {
  Table context, embedding;
  int64_t embedding_rows;
  const int64_t* token;
  int64_t token_stride;
  const int64_t* draft_vocab;  // may be null
  int64_t* tokens;             // [batch][length][width]
  int64_t* parents;
  float* scores;
};

// ---- the draft ---------------------------------------------------------------------------------

class Draft {
 public:
  Draft(const Model& model, const Job& job, const Tables& tables, Arena& arena, int threads)
      : m_(model),
        job_(job),
        io_(tables),
        threads_(threads),
        product_(model.bf16 ? REDRAFTER_VARIANT_OF(draft_product_bf16)
                            : REDRAFTER_VARIANT_OF(draft_product_float)),
        finish_(REDRAFTER_VARIANT_OF(draft_finish)),
        scan_(REDRAFTER_VARIANT_OF(draft_scan)),
        read_(REDRAFTER_VARIANT_OF(draft_read)),
        operand_bytes_(REDRAFTER_VARIANT_OF(draft_operand_bytes)(model.bf16)),
        zeros_(std::max(model.hidden, model.exit_dim), 0.0f),
        phases_(1 + job.length * (4 + static_cast<int64_t>(model.blocks.size())), threads) {
    arena.lay_out([&](Arena& a) { b_.lay_out(a, m_, job_, threads_, operand_bytes_); });
  }

  // False if a token of the draft has no embedding; the outputs are then of no use.
  bool run() {
    REDRAFTER_OMP(parallel num_threads(threads_)) { work(omp_get_thread_num()); }
    return !bad_token_.load();
  }

 private:
  void work(int thread) {
    int64_t phase = 0;
    const auto share = [&](int64_t units, auto&& run) { phases_.run(phase++, thread, units, run); };
    share(job_.batch, [&](int64_t request) { start(thread, request); });
    for (int64_t step = 0; step < job_.length; ++step) {
      const int64_t per_request = step == 0 ? 1 : job_.width;
      const int64_t rows = job_.batch * per_request;
      const Units context = units_of(step == 0 ? m_.context_half.panels : 0);
      const Units cell = units_of(m_.rnn_w.panels);
      if (context.count + cell.count > 0) {
        share(context.count + cell.count, [&](int64_t unit) {
          if (unit < context.count) {
            context_half(thread, context, unit);
          } else {
            recurrent_cell(thread, cell, unit - context.count, step, rows);
          }
        });
      }
      if (m_.split()) {
        const Units units = units_of(m_.state_half.panels);
        share(units.count,
              [&](int64_t unit) { split_layer(thread, units, unit, rows, per_request); });
      }
      const int64_t first = first_x(step);
      for (size_t i = 0; i < m_.blocks.size(); ++i) {
        const Units units = units_of(m_.blocks[i].panels);
        share(units.count,
              [&](int64_t unit) { block(thread, units, unit, i, rows, (first + i) & 1); });
      }
      share(chunk_count(), [&](int64_t chunk) { head(thread, chunk, step, rows); });
      share(job_.batch,
            [&](int64_t request) { beam_step(thread, request, step, rows, per_request); });
    }
  }

  // -- layers --

  // A layer's panels, cut into units of work.
  struct Units {
    int64_t panels, size, count;
    int64_t first(int64_t unit) const { return unit * size; }
    int64_t of(int64_t unit) const { return std::min(size, panels - first(unit)); }
  };

  Units units_of(int64_t panels) const {
    // Several a thread, or the threads would not finish together.
    const int64_t size = std::clamp<int64_t>(panels / (8 * threads_), 1, kMaxUnitPanels);
    return {panels, size, (panels + size - 1) / size};
  }

  // Calls finish(row, first column, count, sums) for every row of one unit of a layer.
  template <class Finish>
  void layer(int thread, const Units& units, int64_t unit, const Segment* segments, int count,
             int64_t outputs, int64_t rows, Finish&& finish) {
    float* sums = b_.sums + thread * kRowBlock * kMaxUnitPanels * kPanel;
    const int64_t column = units.first(unit) * kPanel;
    const int64_t width = std::min(units.of(unit) * kPanel, outputs - column);
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      ProductArgs args{{segments[0], segments[count - 1]},
                       count,
                       std::min(kRowBlock, rows - row),
                       units.first(unit),
                       units.of(unit),
                       sums,
                       kMaxUnitPanels * kPanel};
      for (Segment& s : args.segments) {
        s.input = static_cast<const char*>(s.input) + row * s.input_stride;
      }
      product_(args);
      for (int64_t r = 0; r < args.rows; ++r) {
        finish(row + r, column, width, sums + r * args.out_stride);
      }
    }
  }

  static Segment segment(const Linear& linear, const Operands& input) {
    return {linear.weights, linear.groups, input.data, input.stride};
  }

  void context_half(int thread, const Units& units, int64_t unit) {
    const Segment s = segment(m_.context_half, b_.context);
    layer(thread, units, unit, &s, 1, m_.exit_dim, job_.batch,
          [&](int64_t row, int64_t column, int64_t count, const float* sums) {
            finish_({sums, m_.split_bias + column, nullptr, false, count,
                     b_.split_context + row * m_.exit_dim + column, nullptr, column},
                    m_.bf16);
          });
  }

  void recurrent_cell(int thread, const Units& units, int64_t unit, int64_t step, int64_t rows) {
    const Segment s[2] = {segment(m_.rnn_w, b_.embedded), segment(m_.rnn_u, b_.state_before)};
    // The first state is zero, and so is what U makes of it.
    layer(thread, units, unit, s, step == 0 ? 1 : 2, m_.hidden, rows,
          [&](int64_t row, int64_t column, int64_t count, const float* sums) {
            float* state = b_.state[step & 1] + row * m_.hidden + column;
            finish_({sums, m_.rnn_bias + column, nullptr, true, count, state,
                     b_.state_after.row(row), column},
                    m_.bf16);
            concatenate(row, column, count, state, step);
          });
  }

  // input_proj, or the first residual block: x = W_c c + W_s s + b, or x + SiLU(that).
  void split_layer(int thread, const Units& units, int64_t unit, int64_t rows,
                   int64_t per_request) {
    const Segment s = segment(m_.state_half, b_.state_after);
    layer(thread, units, unit, &s, 1, m_.exit_dim, rows,
          [&](int64_t row, int64_t column, int64_t count, const float* sums) {
            float* x = b_.x_floats + row * m_.exit_dim + column;
            finish_({sums, b_.split_context + row / per_request * m_.exit_dim + column,
                     m_.has_input_proj ? nullptr : x, !m_.has_input_proj, count, x,
                     b_.x[0].row(row), column},
                    m_.bf16);
          });
  }

  void block(int thread, const Units& units, int64_t unit, size_t index, int64_t rows,
             int64_t current) {
    const Segment s = segment(m_.blocks[index], b_.x[current]);
    layer(thread, units, unit, &s, 1, m_.exit_dim, rows,
          [&](int64_t row, int64_t column, int64_t count, const float* sums) {
            float* x = b_.x_floats + row * m_.exit_dim + column;
            finish_({sums, m_.block_biases[index] + column, x, true, count, x,
                     b_.x[current ^ 1].row(row), column},
                    m_.bf16);
          });
  }

  // Which of the two x operands a step fills first, and which one its head reads.
  int64_t first_x(int64_t step) const { return m_.split() ? 0 : step & 1; }
  const Operands& head_input(int64_t step) const {
    return b_.x[(first_x(step) + m_.blocks.size()) & 1];
  }

  int64_t chunk_count() const { return (m_.head.panels + kChunkPanels - 1) / kChunkPanels; }

  void head(int thread, int64_t chunk, int64_t step, int64_t rows) {
    TopHeap* heaps = b_.heaps + thread * job_.max_rows();
    if (b_.heaps_step[thread] != step) {  // this thread's first chunk
      b_.heaps_step[thread] = step;
      for (int64_t r = 0; r < rows; ++r) heaps[r].size = heaps[r].ties = 0;
    }
    const Operands& x = head_input(step);
    float* logits = b_.logits + thread * kRowBlock * kChunk;
    const int64_t panel = chunk * kChunkPanels;
    const int64_t panels = std::min(kChunkPanels, m_.head.panels - panel);
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      const int64_t block = std::min(kRowBlock, rows - row);
      product_({{{m_.head.weights, m_.head.groups, x.row(row), x.stride}, {}},
                1, block, panel, panels, logits, kChunk});
      for (int64_t r = 0; r < block; ++r) {
        const int64_t at = chunk * rows + row + r;
        scan_({logits + r * kChunk, std::min(panels * kPanel, m_.vocab - panel * kPanel),
               panel * kPanel, job_.top_k == 0, &heaps[row + r], &b_.chunk_max[at],
               &b_.chunk_sum[at]});
      }
    }
  }

  class HeadAgain : public LogitSource {
   public:
    HeadAgain(const Draft& draft, int64_t step) : draft_(draft), step_(step) {}
    void logits(int64_t row, float* out) const override {
      const Linear& head = draft_.m_.head;
      std::vector<float> all(head.panels * kPanel);
      draft_.product_({{{head.weights, head.groups, draft_.head_input(step_).row(row), 0}, {}},
                       1, 1, 0, head.panels, all.data(), 0});
      std::memcpy(out, all.data(), draft_.m_.vocab * sizeof(float));
    }

   private:
    const Draft& draft_;
    int64_t step_;
  };

  // -- between steps --

  void start(int thread, int64_t request) {
    zero_after(b_.context.row(request), m_.hidden);
    const int64_t rows = job_.max_rows() / job_.batch;
    for (int64_t r = request * rows; r < (request + 1) * rows; ++r) {
      zero_after(b_.embedded.row(r), m_.hidden);
      zero_after(b_.state_before.row(r), m_.hidden);
      zero_after(b_.state_after.row(r), m_.hidden);
      for (const Operands& x : b_.x) zero_after(x.row(r), m_.exit_dim);
    }
    float* context = b_.context_floats + request * m_.hidden;
    read_(io_.context.data + request * io_.context.row_bytes, io_.context.type, m_.hidden, context);
    write_operand(context, m_.hidden, b_.context.row(request));
    begin_row(thread, request, request, io_.token[request * io_.token_stride], -1, 0);
  }

  // Selects a request's new beams and prepares their rows for the next step.
  void beam_step(int thread, int64_t request, int64_t step, int64_t rows, int64_t per_request) {
    const ScanResult scan{b_.heaps, b_.heaps_step, step, threads_, job_.max_rows(), b_.chunk_max,
                          b_.chunk_sum, chunk_count(), rows, m_.vocab, job_.top_k};
    std::vector<float> scores(job_.width, kFillerScore);
    scores[0] = 0.0f;
    const int64_t at = (request * job_.length + step) * job_.width;
    if (step > 0) {
      std::memcpy(scores.data(), io_.scores + at - job_.width, job_.width * sizeof(float));
    }
    const std::vector<Candidate> best =
        select_candidates(scan, HeadAgain(*this, step), request * per_request, step == 0,
                          scores.data(), static_cast<int>(job_.width));
    for (int64_t w = 0; w < job_.width; ++w) {
      const Candidate& candidate = best[w];
      const int64_t token = io_.draft_vocab ? io_.draft_vocab[candidate.row] : candidate.row;
      io_.tokens[at + w] = token;
      io_.parents[at + w] = candidate.parent;
      io_.scores[at + w] = candidate.score;
      if (step + 1 == job_.length) continue;
      // In the first step all beams share one row.
      const int64_t parent = request * per_request + (step == 0 ? 0 : candidate.parent);
      begin_row(thread, request, request * job_.width + w, token, parent, step + 1);
    }
  }

  // What the next step reads of a beam that ends in `token` and extends row `parent` (-1: none).
  void begin_row(int thread, int64_t request, int64_t row, int64_t token, int64_t parent,
                 int64_t step) {
    if (token < 0 || token >= io_.embedding_rows) {
      bad_token_.store(true, std::memory_order_relaxed);
      token = 0;
    }
    float* embedded = b_.read + thread * m_.hidden;
    read_(io_.embedding.data + token * io_.embedding.row_bytes, io_.embedding.type, m_.hidden,
          embedded);
    if (!m_.has_input_proj) {
      const float* context = b_.context_floats + request * m_.hidden;
      std::memcpy(b_.x_floats + row * m_.exit_dim, context, m_.hidden * sizeof(float));
      if (!m_.split()) {
        std::memcpy(b_.x[step & 1].row(row), b_.context.row(request), m_.hidden * operand_bytes_);
      }
    }
    if (m_.rnn) {
      write_operand(embedded, m_.hidden, b_.embedded.row(row));
      if (parent >= 0) {
        std::memcpy(b_.state_before.row(row), b_.state_after.row(parent),
                    m_.hidden * operand_bytes_);
      }
    } else {
      float* state = b_.state[step & 1] + row * m_.hidden;
      const float* before =
          parent >= 0 ? b_.state[(step & 1) ^ 1] + parent * m_.hidden : zeros_.data();
      finish_({embedded, before, nullptr, false, m_.hidden, state, b_.state_after.row(row), 0},
              m_.bf16);
      concatenate(row, 0, m_.hidden, state, step);
    }
  }

  // Without input_proj, x starts as [context; state]. Where the head reads that itself, steps take
  // turns: a request that is ahead must not overwrite what another may have to compute logits from.
  void concatenate(int64_t row, int64_t column, int64_t count, const float* state, int64_t step) {
    if (m_.has_input_proj) return;
    float* x = b_.x_floats + row * m_.exit_dim + m_.hidden + column;
    std::memcpy(x, state, count * sizeof(float));
    if (m_.split()) return;
    finish_({x, zeros_.data(), nullptr, false, count, nullptr, b_.x[step & 1].row(row),
             m_.hidden + column},
            m_.bf16);
  }

  void write_operand(const float* values, int64_t count, char* operand) const {
    finish_({values, zeros_.data(), nullptr, false, count, nullptr, operand, 0}, m_.bf16);
  }

  void zero_after(char* operand, int64_t count) const {
    std::memset(operand + count * operand_bytes_, 0, operand_bytes_);
  }

  const Model& m_;
  const Job& job_;
  const Tables& io_;
  const int threads_;
  void (*const product_)(const ProductArgs&);
  void (*const finish_)(const FinishArgs&, bool);
  void (*const scan_)(const ScanArgs&);
  void (*const read_)(const void*, Source, int64_t, float*);
  const int64_t operand_bytes_;
  const std::vector<float> zeros_;
  Buffers b_;
  Phases phases_;
  std::atomic<bool> bad_token_{false};
};

int64_t* int64_data(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long,
                  "redrafter::draft: ", name, " must be int64 on the CPU.");
  return static_cast<int64_t*>(t.data_ptr());
}

void draft(Tensor tokens, Tensor parents, Tensor scores, const Tensor context, const Tensor token,
           const Tensor embedding, std::optional<Tensor> draft_vocab, std::vector<Tensor> layers,
           int64_t head_rows, int64_t exit_dim, int64_t num_blocks, bool rnn, int64_t top_k) {
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.is_contiguous() && parents.is_contiguous() &&
                      scores.is_contiguous() && parents.dim() == 3 && scores.dim() == 3,
                  "redrafter::draft: tokens, parents and scores must be contiguous, "
                  "[batch, draft_length, beam_width].");
  for (int64_t d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(parents.size(d) == tokens.size(d) && scores.size(d) == tokens.size(d),
                    "redrafter::draft: tokens, parents and scores must have one shape.");
  }
  const Job job{tokens.size(0), tokens.size(2), tokens.size(1),
                static_cast<int>(std::min<int64_t>(top_k, head_rows))};
  STD_TORCH_CHECK(job.width >= 1 && job.width < INT32_MAX && job.length >= 1 &&
                      job.length < INT32_MAX && top_k >= 0,
                  "redrafter::draft: beam_width ", job.width, " and draft_length ", job.length,
                  " must be at least 1, and top_k ", top_k, " at least 0.");
  const Table embedding_table = table_of(embedding, "embedding");
  STD_TORCH_CHECK(embedding.size(0) >= 1, "redrafter::draft: embedding has no rows.");
  const Model model =
      read_model(layers, embedding.size(1), exit_dim, head_rows, num_blocks, rnn);
  STD_TORCH_CHECK(context.dim() == 2 && context.size(0) == job.batch &&
                      context.size(1) == model.hidden,
                  "redrafter::draft: context must be [", job.batch, ", ", model.hidden, "].");
  STD_TORCH_CHECK(token.dim() == 1 && token.size(0) == job.batch,
                  "redrafter::draft: token must be [", job.batch, "].");
  STD_TORCH_CHECK(scores.is_cpu() && scores.scalar_type() == ScalarType::Float,
                  "redrafter::draft: scores must be float32 on the CPU.");
  Tables tables{table_of(context, "context"),
                embedding_table,
                embedding.size(0),
                int64_data(token, "token"),
                token.stride(0),
                nullptr,
                int64_data(tokens, "tokens"),
                int64_data(parents, "parents"),
                static_cast<float*>(scores.data_ptr())};
  if (draft_vocab) {
    STD_TORCH_CHECK(draft_vocab->dim() == 1 && draft_vocab->size(0) == head_rows &&
                        draft_vocab->is_contiguous(),
                    "redrafter::draft: draft_vocab must be a contiguous vector of ", head_rows,
                    " ids.");
    tables.draft_vocab = int64_data(*draft_vocab, "draft_vocab");
  }
  if (job.batch == 0) return;

  const int64_t useful = 1 + model.bytes() / kBytesPerThread;
  const int threads =
      omp_in_parallel() ? 1 : static_cast<int>(std::min<int64_t>(omp_get_max_threads(), useful));
  static thread_local Arena arena;
  const bool good = Draft(model, job, tables, arena, threads).run();
  STD_TORCH_CHECK(good,
                  "redrafter::draft: a token (of `token`, or drafted through draft_vocab) has no "
                  "row among the ", embedding.size(0), " of the embedding.");
}

}  // namespace
}  // namespace redrafter

STABLE_TORCH_LIBRARY_IMPL(redrafter, CPU, m) {
  m.impl("draft", TORCH_BOX(&redrafter::draft));
}
