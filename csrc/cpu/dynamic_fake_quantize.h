// Fake quantisation of every channel over its own minimum and maximum.
#ifndef ADADFQ_CPU_DYNAMIC_FAKE_QUANTIZE_H_
#define ADADFQ_CPU_DYNAMIC_FAKE_QUANTIZE_H_

#include <cstdint>

#include "../common/dtype.h"
#include "channelwise.h"

namespace adadfq {

// x, out: layout.elements() values of `dtype`. Writes scale and zero_point, layout.channels values
// each.
void dynamic_fake_quantize(const void* x, void* out, float* scale, int32_t* zero_point,
                           const Layout& layout, int bits, DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_DYNAMIC_FAKE_QUANTIZE_H_
