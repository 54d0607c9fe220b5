// Matching a layer's batch statistics with the running statistics of its BatchNorm, alone or with
// the BatchNorm itself.
#ifndef ADADFQ_CPU_BN_MATCH_H_
#define ADADFQ_CPU_BN_MATCH_H_

#include "../common/dtype.h"
#include "channelwise.h"

namespace adadfq {

// Parameters of an inference BatchNorm, one value a channel; weight and bias may be null.
struct BatchNorm {
  const float* running_mean;
  const float* running_var;
  const float* weight;
  const float* bias;
  double eps;
};

// x: layout.elements() values of `dtype`. Writes the loss (one value), and the means and biased
// variances, layout.channels values each. With `y` (values of `dtype`, else null) also writes the
// BatchNorm of x; without it only the running statistics of `norm` are read.
void bn_match(const void* x, const BatchNorm& norm, void* y, float* loss, double* mean, double* var,
              const Layout& layout, DType dtype, int threads);

// Only the means and biased variances of x.
void channel_moments(const void* x, double* mean, double* var, const Layout& layout, DType dtype,
                     int threads);

// grad_y (values of `dtype`, or null: no gradient but that of the loss), grad_loss: one value. x,
// out: layout.elements() values of `dtype`. Without grad_y only the running statistics of `norm`
// are read.
void bn_match_backward(const void* grad_y, const float* grad_loss, const void* x,
                       const double* mean, const double* var, const BatchNorm& norm, void* out,
                       const Layout& layout, DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_BN_MATCH_H_
