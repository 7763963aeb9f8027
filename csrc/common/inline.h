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

// Before a loop that would be unrolled, to no one's good.
#ifdef __CUDA_ARCH__
#define SAMA_NO_UNROLL _Pragma("unroll 1")
#else
#define SAMA_NO_UNROLL
#endif

// Before a short loop. Inside an element-wise one GCC must have unrolled it to vectorise that one.
#if defined(__CUDA_ARCH__) || defined(__clang__)
#define SAMA_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define SAMA_UNROLL // nvcc's pass for the host, which knows neither
#else
#define SAMA_UNROLL _Pragma("GCC unroll 8")
#endif
