// A tensor quantised with a learned step, in its backward.
#ifndef ADADFQ_COMMON_LEARNED_TENSOR_H_
#define ADADFQ_COMMON_LEARNED_TENSOR_H_

#include <cstdint>

#include "layout.h"

namespace adadfq {

// grad, x, grad_x: layout.elements() values of one dtype, at least one; scale, zero_point and
// grad_scale: layout.channels values each. grad_x and grad_scale are written. adadfq/ops writes
// this struct as int64 numbers.
struct LearnedTensor {
  const void* grad;
  const void* x;
  void* grad_x;
  const float* scale;
  const int32_t* zero_point;
  float* grad_scale;
  Layout layout;
  int64_t bits;
};

}  // namespace adadfq

#endif  // ADADFQ_COMMON_LEARNED_TENSOR_H_
