// Fake quantisation of every channel over its own minimum and maximum.
#ifndef ADADFQ_CPU_DYNAMIC_FAKE_QUANTIZE_H_
#define ADADFQ_CPU_DYNAMIC_FAKE_QUANTIZE_H_

#include <cstdint>

#include "../common/dtype.h"
#include "channelwise.h"

namespace adadfq {

// One tensor. x, out: layout.elements() values of one dtype, at least one; scale and zero_point,
// layout.channels values each, are written. adadfq/ops/cpu.py writes this struct as int64 numbers.
struct DynamicTensor {
  const void* x;
  void* out;
  float* scale;
  int32_t* zero_point;
  Layout layout;
  int64_t bits;
};

// `count` tensors of `dtype`: all the weights of a network in one call.
void dynamic_fake_quantize(const DynamicTensor* tensors, int64_t count, DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_DYNAMIC_FAKE_QUANTIZE_H_
