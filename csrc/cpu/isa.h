// Compiler knobs: one binary that picks SSE2, AVX2 or AVX-512 code when it is loaded.
#pragma once

#include <cstdlib> // defines __GLIBC__ where it applies

#include "../common/inline.h"

// The loader resolves each clone once (an ifunc). The choice never changes a result: every clone does the same IEEE
// operations in the same order, and -ffp-contract=off keeps the compiler from fusing a multiply and an add on those
// instruction sets that could. SAMA_NO_CLONES builds for the compiler's own -march only (other libcs, tests).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && !defined(SAMA_NO_CLONES)
#define SAMA_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SAMA_CLONES
#endif

// For element-wise loops: element i never depends on element j. Unlike __restrict__ this allows an operand to be the
// output itself, so aliased arguments stay correct.
#if defined(__clang__)
#define SAMA_IVDEP _Pragma("clang loop vectorize(enable) interleave(enable)")
#elif defined(__GNUC__)
#define SAMA_IVDEP _Pragma("GCC ivdep")
#else
#define SAMA_IVDEP
#endif
