// Fake quantisation of every channel over its own minimum and maximum.
#ifndef ADADFQ_CPU_DYNAMIC_FAKE_QUANTIZE_H_
#define ADADFQ_CPU_DYNAMIC_FAKE_QUANTIZE_H_

#include <cstdint>

#include "../common/dtype.h"
#include "../common/dynamic_tensor.h"
#include "channelwise.h"

namespace adadfq {

// `count` tensors of `dtype`: all the weights of a network in one call.
void dynamic_fake_quantize(const DynamicTensor* tensors, int64_t count, DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_DYNAMIC_FAKE_QUANTIZE_H_
