// The vectorised inner loops of fake quantisation, over n neighbouring elements.
#ifndef ADADFQ_CPU_QUANTIZE_LOOPS_H_
#define ADADFQ_CPU_QUANTIZE_LOOPS_H_

#include <cstdint>

#include "../common/dtype.h"

namespace adadfq {

// One channel: every element has the same scale and code bounds. `out` may be `x`.
void quantize_row(const float* x, float* out, int64_t n, float scale, float lo, float hi);
void quantize_row(const BFloat16* x, BFloat16* out, int64_t n, float scale, float lo, float hi);
void quantize_row(const Float16* x, Float16* out, int64_t n, float scale, float lo, float hi);

// Element i has scale[i], lo[i], hi[i].
void quantize_pattern(const float* x, float* out, int64_t n, const float* scale, const float* lo,
                      const float* hi);
void quantize_pattern(const BFloat16* x, BFloat16* out, int64_t n, const float* scale,
                      const float* lo, const float* hi);
void quantize_pattern(const Float16* x, Float16* out, int64_t n, const float* scale,
                      const float* lo, const float* hi);

// grad where x has a code, 0 elsewhere. Gradients are copied bit for bit, so 16-bit ones stay
// integers.
void clip_row(const float* grad, const float* x, float* out, int64_t n, float scale, float lo,
              float hi);
void clip_row(const BFloat16* grad, const BFloat16* x, BFloat16* out, int64_t n, float scale,
              float lo, float hi);
void clip_row(const Float16* grad, const Float16* x, Float16* out, int64_t n, float scale, float lo,
              float hi);

void clip_pattern(const float* grad, const float* x, float* out, int64_t n, const float* scale,
                  const float* lo, const float* hi);
void clip_pattern(const BFloat16* grad, const BFloat16* x, BFloat16* out, int64_t n,
                  const float* scale, const float* lo, const float* hi);
void clip_pattern(const Float16* grad, const Float16* x, Float16* out, int64_t n,
                  const float* scale, const float* lo, const float* hi);

}  // namespace adadfq

#endif  // ADADFQ_CPU_QUANTIZE_LOOPS_H_
