// Splitting work between threads; the caller says how many (torch.get_num_threads()).
#ifndef ADADFQ_CPU_PARALLEL_H_
#define ADADFQ_CPU_PARALLEL_H_

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace adadfq {

// Elements below which waking another thread costs more than it saves.
constexpr int64_t kSerialElements = 16384;

// Threads worth using for `elements` elements.
inline int useful_threads(int64_t elements, int threads) {
  return static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(threads, elements / kSerialElements)));
}

// Gives a thread of the pool the caller's floating-point mode while it works
// (torch.set_flush_denormal sets it for the calling thread alone), or results would depend on the
// number of threads.
class SameFloatMode {
 public:
#ifdef __SSE__
  static unsigned current() { return _mm_getcsr(); }
  explicit SameFloatMode(unsigned mode) : before_(_mm_getcsr()) { _mm_setcsr(mode); }
  ~SameFloatMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  static unsigned current() { return 0; }
  explicit SameFloatMode(unsigned) {}
#endif
};

// body(begin, end) over a partition of [0, n) whose inner borders are multiples of `align`. With
// one thread no OpenMP is entered: a forked child must not touch its parent's thread pool.
template <typename Body>
void parallel_for(int64_t n, int threads, int64_t align, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
    const unsigned mode = SameFloatMode::current();
#pragma omp parallel num_threads(threads)
    {
      const SameFloatMode same(mode);
      const int64_t team = omp_get_num_threads(), id = omp_get_thread_num();
      const int64_t share = ((n + team - 1) / team + align - 1) / align * align;
      const int64_t begin = std::min(n, id * share), end = std::min(n, begin + share);
      if (begin < end) body(begin, end);
    }
    return;
  }
#endif
  (void)threads;
  (void)align;
  if (n > 0) body(int64_t{0}, n);
}

}  // namespace adadfq

#endif  // ADADFQ_CPU_PARALLEL_H_
