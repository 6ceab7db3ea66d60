// SPDX-License-Identifier: Apache-2.0
#include "draft_select.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace redrafter {
namespace {

// The logit of entries outside the top k.
constexpr float kFiller = -50000.0f;

// Below this score a float32 is so coarse that different logits give equal scores, which the lowest
// index must then decide. The W largest logits do not answer that; all logits do.
constexpr float kCoarse = -1000.0f;

struct Entry {
  float logit;
  int32_t row;
};

Entry decode(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  const uint32_t bits = ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu);
  Entry entry;
  std::memcpy(&entry.logit, &bits, sizeof(bits));
  entry.row = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
  return entry;
}

bool better(const Candidate& a, const Candidate& b) {
  if (a.score != b.score) return a.score > b.score;
  if (a.parent != b.parent) return a.parent < b.parent;
  return a.row < b.row;
}

void keep_best(std::vector<Candidate>& candidates, size_t count) {
  count = std::min(count, candidates.size());
  std::partial_sort(candidates.begin(), candidates.begin() + count, candidates.end(), better);
  candidates.resize(count);
}

// One row's log-probabilities, as far as its largest logits tell them.
class Row {
 public:
  Row(const ScanResult& scan, int64_t row) : scan_(scan) {
    std::vector<uint64_t> keys;
    size_t capacity = 0;
    for (int t = 0; t < scan.threads; ++t) {
      if (scan.heaps_step[t] != scan.step) continue;
      const TopHeap& heap = heap_of(t, row);
      keys.insert(keys.end(), heap.keys, heap.keys + heap.size);
      capacity = heap.capacity;
    }
    capacity = std::min(capacity, keys.size());
    std::partial_sort(keys.begin(), keys.begin() + capacity, keys.end(),
                      [](uint64_t a, uint64_t b) { return a > b; });
    entries_.reserve(capacity);
    for (size_t i = 0; i < capacity; ++i) entries_.push_back(decode(keys[i]));
    max_ = entries_[0].logit;
    if (scan.top_k > 0) {
      const auto k = std::min<int64_t>(scan.top_k, scan.vocab);
      normalise_over_top_k(row, keys, entries_[k - 1].logit);
    } else {
      normalise_over_all(row);
    }
  }

  float best() const { return log_probability(max_); }

  // The up to `width` best continuations of a beam with this score; false if coarse rounding or
  // clamping leaves their order open.
  bool candidates(float score, int32_t parent, int64_t width, std::vector<Candidate>& out) const {
    out.clear();
    for (const Entry& entry : entries_) {
      if (static_cast<int64_t>(out.size()) == width || entry.logit < kth_) break;
      out.push_back({score + log_probability(entry.logit), parent, entry.row});
      if (!(out.back().score >= kCoarse)) return false;
    }
    const size_t kept = out.size();
    // Everything outside the top k has one log-probability, so the lowest rows come first.
    const float dropped = score + std::max(kFiller - log_sum_, kFloor);
    for (int32_t row = 0;
         row < scan_.vocab && static_cast<int64_t>(out.size()) < width && kept_ < scan_.vocab;
         ++row) {
      const bool is_kept = std::any_of(out.begin(), out.begin() + kept,
                                       [row](const Candidate& c) { return c.row == row; });
      if (!is_kept) out.push_back({dropped, parent, row});
    }
    return true;
  }

 private:
  const TopHeap& heap_of(int thread, int64_t row) const {
    return scan_.heaps[thread * scan_.heap_rows + row];
  }

  float log_probability(float logit) const {
    return std::max(logit - max_ - log_sum_, kFloor);
  }

  void normalise_over_all(int64_t row) {
    // In the order of the chunks, whichever thread had them: the sum must not depend on it.
    double sum = 0.0;
    for (int64_t c = 0; c < scan_.chunks; ++c) {
      const int64_t at = c * scan_.rows + row;
      sum += static_cast<double>(scan_.chunk_sum[at]) * std::exp(scan_.chunk_max[at] - max_);
    }
    log_sum_ = static_cast<float>(std::log(sum));
    kth_ = -INFINITY;
    kept_ = scan_.vocab;
  }

  void normalise_over_top_k(int64_t row, const std::vector<uint64_t>& keys, float kth) {
    kth_ = kth;
    double sum = 0.0;
    kept_ = 0;
    for (const Entry& entry : entries_) {
      if (entry.logit < kth) break;
      sum += std::exp(static_cast<double>(entry.logit - max_));
      ++kept_;
    }
    // Ties with the k-th stay, also those for which there was no room among the kept.
    int64_t ties = 0;
    for (size_t i = entries_.size(); i < keys.size(); ++i) ties += decode(keys[i]).logit == kth;
    for (int t = 0; t < scan_.threads; ++t) {
      if (scan_.heaps_step[t] != scan_.step) continue;
      const TopHeap& heap = heap_of(t, row);
      if (heap.size == heap.capacity && heap.least == kth) ties += heap.ties;
    }
    kept_ += ties;
    sum += ties * std::exp(static_cast<double>(kth - max_));
    log_sum_ = static_cast<float>(std::log(sum));
  }

  const ScanResult& scan_;
  std::vector<Entry> entries_;  // best first
  float max_ = 0.0f;
  float log_sum_ = 0.0f;  // of exp(logit - max_)
  float kth_ = 0.0f;
  int64_t kept_ = 0;  // entries that the top k leaves in
};

// The same from all logits, step by step as the reference does it.
class WholeRow {
 public:
  WholeRow(const ScanResult& scan, const LogitSource& source, int64_t row) : logs_(scan.vocab) {
    source.logits(row, logs_.data());
    for (float& x : logs_) {
      if (std::isnan(x) || x == -INFINITY) x = kFloor;
      if (x == INFINITY) x = -kFloor;
    }
    const float max = *std::max_element(logs_.begin(), logs_.end());
    for (float& x : logs_) x -= max;
    if (scan.top_k > 0) {
      std::vector<float> sorted(logs_);
      const auto k = sorted.begin() + std::min<int64_t>(scan.top_k, scan.vocab) - 1;
      std::nth_element(sorted.begin(), k, sorted.end(), [](float a, float b) { return a > b; });
      for (float& x : logs_) x = x < *k ? kFiller : x;
    }
    double sum = 0.0;
    for (const float x : logs_) sum += std::exp(static_cast<double>(x));
    const auto log_sum = static_cast<float>(std::log(sum));
    for (float& x : logs_) x = std::max(x - log_sum, kFloor);
  }

  void candidates(float score, int32_t parent, int64_t width, std::vector<Candidate>& out) const {
    out.clear();
    for (size_t i = 0; i < logs_.size(); ++i) {
      out.push_back({score + logs_[i], parent, static_cast<int32_t>(i)});
    }
    keep_best(out, width);
  }

 private:
  std::vector<float> logs_;
};

}  // namespace

std::vector<Candidate> select_candidates(const ScanResult& scan, const LogitSource& source,
                                         int64_t first_row, bool copies, const float* scores,
                                         int width) {
  std::vector<Candidate> best;
  std::vector<Candidate> of_row;
  struct Undecided {
    int32_t beam;
    float best_score;
  };
  std::vector<Undecided> undecided;
  const int beams = copies ? 1 : width;
  float best_log_probability = 0.0f;  // of the last row; the copies' own when there are any
  for (int beam = 0; beam < beams; ++beam) {
    const Row row(scan, first_row + beam);
    best_log_probability = row.best();
    if (row.candidates(scores[beam], beam, width, of_row)) {
      best.insert(best.end(), of_row.begin(), of_row.end());
    } else {
      undecided.push_back({beam, scores[beam] + best_log_probability});
    }
  }
  keep_best(best, width);

  const auto may_enter = [&](int32_t parent, float score) {
    return best.size() < static_cast<size_t>(width) || score > best.back().score ||
           (score == best.back().score && parent < best.back().parent);
  };
  for (const Undecided& row : undecided) {
    if (!may_enter(row.beam, row.best_score)) continue;
    WholeRow(scan, source, first_row + row.beam)
        .candidates(scores[row.beam], row.beam, width, of_row);
    best.insert(best.end(), of_row.begin(), of_row.end());
    keep_best(best, width);
  }
  if (!copies || width == 1 || !may_enter(1, scores[1] + best_log_probability)) return best;
  // Fillers: every copy of beam 0 offers the same continuations at the same score.
  WholeRow(scan, source, first_row).candidates(scores[1], 1, width, of_row);
  for (int32_t beam = 1; beam < width; ++beam) {
    for (Candidate candidate : of_row) {
      candidate.parent = beam;
      best.push_back(candidate);
    }
  }
  keep_best(best, width);
  return best;
}

}  // namespace redrafter
