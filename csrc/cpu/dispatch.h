// SPDX-License-Identifier: Apache-2.0
// Choosing, at run time, among the variants of a kernel that the build compiled.
//
// A file named *_kernel.cpp is compiled once per instruction set, each time with its own flags and
// with REDRAFTER_VARIANT naming the namespace that must hold everything it defines. A plain file
// picks one of them per call:
//
//   // foo_kernel.h
//   REDRAFTER_DECLARE_VARIANTS(void foo(const FooArgs& args))
//   // foo_kernel.cpp
//   namespace redrafter { namespace REDRAFTER_VARIANT { void foo(const FooArgs& args) {...} } }
//   // foo.cpp
//   REDRAFTER_VARIANT_OF(foo)(args);
#pragma once

namespace redrafter {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best variant that was compiled in and that this processor runs. The environment variable
// VLLM_REDRAFTER_ISA (baseline, avx2, avx512, avx512_bf16) lowers it; it never raises it.
Isa current_isa();

template <class Function>
Function* select_variant(Function* baseline, Function* avx2, Function* avx512,
                         Function* avx512_bf16) {
  switch (current_isa()) {
    case Isa::kAvx512Bf16:
      return avx512_bf16;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace redrafter

// The build defines REDRAFTER_X86_VARIANTS when it compiled the AVX variants too.
#ifdef REDRAFTER_X86_VARIANTS
#define REDRAFTER_DECLARE_VARIANTS(declaration) \
  namespace redrafter {                         \
  namespace isa_baseline {                      \
  declaration;                                  \
  }                                             \
  namespace isa_avx2 {                          \
  declaration;                                  \
  }                                             \
  namespace isa_avx512 {                        \
  declaration;                                  \
  }                                             \
  namespace isa_avx512_bf16 {                   \
  declaration;                                  \
  }                                             \
  }
#define REDRAFTER_VARIANT_OF(name)                                                             \
  (::redrafter::select_variant(&::redrafter::isa_baseline::name, &::redrafter::isa_avx2::name, \
                               &::redrafter::isa_avx512::name,                                 \
                               &::redrafter::isa_avx512_bf16::name))
#else
#define REDRAFTER_DECLARE_VARIANTS(declaration) \
  namespace redrafter {                         \
  namespace isa_baseline {                      \
  declaration;                                  \
  }                                             \
  }
#define REDRAFTER_VARIANT_OF(name) (&::redrafter::isa_baseline::name)
#endif
