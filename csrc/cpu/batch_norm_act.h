// Training-mode BatchNorm with one scale and shift a channel, or a sample and channel, and
// LeakyReLU.
#ifndef ADADFQ_CPU_BATCH_NORM_ACT_H_
#define ADADFQ_CPU_BATCH_NORM_ACT_H_

#include "../common/dtype.h"
#include "../common/layout.h"

namespace adadfq {

// weight and bias, [samples, layout.channels] each, may be null. samples: 1, or a divisor of
// layout.outer, where each sample is so many neighbouring elements of the tensor.
struct BatchNormAct {
  const float* weight;
  const float* bias;
  int64_t samples;
  double eps;
  float negative_slope;
};

// x, y: layout.elements() values of `dtype`. Writes y, and the means and biased variances,
// layout.channels values each.
void batch_norm_act(const void* x, const BatchNormAct& norm, void* y, double* mean, double* var,
                    const Layout& layout, DType dtype, int threads);

// grad_y, x, grad_x: layout.elements() values of `dtype`. grad_weight and grad_bias,
// [samples, layout.channels] each, may be null.
void batch_norm_act_backward(const void* grad_y, const void* x, const double* mean,
                             const double* var, const BatchNormAct& norm, void* grad_x,
                             float* grad_weight, float* grad_bias, const Layout& layout,
                             DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_BATCH_NORM_ACT_H_
