// adadfq._C_cpu: the CPU launchers for Python.
//
// Tensors come as addresses that adadfq/ops/native_args.py has checked; nothing is checked again
// here. The GIL is released for every call.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/affine_act_fake_quantize.h"
#include "cpu/batch_norm_act.h"
#include "cpu/bn_match.h"
#include "cpu/dynamic_fake_quantize.h"
#include "cpu/fake_quantize.h"
#include "cpu/learned_fake_quantize.h"
#include "cpu/logit_losses.h"
#include "cpu/observe_fake_quantize.h"
#include "cpu/packing.h"

namespace py = pybind11;

namespace {

using adadfq::DType;
using adadfq::Layout;
using Address = std::uintptr_t;

template <typename T = void>
T* at_address(Address address) {
  return reinterpret_cast<T*>(address);
}

void fake_quantize(Address x, Address scale, Address zero_point, Address out, int64_t outer,
                   int64_t channels, int64_t inner, int bits, int dtype, int threads) {
  adadfq::fake_quantize(at_address(x), at_address<float>(scale), at_address<int32_t>(zero_point),
                        at_address(out), Layout{outer, channels, inner}, bits, DType(dtype),
                        threads);
}

void fake_quantize_backward(Address grad, Address x, Address scale, Address zero_point, Address out,
                            int64_t outer, int64_t channels, int64_t inner, int bits, int dtype,
                            int threads) {
  adadfq::fake_quantize_backward(at_address(grad), at_address(x), at_address<float>(scale),
                                 at_address<int32_t>(zero_point), at_address(out),
                                 Layout{outer, channels, inner}, bits, DType(dtype), threads);
}

// tensors: `count` DynamicTensor structs, written by Python as eight int64 numbers each.
static_assert(sizeof(adadfq::DynamicTensor) == 8 * sizeof(int64_t), "adadfq/ops/cpu.py writes it");

void dynamic_fake_quantize(Address tensors, int64_t count, int dtype, int threads) {
  adadfq::dynamic_fake_quantize(at_address<adadfq::DynamicTensor>(tensors), count, DType(dtype),
                                threads);
}

void foreach_fake_quantize(Address tensors, int64_t count, int dtype, int threads) {
  adadfq::foreach_fake_quantize(at_address<adadfq::DynamicTensor>(tensors), count, DType(dtype),
                                threads);
}

// tensors: `count` LearnedTensor structs, written by Python as ten int64 numbers each.
static_assert(sizeof(adadfq::LearnedTensor) == 10 * sizeof(int64_t), "adadfq/ops writes it");

void learned_fake_quantize_backward(Address tensors, int64_t count, int dtype, int threads) {
  adadfq::learned_fake_quantize_backward(at_address<adadfq::LearnedTensor>(tensors), count,
                                         DType(dtype), threads);
}

void observe_fake_quantize(Address x, Address out, int64_t n, Address running_min,
                           Address running_max, Address num_batches, Address scale,
                           Address zero_point, int bits, double momentum, int dtype, int threads) {
  const adadfq::RangeState state{at_address<float>(running_min), at_address<float>(running_max),
                                 at_address<int64_t>(num_batches), at_address<float>(scale),
                                 at_address<int32_t>(zero_point)};
  adadfq::observe_fake_quantize(at_address(x), at_address(out), n, state, bits, momentum,
                                DType(dtype), threads);
}

// An address of 0 is a tensor that is not there.
void affine_act_fake_quantize(Address x, Address scale, Address shift, Address residual, int act,
                              Address act_scale, Address act_zero_point, int bits, Address out,
                              int64_t outer, int64_t channels, int64_t inner, int dtype,
                              int threads) {
  adadfq::affine_act_fake_quantize(
      at_address(x), at_address<float>(scale), at_address<float>(shift), at_address(residual),
      adadfq::Act(act), at_address<float>(act_scale), at_address<int32_t>(act_zero_point), bits,
      at_address(out), Layout{outer, channels, inner}, DType(dtype), threads);
}

void affine_act_quantize(Address x, Address scale, Address shift, Address residual, int act,
                         Address act_scale, Address act_zero_point, int bits, Address codes,
                         int64_t outer, int64_t channels, int64_t inner, int dtype, int threads) {
  adadfq::affine_act_quantize(at_address(x), at_address<float>(scale), at_address<float>(shift),
                              at_address(residual), adadfq::Act(act), at_address<float>(act_scale),
                              at_address<int32_t>(act_zero_point), bits, at_address<uint8_t>(codes),
                              Layout{outer, channels, inner}, DType(dtype), threads);
}

void affine_act_fake_quantize_backward(Address grad, Address x, Address scale, Address shift,
                                       Address residual, int act, Address grad_x,
                                       Address grad_residual, Address grad_scale,
                                       Address grad_shift, int64_t outer, int64_t channels,
                                       int64_t inner, int dtype, int threads) {
  adadfq::affine_act_fake_quantize_backward(
      at_address(grad), at_address(x), at_address<float>(scale), at_address<float>(shift),
      at_address(residual), adadfq::Act(act), at_address(grad_x), at_address(grad_residual),
      at_address<float>(grad_scale), at_address<float>(grad_shift), Layout{outer, channels, inner},
      DType(dtype), threads);
}

void affine_act_learned_fake_quantize_backward(
    Address grad, Address x, Address scale, Address shift, Address residual, int act,
    Address act_scale, Address act_zero_point, int bits, Address grad_x, Address grad_residual,
    Address grad_scale, Address grad_shift, Address grad_act_scale, int64_t outer, int64_t channels,
    int64_t inner, int dtype, int threads) {
  adadfq::affine_act_learned_fake_quantize_backward(
      at_address(grad), at_address(x), at_address<float>(scale), at_address<float>(shift),
      at_address(residual), adadfq::Act(act), at_address<float>(act_scale),
      at_address<int32_t>(act_zero_point), bits, at_address(grad_x), at_address(grad_residual),
      at_address<float>(grad_scale), at_address<float>(grad_shift),
      at_address<float>(grad_act_scale), Layout{outer, channels, inner}, DType(dtype), threads);
}

void quantize_pack(Address x, Address scale, Address zero_point, Address packed, int64_t outer,
                   int64_t channels, int64_t inner, int bits, int dtype, int threads) {
  adadfq::quantize_pack(at_address(x), at_address<float>(scale), at_address<int32_t>(zero_point),
                        at_address<uint8_t>(packed), Layout{outer, channels, inner}, bits,
                        DType(dtype), threads);
}

void unpack_dequantize(Address packed, Address scale, Address zero_point, Address out,
                       int64_t outer, int64_t channels, int64_t inner, int bits, int dtype,
                       int threads) {
  adadfq::unpack_dequantize(at_address<uint8_t>(packed), at_address<float>(scale),
                            at_address<int32_t>(zero_point), at_address(out),
                            Layout{outer, channels, inner}, bits, DType(dtype), threads);
}

// y, weight and bias may be 0.
void bn_match(Address x, Address running_mean, Address running_var, Address weight, Address bias,
              double eps, Address y, Address loss, Address mean, Address var, int64_t outer,
              int64_t channels, int64_t inner, int dtype, int threads) {
  const adadfq::BatchNorm norm{at_address<float>(running_mean), at_address<float>(running_var),
                               at_address<float>(weight), at_address<float>(bias), eps};
  adadfq::bn_match(at_address(x), norm, at_address(y), at_address<float>(loss),
                   at_address<double>(mean), at_address<double>(var),
                   Layout{outer, channels, inner}, DType(dtype), threads);
}

// grad_y and weight may be 0.
void bn_match_backward(Address grad_y, Address grad_loss, Address x, Address mean, Address var,
                       Address running_mean, Address running_var, Address weight, double eps,
                       Address out, int64_t outer, int64_t channels, int64_t inner, int dtype,
                       int threads) {
  const adadfq::BatchNorm norm{at_address<float>(running_mean), at_address<float>(running_var),
                               at_address<float>(weight), nullptr, eps};
  adadfq::bn_match_backward(at_address(grad_y), at_address<float>(grad_loss), at_address(x),
                            at_address<double>(mean), at_address<double>(var), norm,
                            at_address(out), Layout{outer, channels, inner}, DType(dtype), threads);
}

// weight and bias may be 0.
void batch_norm_act(Address x, Address weight, Address bias, double eps, double negative_slope,
                    Address y, Address mean, Address var, int64_t samples, int64_t outer,
                    int64_t channels, int64_t inner, int dtype, int threads) {
  const adadfq::BatchNormAct norm{at_address<float>(weight), at_address<float>(bias), samples, eps,
                                  static_cast<float>(negative_slope)};
  adadfq::batch_norm_act(at_address(x), norm, at_address(y), at_address<double>(mean),
                         at_address<double>(var), Layout{outer, channels, inner}, DType(dtype),
                         threads);
}

// weight, bias, grad_weight and grad_bias may be 0.
void batch_norm_act_backward(Address grad_y, Address x, Address mean, Address var, Address weight,
                             Address bias, double eps, double negative_slope, Address grad_x,
                             Address grad_weight, Address grad_bias, int64_t samples, int64_t outer,
                             int64_t channels, int64_t inner, int dtype, int threads) {
  const adadfq::BatchNormAct norm{at_address<float>(weight), at_address<float>(bias), samples, eps,
                                  static_cast<float>(negative_slope)};
  adadfq::batch_norm_act_backward(at_address(grad_y), at_address(x), at_address<double>(mean),
                                  at_address<double>(var), norm, at_address(grad_x),
                                  at_address<float>(grad_weight), at_address<float>(grad_bias),
                                  Layout{outer, channels, inner}, DType(dtype), threads);
}

// Returns the index of the first label outside 0..classes - 1, having written nothing, or -1.
int64_t margin_loss(Address teacher, Address student, Address labels, Address total, Address margin,
                    Address disagreement, Address agreement, Address h_prime, Address grad_teacher,
                    Address grad_student, int64_t batch, int64_t classes, double lambda_l,
                    double lambda_u, double alpha_ds, double alpha_as, double beta, bool detach_min,
                    int dtype, int threads) {
  const int64_t bad = adadfq::first_bad_label(at_address<int64_t>(labels), batch, classes);
  if (bad < 0) {
    adadfq::margin_loss(
        at_address(teacher), at_address(student), at_address<int64_t>(labels),
        {at_address<float>(total), at_address<float>(margin), at_address<float>(disagreement),
         at_address<float>(agreement), at_address<float>(h_prime)},
        at_address(grad_teacher), at_address(grad_student), batch, classes,
        {lambda_l, lambda_u, alpha_ds, alpha_as, beta, detach_min}, DType(dtype), threads);
  }
  return bad;
}

void entropy_distillation(Address teacher, Address student, Address loss, Address grad_student,
                          int64_t batch, int64_t classes, double temperature, int dtype,
                          int threads) {
  adadfq::entropy_distillation(at_address(teacher), at_address(student), at_address<float>(loss),
                               at_address(grad_student), batch, classes, temperature, DType(dtype),
                               threads);
}

}  // namespace

PYBIND11_MODULE(_C_cpu, m) {
  m.doc() = "CPU kernels of adadfq; tensors are addresses checked by adadfq.ops.native_args";
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("fake_quantize", &fake_quantize, nogil);
  m.def("fake_quantize_backward", &fake_quantize_backward, nogil);
  m.def("learned_fake_quantize_backward", &learned_fake_quantize_backward, nogil);
  m.def("foreach_fake_quantize", &foreach_fake_quantize, nogil);
  m.def("dynamic_fake_quantize", &dynamic_fake_quantize, nogil);
  m.def("observe_fake_quantize", &observe_fake_quantize, nogil);
  m.def("affine_act_fake_quantize", &affine_act_fake_quantize, nogil);
  m.def("affine_act_quantize", &affine_act_quantize, nogil);
  m.def("affine_act_fake_quantize_backward", &affine_act_fake_quantize_backward, nogil);
  m.def("affine_act_learned_fake_quantize_backward", &affine_act_learned_fake_quantize_backward,
        nogil);
  m.def("quantize_pack", &quantize_pack, nogil);
  m.def("unpack_dequantize", &unpack_dequantize, nogil);
  m.def("bn_match", &bn_match, nogil);
  m.def("bn_match_backward", &bn_match_backward, nogil);
  m.def("batch_norm_act", &batch_norm_act, nogil);
  m.def("batch_norm_act_backward", &batch_norm_act_backward, nogil);
  m.def("margin_loss", &margin_loss, nogil);
  m.def("entropy_distillation", &entropy_distillation, nogil);
}
