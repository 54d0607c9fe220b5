// Backward of fake quantisation with learned steps, of one tensor or of a list.
#ifndef ADADFQ_CPU_LEARNED_FAKE_QUANTIZE_H_
#define ADADFQ_CPU_LEARNED_FAKE_QUANTIZE_H_

#include <cstdint>

#include "../common/dtype.h"
#include "../common/learned_tensor.h"

namespace adadfq {

// `count` tensors of `dtype`: all the weights of a network in one call.
void learned_fake_quantize_backward(const LearnedTensor* tensors, int64_t count, DType dtype,
                                    int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_LEARNED_FAKE_QUANTIZE_H_
