// Functions that both the CPU and the CUDA kernels are made of.
#pragma once

#ifdef __CUDACC__
#define SAMA_BOTH __host__ __device__
#define SAMA_INLINE __host__ __device__ __forceinline__
#else
#define SAMA_BOTH
// On the CPU they must be inlined into the clones for AVX2 and AVX-512 (cpu/isa.h), or they would stay baseline code.
#define SAMA_INLINE inline __attribute__((always_inline))
#endif
