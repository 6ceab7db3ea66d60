// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace redrafter {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

int parse(const char* name) {
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i;
  }
  return -1;
}

int supported() {
#ifdef REDRAFTER_X86_VARIANTS
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))) {
    return 0;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
    return 1;
  }
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

int initial() {
  const int best = supported();
  const char* wanted = std::getenv("VLLM_REDRAFTER_ISA");
  const int lowered = wanted ? parse(wanted) : -1;
  return lowered >= 0 && lowered < best ? lowered : best;
}

std::atomic<int>& level() {
  static std::atomic<int> value{initial()};
  return value;
}

}  // namespace

Isa current_isa() { return static_cast<Isa>(level().load(std::memory_order_relaxed)); }

}  // namespace redrafter

// Read and written through ctypes by ops/library.py: operators without tensor arguments have no
// device to be dispatched by. Tests set the level to run every variant in one process.
extern "C" {

__attribute__((visibility("default"))) const char* redrafter_isa() {
  return redrafter::kNames[static_cast<int>(redrafter::current_isa())];
}

// Returns 0, or -1 if the name is unknown or the processor (or the build) lacks it.
__attribute__((visibility("default"))) int redrafter_set_isa(const char* name) {
  const int wanted = redrafter::parse(name);
  if (wanted < 0 || wanted > redrafter::supported()) return -1;
  redrafter::level().store(wanted, std::memory_order_relaxed);
  return 0;
}

}  // extern "C"
