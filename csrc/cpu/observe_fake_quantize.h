// Fake quantisation over a moving range that the same call moves.
#ifndef ADADFQ_CPU_OBSERVE_FAKE_QUANTIZE_H_
#define ADADFQ_CPU_OBSERVE_FAKE_QUANTIZE_H_

#include <cstdint>

#include "../common/dtype.h"

namespace adadfq {

// State of an activation range, one value each.
struct RangeState {
  float* running_min;
  float* running_max;
  int64_t* num_batches;
  float* scale;
  int32_t* zero_point;
};

// x, out: n values of `dtype`, n >= 1, may be the same memory. Updates the state.
void observe_fake_quantize(const void* x, void* out, int64_t n, const RangeState& state, int bits,
                           double momentum, DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_OBSERVE_FAKE_QUANTIZE_H_
