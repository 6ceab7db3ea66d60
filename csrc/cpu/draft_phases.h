// SPDX-License-Identifier: Apache-2.0
// Work in phases of microseconds, shared by a team of threads.
//
// A phase is over when its units are done, not when all threads have been there: a thread that is
// still waking up, or has lost its core to somebody else, holds nobody up unless it is in the
// middle of a unit. What it finds undone when it comes, it helps with.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace redrafter {

class Phases {
 public:
  // `threads` is how many may take part; fewer may come.
  Phases(int64_t phases, int threads)
      : threads_(threads), counters_(new Counter[phases * (threads + 1)]) {}

  // Runs run(unit) for the units of `phase` that are left, then returns once all are done, with
  // everything their runs wrote. Every thread goes through all phases in the same order.
  template <class Run>
  void run(int64_t phase, int thread, int64_t units, Run&& run) {
    Counter* counters = counters_.get() + phase * (threads_ + 1);
    std::atomic<int64_t>& done = counters[threads_].value;
    // Everybody has a contiguous share, so that weights are read in long runs; helping comes last.
    for (int i = 0; i < threads_; ++i) {
      const int owner = (thread + i) % threads_;
      const int64_t first = units * owner / threads_;
      const int64_t count = units * (owner + 1) / threads_ - first;
      std::atomic<int64_t>& next = counters[owner].value;
      while (next.load(std::memory_order_relaxed) < count) {
        const int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
        if (unit >= count) break;
        run(first + unit);
        done.fetch_add(1, std::memory_order_acq_rel);
      }
    }
    for (int spins = 0; done.load(std::memory_order_acquire) < units; ++spins) wait(spins);
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  static void wait(int spins) {
    // Some 200 us: then the one waited for may need this very core. Yielding sooner gives a busy
    // machine the chance to take the core away for milliseconds.
    constexpr int kSpins = 4000;
    if (spins >= kSpins) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  const int threads_;
  std::unique_ptr<Counter[]> counters_;
};

}  // namespace redrafter
