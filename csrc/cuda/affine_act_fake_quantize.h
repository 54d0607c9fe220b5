// The tail of a quantised layer on a CUDA device: per-channel affine map, residual, activation,
// fake quantisation. Device memory; queued on `stream` of the current device, never waits.
#ifndef ADADFQ_CUDA_AFFINE_ACT_FAKE_QUANTIZE_H_
#define ADADFQ_CUDA_AFFINE_ACT_FAKE_QUANTIZE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"
#include "../common/layout.h"

namespace adadfq {
namespace cuda {

// x, residual (null: none), out: layout.elements() values of `dtype`; scale, shift: layout.channels
// values; act: 0 none, 1 ReLU, 2 ReLU6; act_scale, act_zero_point: one value each, or null to leave
// the result unquantised.
cudaError_t affine_act_fake_quantize(const void* x, const float* scale, const float* shift,
                                     const void* residual, int act, const float* act_scale,
                                     const int32_t* act_zero_point, int bits, void* out,
                                     const Layout& layout, DType dtype, cudaStream_t stream);

// The codes of that, 0..2^bits - 1, instead; act_scale and act_zero_point are there.
cudaError_t affine_act_quantize(const void* x, const float* scale, const float* shift,
                                const void* residual, int act, const float* act_scale,
                                const int32_t* act_zero_point, int bits, uint8_t* codes,
                                const Layout& layout, DType dtype, cudaStream_t stream);

// grad, x, residual (null: none), grad_x, grad_residual (null: not wanted): layout.elements()
// values of `dtype`. scale, shift, grad_scale and grad_shift (both null: not wanted):
// layout.channels values. scratch, read where those are wanted: partial_doubles(layout.channels)
// float64 numbers (partials.h).
cudaError_t affine_act_fake_quantize_backward(const void* grad, const void* x, const float* scale,
                                              const float* shift, const void* residual, int act,
                                              void* grad_x, void* grad_residual, float* grad_scale,
                                              float* grad_shift, double* scratch,
                                              const Layout& layout, DType dtype,
                                              cudaStream_t stream);

// The same where the quantiser's step is learned; grad_act_scale: one value. scratch and
// block_sums, each partial_doubles(layout.channels) float64 numbers, are always read.
cudaError_t affine_act_learned_fake_quantize_backward(
    const void* grad, const void* x, const float* scale, const float* shift, const void* residual,
    int act, const float* act_scale, const int32_t* act_zero_point, int bits, void* grad_x,
    void* grad_residual, float* grad_scale, float* grad_shift, float* grad_act_scale,
    double* scratch, double* block_sums, const Layout& layout, DType dtype, cudaStream_t stream);

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_AFFINE_ACT_FAKE_QUANTIZE_H_
