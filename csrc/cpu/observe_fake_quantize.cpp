// The range of an activation: a debiased moving average of batch minima and maxima, and fake
// quantisation over it.
//
//   lo, hi      = min x, max x
//   num_batches = n            rate = (1 - momentum) / (1 - momentum^n)
//   running    += rate (end - running)             for both ends, in double
//   scale, zero_point = qparams_from_range(running_min, running_max)
//   x_hat       = fake_quantize(x, scale, zero_point)
//
// The scale needs the whole of x, so x is read twice. Each thread goes through its part forwards
// for the range and backwards to quantise, so that what the cache still holds is not read from
// memory again: 8 bytes an element, float32, where a thread's part fits the cache, up to 12 beyond.
//
// Test: python -m pytest tests/test_native_cpu.py -k observe
// Time: python -m benchmarks ops --ops observe_fake_quantize
#include "observe_fake_quantize.h"

#include <cmath>
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

float moved(float running, float end, double rate) {
  const double past = static_cast<double>(running);
  return static_cast<float>(past + rate * (static_cast<double>(end) - past));
}

void update(const RangeState& state, const Range& batch, int bits, double momentum) {
  const double n = static_cast<double>(++*state.num_batches);
  double rate = 1;
  if (momentum > 0) rate = std::expm1(std::log(momentum)) / std::expm1(std::log(momentum) * n);
  *state.running_min = moved(*state.running_min, batch.lo, rate);
  *state.running_max = moved(*state.running_max, batch.hi, rate);
  const QParams q = qparams_from_range(*state.running_min, *state.running_max, bits);
  *state.scale = q.scale;
  *state.zero_point = q.zero_point;
}

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
    update(state, batch.with_nan(), bits, momentum);
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
