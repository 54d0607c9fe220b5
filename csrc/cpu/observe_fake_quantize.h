// Fake quantisation over a moving range that the same call moves.
#ifndef ADADFQ_CPU_OBSERVE_FAKE_QUANTIZE_H_
#define ADADFQ_CPU_OBSERVE_FAKE_QUANTIZE_H_

#include <cstdint>

#include "../common/dtype.h"
#include "../common/range_update.h"

namespace adadfq {

// x, out: n values of `dtype`, n >= 1, may be the same memory. Updates the state.
void observe_fake_quantize(const void* x, void* out, int64_t n, const RangeState& state, int bits,
                           double momentum, DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_OBSERVE_FAKE_QUANTIZE_H_
