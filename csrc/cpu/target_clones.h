// ADADFQ_CLONES: compile a function for AVX-512, AVX2 and the baseline, and choose when the library
// loads.
//
// Templates cannot carry the attribute, so loops are always_inline templates inside plain functions
// that do. GCC with glibc on x86-64 only (it needs ifunc); elsewhere the baseline is compiled.
// The widest clone needs AVX-512 with 16-bit lanes (BW), or bfloat16 and float16 would take twice
// the time; GCC names that target from release 12 on. Sanitizers cannot run inside ifunc resolvers:
// define ADADFQ_NO_CLONES for them.
#ifndef ADADFQ_CPU_TARGET_CLONES_H_
#define ADADFQ_CPU_TARGET_CLONES_H_

#include <cstdint>
#include <cstdlib>  // defines __GLIBC__ where there is one

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(ADADFQ_NO_CLONES)
#if __GNUC__ >= 12
#define ADADFQ_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define ADADFQ_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define ADADFQ_CLONES
#endif

#define ADADFQ_INLINE inline __attribute__((always_inline))
#define ADADFQ_INLINE_LAMBDA __attribute__((always_inline))
#define ADADFQ_RESTRICT __restrict__

namespace adadfq {

// One loop serves a constant parameter and one that changes from element to element.
ADADFQ_INLINE float at(float value, int64_t) { return value; }
ADADFQ_INLINE float at(const float* values, int64_t i) { return values[i]; }

}  // namespace adadfq

#endif  // ADADFQ_CPU_TARGET_CLONES_H_
