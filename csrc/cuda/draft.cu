// SPDX-License-Identifier: Apache-2.0
// Compiled and emulated in CI; not yet run on a GPU.
// emulate-with: beam_step.cu
// redrafter::draft on CUDA: the products through torch's dispatcher, which has them from cuBLAS
// (and for the emulation's CPU tensors from the CPU); between them one kernel each. All memory
// comes from torch's allocator, so that a CUDA graph can own it.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cuda/beam_step.h"
#include "cuda/draft_kernel.cuh"
#include "cuda/launch.h"

namespace redrafter::cuda {
namespace {

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// out = input * weight, all of one dtype.
void product(const Tensor& out, const Tensor& input, const Tensor& weight) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(input), from(weight), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is ours to release
}

// Takes the layers one by one from the list of vllm_redrafter/ops/draft.py (plain_layers).
class LayerReader {
 public:
  LayerReader(const std::vector<Tensor>& layers, ScalarType type) : layers_(layers), type_(type) {}

  // Transposed, as products take it.
  Tensor weight(const char* name, int64_t outputs, int64_t inputs) {
    const Tensor& t = next(name);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == outputs && t.size(1) == inputs &&
                        t.scalar_type() == type_,
                    "redrafter::draft: ", name, " must be [", outputs, ", ", inputs,
                    "], of the head's dtype.");
    return torch::stable::transpose(t, 0, 1);
  }

  const float* bias(const char* name, int64_t outputs) {
    return vector_data<float>(next(name), ScalarType::Float, outputs, name);
  }

  void finish() const {
    STD_TORCH_CHECK(next_ == layers_.size(), "redrafter::draft: got ", layers_.size(),
                    " layer tensors, expected ", next_, ".");
  }

 private:
  const Tensor& next(const char* name) {
    STD_TORCH_CHECK(next_ < layers_.size(), "redrafter::draft: the layer tensor ", name,
                    " is missing.");
    check_device(layers_[next_], name);
    return layers_[next_++];
  }

  const std::vector<Tensor>& layers_;
  ScalarType type_;
  std::size_t next_ = 0;
};

struct Model {
  int64_t hidden, exit_dim, vocab;
  bool rnn, has_input_proj, split;
  ScalarType type;
  std::optional<Tensor> rnn_w, rnn_u, context_half, state_half, head;
  const float* cell_bias = nullptr;
  const float* split_bias = nullptr;
  std::vector<std::pair<Tensor, const float*>> blocks;  // without the split one
};

Model read_model(const std::vector<Tensor>& layers, int64_t hidden, int64_t exit_dim,
                 int64_t vocab, int64_t num_blocks, bool rnn) {
  STD_TORCH_CHECK(!layers.empty(), "redrafter::draft: there are no layers.");
  STD_TORCH_CHECK(hidden > 0 && hidden < INT32_MAX && exit_dim > 0 && exit_dim < INT32_MAX &&
                      vocab > 0 && vocab < INT32_MAX && num_blocks >= 0 &&
                      num_blocks <= static_cast<int64_t>(layers.size()),
                  "redrafter::draft: hidden ", hidden, ", exit_dim ", exit_dim, ", head_rows ",
                  vocab, " or num_blocks ", num_blocks, " is impossible.");
  Model m{};
  m.hidden = hidden;
  m.exit_dim = exit_dim;
  m.vocab = vocab;
  m.rnn = rnn;
  m.has_input_proj = exit_dim != 2 * hidden;
  m.split = m.has_input_proj || num_blocks > 0;
  m.type = layers.back().scalar_type();
  STD_TORCH_CHECK(is_floating(m.type),
                  "redrafter::draft: weights must be float32, bfloat16 or float16.");
  LayerReader reader(layers, m.type);
  if (rnn) {
    m.rnn_w = reader.weight("rnn_w", hidden, hidden);
    m.rnn_u = reader.weight("rnn_u", hidden, hidden);
    m.cell_bias = reader.bias("rnn_u.bias", hidden);
  }
  if (m.split) {
    m.context_half = reader.weight("the context half", exit_dim, hidden);
    m.state_half = reader.weight("the state half", exit_dim, hidden);
    m.split_bias = reader.bias("the bias of the split layer", exit_dim);
  }
  for (int64_t i = m.has_input_proj ? 0 : 1; i < num_blocks; ++i) {
    Tensor weight = reader.weight("a block", exit_dim, exit_dim);
    m.blocks.emplace_back(std::move(weight), reader.bias("a block's bias", exit_dim));
  }
  m.head = reader.weight("the head", vocab, exit_dim);
  reader.finish();
  return m;
}

DraftTable table_of(const Tensor& t, const char* name) {
  check_device(t, name);
  check_dims(t, 2, name);
  STD_TORCH_CHECK(is_floating(t.scalar_type()), "redrafter::draft: ", name,
                  " must be float32, bfloat16 or float16.");
  STD_TORCH_CHECK(t.size(1) < 2 || t.stride(1) == 1, "redrafter::draft: the rows of ", name,
                  " must be contiguous.");
  return {t.const_data_ptr(), t.scalar_type(), t.stride(0)};
}

// Rows of activations; early steps use fewer rows than there are.
template <class T>
struct Buffer {
  Buffer(const Tensor& like, int64_t rows, int64_t columns, ScalarType type)
      : tensor(scratch(like, {rows, columns}, type)),
        data(static_cast<T*>(tensor.mutable_data_ptr())) {}
  Tensor first(int64_t rows) { return torch::stable::narrow(tensor, 0, 0, rows); }

  Tensor tensor;
  T* data;
};

template <class T>
void run(const Model& m, DraftArgs<T> args, BeamStepArgs beams, const Tensor& like) {
  const int64_t most = args.batch * (args.length > 1 ? args.width : 1);
  const auto buffer = [&](bool needed, int64_t rows, int64_t columns) {
    return Buffer<T>(like, needed ? rows : 0, columns, m.type);
  };
  Buffer<float> first_scores(like, args.batch, args.width, ScalarType::Float);
  Buffer<T> contexts = buffer(true, args.batch, m.hidden);
  Buffer<T> embedded = buffer(m.rnn, most, m.hidden);
  Buffer<T> of_embedded = buffer(m.rnn, most, m.hidden);
  Buffer<T> of_state = buffer(m.rnn, most, m.hidden);
  Buffer<T> states[2] = {buffer(true, most, m.hidden), buffer(true, most, m.hidden)};
  Buffer<T> of_context = buffer(m.split, args.batch, m.exit_dim);
  // The split layer's product is gone before a block's comes.
  Buffer<T> of_x = buffer(m.split, most, m.exit_dim);
  Buffer<T> x = buffer(true, most, m.exit_dim);
  Buffer<T> logits = buffer(true, most, m.vocab);

  args.first_scores = first_scores.data;
  args.contexts = contexts.data;
  args.embedded = m.rnn ? embedded.data : nullptr;
  args.of_embedded = of_embedded.data;
  args.of_state = of_state.data;
  args.cell_bias = m.cell_bias;
  args.of_context = of_context.data;
  args.of_new_state = args.of_x = of_x.data;
  args.split_bias = m.split_bias;
  args.has_input_proj = m.has_input_proj;
  args.x = x.data;
  args.concatenate = !m.split;

  const cudaStream_t stream = stream_of(like);
  const auto grid = [](int64_t columns, int64_t rows) {
    return dim3(static_cast<unsigned>((columns + kDraftThreads - 1) / kDraftThreads),
                static_cast<unsigned>(rows));
  };
  const dim3 threads(kDraftThreads);
  int64_t* const tokens = beams.tokens;
  int64_t* const parents = beams.parents;
  float* const scores = beams.scores;
  for (int64_t step = 0; step < args.length; ++step) {
    args.step = step;
    args.per_request = step == 0 ? 1 : args.width;
    const int64_t rows = args.batch * args.per_request;
    // A cell reads reordered states from one buffer and writes new ones to the other. Without one
    // the reordered states are the new ones, and the buffers take turns.
    const int64_t now = m.rnn ? 0 : step & 1;
    args.kept_states = states[m.rnn ? 0 : now ^ 1].data;
    args.next_states = states[m.rnn ? 1 : now].data;
    args.new_states = states[now].data;
    REDRAFTER_LAUNCH((draft_gather<T>), grid(m.hidden, rows), threads, 0, stream, args);
    if (m.rnn) {
      product(of_embedded.first(rows), embedded.first(rows), *m.rnn_w);
      if (step > 0) product(of_state.first(rows), states[1].first(rows), *m.rnn_u);
      REDRAFTER_LAUNCH((draft_cell<T>), grid(m.hidden, rows), threads, 0, stream, args);
    }
    if (m.split) {
      if (step == 0) product(of_context.tensor, contexts.tensor, *m.context_half);
      product(of_x.first(rows), states[now].first(rows), *m.state_half);
      REDRAFTER_LAUNCH((draft_split<T>), grid(m.exit_dim, rows), threads, 0, stream, args);
    }
    for (const auto& [weight, bias] : m.blocks) {
      const float* added = bias;  // a lambda of the emulation cannot capture a binding
      product(of_x.first(rows), x.first(rows), weight);
      REDRAFTER_LAUNCH((draft_block<T>), grid(m.exit_dim, rows), threads, 0, stream, args, added);
    }
    product(logits.first(rows), x.first(rows), *m.head);

    beams.logits = logits.data;
    beams.rows = args.per_request;
    beams.logits_stride[0] = args.per_request * m.vocab;
    beams.logits_stride[1] = m.vocab;
    beams.beam_scores = step == 0 ? first_scores.data : scores + (step - 1) * args.width;
    beams.beam_scores_stride[0] = (step == 0 ? 1 : args.length) * args.width;
    beams.beam_scores_stride[1] = 1;
    beams.tokens = tokens + step * args.width;
    beams.parents = parents + step * args.width;
    beams.scores = scores + step * args.width;
    launch_beam_step(beams, like);
  }
}

template <class T>
T* output(const Tensor& t, ScalarType type, const Tensor& shaped_like, const char* name) {
  check_device(t, name);
  check_dtype(t, type, name);
  check_dims(t, 3, name);
  for (int64_t d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(t.size(d) == shaped_like.size(d),
                    "redrafter::draft: tokens, parents and scores must have one shape.");
  }
  STD_TORCH_CHECK(t.is_contiguous(), "redrafter::draft: tokens, parents and scores must be "
                  "contiguous, [batch, draft_length, beam_width].");
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
void run_as(const Model& m, const DraftTable& context, const DraftTable& embedding,
            int64_t embedding_rows, const Tensor& token, const BeamStepArgs& beams, int64_t length,
            const Tensor& like) {
  DraftArgs<T> args{};
  args.context = context;
  args.embedding = embedding;
  args.embedding_rows = embedding_rows;
  args.token = static_cast<const int64_t*>(token.const_data_ptr());
  args.token_stride = token.stride(0);
  args.tokens = beams.tokens;
  args.parents = beams.parents;
  args.batch = beams.batch;
  args.width = beams.width;
  args.length = length;
  args.hidden = m.hidden;
  args.exit_dim = m.exit_dim;
  run<T>(m, args, beams, like);
}

void draft_cuda(const Tensor& tokens, const Tensor& parents, const Tensor& scores,
                const Tensor& context, const Tensor& token, const Tensor& embedding,
                std::optional<Tensor> draft_vocab, std::vector<Tensor> layers, int64_t head_rows,
                int64_t exit_dim, int64_t num_blocks, bool rnn, int64_t top_k) {
  check_dims(tokens, 3, "tokens");
  BeamStepArgs beams = {};
  beams.tokens = output<int64_t>(tokens, ScalarType::Long, tokens, "tokens");
  beams.parents = output<int64_t>(parents, ScalarType::Long, tokens, "parents");
  beams.scores = output<float>(scores, ScalarType::Float, tokens, "scores");
  beams.batch = tokens.size(0);
  beams.width = tokens.size(2);
  const int64_t length = tokens.size(1);
  STD_TORCH_CHECK(beams.width >= 1 && length >= 1 && top_k >= 0,
                  "redrafter::draft: beam_width ", beams.width, " and draft_length ", length,
                  " must be at least 1, and top_k ", top_k, " at least 0.");
  beams.tokens_stride[0] = beams.parents_stride[0] = beams.scores_stride[0] = length * beams.width;
  beams.tokens_stride[1] = beams.parents_stride[1] = beams.scores_stride[1] = 1;
  const DraftTable embedding_table = table_of(embedding, "embedding");
  const DraftTable context_table = table_of(context, "context");
  const DeviceGuard guard(context);
  const Model m = read_model(layers, embedding.size(1), exit_dim, head_rows, num_blocks, rnn);
  beams.vocab = m.vocab;
  beams.dtype = m.type;
  beams.top_k = std::min(top_k, m.vocab);
  STD_TORCH_CHECK(context.size(0) == beams.batch && context.size(1) == m.hidden,
                  "redrafter::draft: context must be [", beams.batch, ", ", m.hidden, "].");
  check_device(token, "token");
  check_dtype(token, ScalarType::Long, "token");
  STD_TORCH_CHECK(token.dim() == 1 && token.size(0) == beams.batch,
                  "redrafter::draft: token must be [", beams.batch, "].");
  if (draft_vocab) {
    check_device(*draft_vocab, "draft_vocab");
    beams.draft_vocab =
        vector_data<int64_t>(*draft_vocab, ScalarType::Long, m.vocab, "draft_vocab");
  }
  if (beams.batch == 0) return;
  STD_TORCH_CHECK(beams.batch * beams.width <= 65535, "redrafter::draft: ",
                  beams.batch * beams.width, " rows are too many for one launch.");
  const auto start = m.type == ScalarType::Float      ? run_as<float>
                     : m.type == ScalarType::BFloat16 ? run_as<__nv_bfloat16>
                                                      : run_as<__half>;
  start(m, context_table, embedding_table, embedding.size(0), token, beams, length, context);
}

}  // namespace
}  // namespace redrafter::cuda

STABLE_TORCH_LIBRARY_IMPL(REDRAFTER_LIBRARY, REDRAFTER_CUDA_KEY, m) {
  m.impl("draft", TORCH_BOX(&redrafter::cuda::draft_cuda));
}
