// SPDX-License-Identifier: Apache-2.0
// OpenMP where the compiler has it, one thread where not. The build links the OpenMP runtime that
// torch itself has loaded: a second one in the process would fight the first for the cores.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#define REDRAFTER_PRAGMA(text) _Pragma(#text)
#define REDRAFTER_OMP(text) REDRAFTER_PRAGMA(omp text)
#else
#define REDRAFTER_OMP(text)
static inline int omp_get_max_threads() { return 1; }
static inline int omp_get_num_threads() { return 1; }
static inline int omp_get_thread_num() { return 0; }
static inline int omp_in_parallel() { return 0; }
#endif
