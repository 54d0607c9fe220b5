// Matching a layer's batch statistics with the running statistics of its BatchNorm.
#ifndef ADADFQ_CPU_BN_MATCH_H_
#define ADADFQ_CPU_BN_MATCH_H_

#include "../common/dtype.h"
#include "channelwise.h"

namespace adadfq {

// x: layout.elements() values of `dtype`; running_mean, running_var, mean, var: layout.channels
// values. Writes the loss, the means and the biased variances.
void bn_match(const void* x, const float* running_mean, const float* running_var, float* loss,
              float* mean, float* var, const Layout& layout, DType dtype, int threads);

// grad_loss: one value. x, out: layout.elements() values of `dtype`.
void bn_match_backward(const float* grad_loss, const void* x, const float* mean, const float* var,
                       const float* running_mean, const float* running_var, void* out,
                       const Layout& layout, DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_BN_MATCH_H_
