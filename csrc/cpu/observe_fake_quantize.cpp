// The range of an activation: a debiased moving average of batch minima and maxima, and fake
// quantisation over it.
//
//   the range moves by min x and max x             csrc/common/range_update.h
//   x_hat = fake_quantize(x, scale, zero_point)
//
// The scale needs the whole of x, so x is read twice. Each thread goes through its part forwards
// for the range and backwards to quantise, so that what the cache still holds is not read from
// memory again: 8 bytes an element, float32, where a thread's part fits the cache, up to 12 beyond.
//
// Test: python -m pytest tests/test_native_cpu.py -k observe
// Time: python -m benchmarks ops --ops observe_fake_quantize
#include "observe_fake_quantize.h"

#include <mutex>

#include "../common/quantizer.h"
#include "dispatch_dtype.h"
#include "huge_pages.h"
#include "parallel.h"
#include "quantize_loops.h"
#include "ranges.h"

namespace adadfq {
namespace {

constexpr int64_t kBlock = 16384;  // elements a step backwards

}  // namespace

void observe_fake_quantize(const void* x, void* out, int64_t n, const RangeState& state, int bits,
                           double momentum, DType dtype, int threads) {
  constexpr int64_t kAlign = 64;
  threads = useful_threads(n, threads);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    prefer_huge_pages(out, n * sizeof(T));
    Range batch;
    std::mutex joining;
    parallel_for(n, threads, kAlign, [&](int64_t begin, int64_t end) {
      Range part;
      find_range(from + begin, end - begin, part);
      const std::lock_guard<std::mutex> lock(joining);
      batch.join(part);
    });
    const Range ends = batch.with_nan();
    finish_update(state, next_update(state, momentum_of(momentum)), {ends.lo, ends.hi}, bits);
    const CodeBounds bounds = code_bounds(*state.zero_point, max_code(bits));
    const float scale = *state.scale;
    parallel_for(n, threads, kAlign, [&](int64_t begin, int64_t end) {
      for (int64_t stop = end; stop > begin; stop -= kBlock) {
        const int64_t at = std::max(begin, stop - kBlock);
        quantize_row(from + at, to + at, stop - at, scale, bounds.lo, bounds.hi);
      }
    });
  });
}

}  // namespace adadfq
