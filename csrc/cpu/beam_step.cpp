// SPDX-License-Identifier: Apache-2.0
// redrafter::beam_step on the CPU: the draft operator's scan and selection, on logits from elsewhere.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/beam_step_args.h"
#include "common/threads.h"
#include "draft_select.h"

namespace redrafter {
namespace {

// A row's logits as floats.
class Logits : public LogitSource {
 public:
  explicit Logits(const BeamStepArgs& args) : args_(args) {}
  void logits(int64_t row, float* out) const override { read(row, 0, args_.vocab, out); }
  void read(int64_t row, int64_t first, int64_t count, float* out) const {
    const int64_t at = row / args_.rows * args_.logits_stride[0] +
                       row % args_.rows * args_.logits_stride[1] + first;
    const bool wide = args_.dtype == ScalarType::Float;
    const auto type = wide                                     ? Source::kFloat
                      : args_.dtype == ScalarType::BFloat16 ? Source::kBf16
                                                               : Source::kHalf;
    const char* data = static_cast<const char*>(args_.logits) + at * (wide ? 4 : 2);
    REDRAFTER_VARIANT_OF(draft_read)(data, type, count, out);
  }

 private:
  const BeamStepArgs& args_;
};

void beam_step_cpu(const Tensor& tokens, const Tensor& parents, const Tensor& scores,
                   const std::optional<Tensor>& out_state, const Tensor& logits,
                   const Tensor& beam_scores, const std::optional<Tensor>& state,
                   const std::optional<Tensor>& draft_vocab, int64_t top_k) {
  const BeamStepArgs args = beam_step_args(tokens, parents, scores, out_state, logits, beam_scores,
                                           state, draft_vocab, top_k);
  STD_TORCH_CHECK(logits.is_cpu() && tokens.is_cpu() && beam_scores.is_cpu(),
                  "redrafter::beam_step: all tensors must be on the CPU.");
  const int64_t rows = args.batch * args.rows, vocab = args.vocab;
  const int64_t chunks = (vocab + kChunk - 1) / kChunk;
  const int64_t capacity = std::min<int64_t>(std::max<int64_t>(args.width, args.top_k), vocab);
  std::vector<uint64_t> keys(rows * capacity);
  std::vector<TopHeap> heaps(rows);
  std::vector<float> chunk_max(chunks * rows), chunk_sum(chunks * rows);
  const Logits source(args);
  const int threads = omp_in_parallel() || rows * vocab < 1 << 16 ? 1 : omp_get_max_threads();
  REDRAFTER_OMP(parallel for num_threads(threads) if (threads > 1))
  for (int64_t row = 0; row < rows; ++row) {
    alignas(64) float buffer[kChunk];
    heaps[row] = TopHeap{keys.data() + row * capacity, static_cast<int32_t>(capacity), 0, 0, 0.0f};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * kChunk, count = std::min(kChunk, vocab - first);
      source.read(row, first, count, buffer);
      REDRAFTER_VARIANT_OF(draft_scan)({buffer, count, first, args.top_k == 0, &heaps[row],
                                        &chunk_max[chunk * rows + row],
                                        &chunk_sum[chunk * rows + row]});
    }
  }
  const int64_t step = 0;
  ScanResult scan;
  scan.heaps = heaps.data();
  scan.heaps_step = &step;
  scan.step = step;
  scan.threads = 1;
  scan.heap_rows = scan.rows = rows;
  scan.chunk_max = chunk_max.data();
  scan.chunk_sum = chunk_sum.data();
  scan.chunks = chunks;
  scan.vocab = vocab;
  scan.top_k = static_cast<int>(args.top_k);
  std::vector<float> before(args.width);
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t w = 0; w < args.width; ++w) before[w] = args.beam_score(b, w);
    const std::vector<Candidate> best =
        select_candidates(scan, source, b * args.rows, args.rows == 1, before.data(),
                          static_cast<int>(args.width));
    for (int64_t w = 0; w < args.width; ++w) {
      const Candidate& kept = best[w];
      args.write(b, w, kept.row, kept.parent, kept.score);
      if (args.state_bytes > 0) {
        std::memcpy(args.out_state_row(b, w), args.state_row(b, kept.parent), args.state_bytes);
      }
    }
  }
}

}  // namespace
}  // namespace redrafter

STABLE_TORCH_LIBRARY_IMPL(redrafter, CPU, m) {
  m.impl("beam_step", TORCH_BOX(&redrafter::beam_step_cpu));
}
