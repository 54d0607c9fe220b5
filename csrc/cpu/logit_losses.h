// The two losses of the game that are functions of the teacher's and the student's logits, with
// gradients.
#ifndef ADADFQ_CPU_LOGIT_LOSSES_H_
#define ADADFQ_CPU_LOGIT_LOSSES_H_

#include <cstdint>

#include "../common/dtype.h"

namespace adadfq {

// Index of the first label outside 0..classes - 1, or -1.
int64_t first_bad_label(const int64_t* labels, int64_t batch, int64_t classes);

struct MarginLossOptions {
  double lambda_l;
  double lambda_u;
  double alpha_ds;
  double alpha_as;
  double beta;
  bool detach_min;
};

// Addresses of four scalars and [batch].
struct MarginLosses {
  float *total, *margin, *disagreement, *agreement, *h_prime;
};

// Logits and their gradients: [batch, classes] of `dtype`, contiguous. Labels must have been
// checked.
void margin_loss(const void* teacher, const void* student, const int64_t* labels,
                 const MarginLosses& losses, void* grad_teacher, void* grad_student, int64_t batch,
                 int64_t classes, const MarginLossOptions& options, DType dtype, int threads);

// Logits and gradient: [batch, classes] of `dtype`, contiguous.
void entropy_distillation(const void* teacher, const void* student, float* loss, void* grad_student,
                          int64_t batch, int64_t classes, double temperature, DType dtype,
                          int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_LOGIT_LOSSES_H_
