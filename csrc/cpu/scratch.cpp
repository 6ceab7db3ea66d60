// SPDX-License-Identifier: Apache-2.0
#include "scratch.h"

#include <cstdlib>
#include <new>

namespace redrafter {
namespace {

struct Buffer {
  char* memory = nullptr;
  std::size_t size = 0;
  ~Buffer() { std::free(memory); }
};

}  // namespace

char* scratch_memory(std::size_t bytes) {
  static thread_local Buffer buffer;
  if (bytes > buffer.size) {
    const std::size_t size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    std::free(buffer.memory);
    buffer.size = 0;
    buffer.memory = static_cast<char*>(std::aligned_alloc(64, size));
    if (!buffer.memory) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.memory;
}

}  // namespace redrafter
