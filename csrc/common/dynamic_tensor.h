// A tensor whose channels are quantised over their own ranges.
#ifndef ADADFQ_COMMON_DYNAMIC_TENSOR_H_
#define ADADFQ_COMMON_DYNAMIC_TENSOR_H_

#include <cstdint>

#include "layout.h"

namespace adadfq {

// x, out: layout.elements() values of one dtype, at least one; scale and zero_point,
// layout.channels values each, are written (or, by foreach_fake_quantize, read). adadfq/ops writes
// this struct as int64 numbers.
struct DynamicTensor {
  const void* x;
  void* out;
  float* scale;
  int32_t* zero_point;
  Layout layout;
  int64_t bits;
};

}  // namespace adadfq

#endif  // ADADFQ_COMMON_DYNAMIC_TENSOR_H_
