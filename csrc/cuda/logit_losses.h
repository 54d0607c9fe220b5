// The two losses of the game that are functions of the teacher's and the student's logits, with
// gradients, on a CUDA device.
#ifndef ADADFQ_CUDA_LOGIT_LOSSES_H_
#define ADADFQ_CUDA_LOGIT_LOSSES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"
#include "../common/logit_losses.h"

namespace adadfq {
namespace cuda {

// Device memory: four scalars and [batch].
struct MarginLosses {
  float *total, *margin, *disagreement, *agreement, *h_prime;
};

// Device memory. Logits and their gradients: [batch, classes] of `dtype`, contiguous, both at least
// 1; scratch: 5 * batch doubles. A label outside 0..classes - 1 makes the losses and its row's
// gradients NaN. Queued on `stream` of the current device; never waits.
cudaError_t margin_loss(const void* teacher, const void* student, const int64_t* labels,
                        const MarginLosses& losses, void* grad_teacher, void* grad_student,
                        double* scratch, int64_t batch, int64_t classes,
                        const MarginLossSettings& settings, DType dtype, cudaStream_t stream);

// Logits and gradient: [batch, classes] of `dtype`, contiguous; scratch: batch doubles.
cudaError_t entropy_distillation(const void* teacher, const void* student, float* loss,
                                 void* grad_student, double* scratch, int64_t batch,
                                 int64_t classes, double temperature, DType dtype,
                                 cudaStream_t stream);

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_LOGIT_LOSSES_H_
