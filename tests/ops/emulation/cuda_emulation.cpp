// SPDX-License-Identifier: Apache-2.0
#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATION_SANITIZED 1
#else
#define EMULATION_SANITIZED 0
#endif

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

const char* name_of(Meeting what) {
  switch (what) {
    case Meeting::kBlock:
      return "__syncthreads";
    case Meeting::kWarp:
      return "__syncwarp";
    case Meeting::kShuffle:
      return "a shuffle";
    case Meeting::kVote:
      return "a vote";
    case Meeting::kReduce:
      return "a reduction";
    case Meeting::kMma:
      return "mma";
    case Meeting::kLdmatrix:
      return "ldmatrix";
  }
  return "?";
}

struct Copy {
  void* to;
  const void* from;
  int bytes, total;
};

struct Fiber {
  ucontext_t context;
  Position position;
  int index = 0;  // in the block
  bool ready = true, done = false;
  Meeting waits_for = Meeting::kBlock;
  int exchanges = 0;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
  void* fake_stack = nullptr;
};

struct Warp {
  unsigned char slots[2][kWarpSize][kLaneBytes];
};

// The block that runs now.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  Fiber* now = nullptr;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
  const char* kernel = "";
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
};

Block* block = nullptr;
std::mt19937_64 generator(0);

// Stacks are reused from launch to launch; a guard page below each stops an overflow.
char* stack_of(std::size_t index) {
  static std::vector<char*> stacks;
  while (stacks.size() <= index) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for a stack");
    mprotect(memory, 4096, PROT_NONE);
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[index];
}

void to_scheduler(Fiber& fiber) {
#if EMULATION_SANITIZED
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, block->scheduler_stack,
                                 block->scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &block->scheduler);
#if EMULATION_SANITIZED
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &block->scheduler_stack,
                                  &block->scheduler_stack_bytes);
#endif
}

void run_fiber() {
#if EMULATION_SANITIZED
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
  Fiber& fiber = *block->now;
  (*block->body)();
  fiber.done = true;
  to_scheduler(fiber);
}

// Not inlined: the compiler takes getcontext for a function that may return twice.
__attribute__((noinline)) void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack = {stack_of(fiber.index), 0, kStackBytes};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

void resume(Fiber& fiber) {
  block->now = &fiber;
#if EMULATION_SANITIZED
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_of(fiber.index), kStackBytes);
#endif
  swapcontext(&block->scheduler, &fiber.context);
#if EMULATION_SANITIZED
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Lets go those of [begin, end) if all that are alive wait for the same thing.
bool release(Fiber* begin, Fiber* end, bool whole_block) {
  const Fiber* first = nullptr;
  for (Fiber* fiber = begin; fiber != end; ++fiber) {
    if (fiber->done) continue;
    if (fiber->ready || (fiber->waits_for == Meeting::kBlock) != whole_block) return false;
    if (first && fiber->waits_for != first->waits_for) return false;
    first = fiber;
  }
  for (Fiber* fiber = begin; fiber != end; ++fiber) fiber->ready = !fiber->done;
  return first != nullptr;
}

[[noreturn]] void divergence() {
  std::string text = std::string("emulation: threads of a block of ") + block->kernel +
                     " wait for each other at different places:";
  for (const Fiber& fiber : block->fibers) {
    if (fiber.done || text.size() > 600) continue;
    text += " thread " + std::to_string(fiber.index) + " at " + name_of(fiber.waits_for) + ";";
  }
  throw std::runtime_error(text);
}

void run_block() {
  std::vector<Fiber*> order;
  for (Fiber& fiber : block->fibers) order.push_back(&fiber);
  Fiber* const begin = block->fibers.data();
  Fiber* const end = begin + block->fibers.size();
  for (;;) {
    std::shuffle(order.begin(), order.end(), generator);
    bool ran = false, alive = false;
    for (Fiber* fiber : order) {
      if (fiber->ready && !fiber->done) {
        fiber->ready = false;
        resume(*fiber);
        ran = true;
      }
      alive = alive || !fiber->done;
    }
    if (!alive) return;
    bool released = release(begin, end, true);
    for (Fiber* warp = begin; warp != end; warp += kWarpSize) {
      if (release(warp, warp + kWarpSize, false)) released = true;
    }
    if (!ran && !released) divergence();
  }
}

}  // namespace

const Position& position() { return block->now->position; }

unsigned char* dynamic_shared() { return block->shared.get(); }

void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("emulation: only whole warps may synchronise");
}

void meet(Meeting what) {
  Fiber& fiber = *block->now;
  fiber.waits_for = what;
  to_scheduler(fiber);
}

Exchange::Exchange(Meeting what, const void* mine, std::size_t bytes) {
  Fiber& fiber = *block->now;
  auto& slots = block->warps[fiber.index / kWarpSize].slots[fiber.exchanges++ % 2];
  lane_ = fiber.index % kWarpSize;
  slots_ = slots[0];
  if (bytes > kLaneBytes) throw std::runtime_error("emulation: too much for one exchange");
  std::memcpy(slots[lane_], mine, bytes);
  meet(what);
}

const unsigned char* Exchange::from(int lane) const { return slots_ + lane * kLaneBytes; }

unsigned ballot(bool predicate) {
  const Exchange all(Meeting::kVote, &predicate, sizeof(predicate));
  unsigned votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) votes |= unsigned{all.of<bool>(lane)} << lane;
  return votes;
}

unsigned largest_of_warp(unsigned value) {
  const Exchange all(Meeting::kReduce, &value, sizeof(value));
  unsigned largest = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) largest = std::max(largest, all.of<unsigned>(lane));
  return largest;
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    throw std::runtime_error("emulation: ldmatrix needs rows aligned to 16 bytes");
  }
  const Exchange all(Meeting::kLdmatrix, &row, sizeof(row));
  const int a = all.lane() / 4, b = all.lane() % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int i, int j) {
      return uint32_t{all.of<const uint16_t*>(matrix * 8 + i)[j]};
    };
    r[matrix] = transposed ? element(b, a) | element(b + 1, a) << 16
                           : element(a, b) | element(a, b + 1) << 16;
  }
}

void cp_async(void* shared, const void* global, int bytes, int total) {
  if (reinterpret_cast<uintptr_t>(shared) % total != 0 ||
      reinterpret_cast<uintptr_t>(global) % total != 0) {
    throw std::runtime_error("emulation: cp.async needs addresses aligned to its size");
  }
  block->now->open_group.push_back({shared, global, bytes, total});
}

void cp_async_commit() {
  Fiber& fiber = *block->now;
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

void cp_async_wait(int groups_left) {
  auto& groups = block->now->groups;
  while (groups.size() > static_cast<std::size_t>(groups_left)) {
    for (const Copy& copy : groups.front()) {
      if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.total - copy.bytes);
    }
    groups.pop_front();
  }
}

void launch(const char* name, dim3 grid, dim3 block_dim, std::size_t shared_bytes,
            const std::function<void()>& thread) {
  const std::size_t threads = std::size_t{block_dim.x} * block_dim.y * block_dim.z;
  const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || threads % kWarpSize != 0 || blocks == 0 ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > 99 * 1024) {
    throw std::runtime_error(std::string("emulation: impossible launch of ") + name);
  }
  std::vector<std::size_t> order(blocks);
  for (std::size_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), generator);

  Block running;
  running.kernel = name;
  running.body = &thread;
  for (const std::size_t i : order) {
    running.fibers.clear();
    running.fibers.resize(threads);
    running.warps.assign(threads / kWarpSize, Warp{});
    running.shared.reset(new unsigned char[shared_bytes]);
    std::memset(running.shared.get(), 0xff, shared_bytes);
    for (std::size_t t = 0; t < threads; ++t) {
      Fiber& fiber = running.fibers[t];
      const auto at = static_cast<unsigned>(t), b = static_cast<unsigned>(i);
      fiber.index = static_cast<int>(t);
      fiber.position = {{at % block_dim.x, at / block_dim.x % block_dim.y,
                         at / (block_dim.x * block_dim.y)},
                        {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)},
                        block_dim,
                        grid};
      prepare(fiber);
    }
    struct Restore {
      ~Restore() { block = nullptr; }
    } restore;
    block = &running;
    run_block();
  }
}

namespace {

using Launcher = int (*)(const void* kernel, const unsigned* sizes, std::size_t shared_bytes,
                         const Argument* arguments, std::size_t count);
using Allocated = void (*)(void* memory, std::size_t bytes);

Launcher launcher = nullptr;
Allocated tell_allocated = nullptr;

}  // namespace

void allocated(void* memory, std::size_t bytes) {
  if (bytes) std::memset(memory, 0xff, bytes);
  if (tell_allocated) tell_allocated(memory, bytes);
}

bool launch_elsewhere(const void* kernel, const char* name, dim3 grid, dim3 block_dim,
                      std::size_t shared_bytes, const Argument* arguments, std::size_t count) {
  if (!launcher) return false;
  const unsigned sizes[] = {grid.x,      grid.y,      grid.z,
                            block_dim.x, block_dim.y, block_dim.z};
  if (launcher(kernel, sizes, shared_bytes, arguments, count) != 0) {
    throw std::runtime_error(std::string("emulation: the launch of ") + name + " failed");
  }
  return true;
}

}  // namespace emulation

extern "C" __attribute__((visibility("default"))) void redrafter_emulation_run_with(
    emulation::Launcher launcher, emulation::Allocated allocated) {
  emulation::launcher = launcher;
  emulation::tell_allocated = allocated;
}

// Called through ctypes by build.py.
extern "C" __attribute__((visibility("default"))) void redrafter_emulation_seed(uint64_t seed) {
  emulation::generator.seed(seed);
}
