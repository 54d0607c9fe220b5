// The tail of a quantised layer: per-channel affine map, residual, activation, fake quantisation.
#ifndef ADADFQ_CPU_AFFINE_ACT_FAKE_QUANTIZE_H_
#define ADADFQ_CPU_AFFINE_ACT_FAKE_QUANTIZE_H_

#include <cstdint>

#include "../common/dtype.h"
#include "channelwise.h"

namespace adadfq {

// The numbers are shared with adadfq/ops/cpu.py.
enum class Act : int { kNone = 0, kRelu = 1, kRelu6 = 2 };

// x, residual (null: none), out: layout.elements() values of `dtype`; scale, shift:
// layout.channels values; act_scale, act_zero_point: one value each, or null to leave the result
// unquantised.
void affine_act_fake_quantize(const void* x, const float* scale, const float* shift,
                              const void* residual, Act act, const float* act_scale,
                              const int32_t* act_zero_point, int bits, void* out,
                              const Layout& layout, DType dtype, int threads);

// The codes of that, 0..2^bits - 1, instead; act_scale and act_zero_point are there.
void affine_act_quantize(const void* x, const float* scale, const float* shift,
                         const void* residual, Act act, const float* act_scale,
                         const int32_t* act_zero_point, int bits, uint8_t* codes,
                         const Layout& layout, DType dtype, int threads);

// grad, x, residual (null: none), grad_x, grad_residual (null: not wanted): layout.elements()
// values of `dtype`. scale, shift, grad_scale and grad_shift (both null: not wanted):
// layout.channels values.
void affine_act_fake_quantize_backward(const void* grad, const void* x, const float* scale,
                                       const float* shift, const void* residual, Act act,
                                       void* grad_x, void* grad_residual, float* grad_scale,
                                       float* grad_shift, const Layout& layout, DType dtype,
                                       int threads);

// The same where the quantiser's step is learned; grad_act_scale: one value.
void affine_act_learned_fake_quantize_backward(const void* grad, const void* x, const float* scale,
                                               const float* shift, const void* residual, Act act,
                                               const float* act_scale,
                                               const int32_t* act_zero_point, int bits,
                                               void* grad_x, void* grad_residual, float* grad_scale,
                                               float* grad_shift, float* grad_act_scale,
                                               const Layout& layout, DType dtype, int threads);

}  // namespace adadfq

#endif  // ADADFQ_CPU_AFFINE_ACT_FAKE_QUANTIZE_H_
