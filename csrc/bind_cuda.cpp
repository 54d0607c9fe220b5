// adadfq._C_cuda: the CUDA launchers for Python.
//
// Tensors come as device addresses that adadfq/ops/native_args.py has checked, the stream as its
// handle. The CUDA runtime is linked statically: importing this module needs neither a device nor a
// driver. It keeps its own idea of the current device, hence the device argument.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/affine_act_fake_quantize.h"
#include "cuda/block_counter.h"
#include "cuda/bn_match.h"
#include "cuda/dynamic_fake_quantize.h"
#include "cuda/fake_quantize.h"
#include "cuda/learned_fake_quantize.h"
#include "cuda/logit_losses.h"
#include "cuda/observe_fake_quantize.h"
#include "cuda/packing.h"
#include "cuda/partials.h"

namespace py = pybind11;

namespace {

using adadfq::DType;
using adadfq::Layout;
using Address = std::uintptr_t;

template <typename T = void>
T* at_address(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error));
}

// Makes `device` current. The first call of the runtime on a device and the first launch of a
// kernel load what they need, which a thread that captures a graph, or runs beside one that does,
// may do in the relaxed mode only.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaThreadExchangeStreamCaptureMode(&mode_));
    if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) {
      cudaThreadExchangeStreamCaptureMode(&mode_);
      check(error);
    }
  }
  ~OnDevice() { cudaThreadExchangeStreamCaptureMode(&mode_); }

  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// What is the same for all launches on a device is made ready, best before a graph is captured.
void warm_up(int device) {
  const OnDevice on(device);
  check(adadfq::cuda::load_block_counters());
}

void fake_quantize(Address x, Address scale, Address zero_point, Address out, int64_t outer,
                   int64_t channels, int64_t inner, int bits, int dtype, int device,
                   Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::fake_quantize(
      at_address(x), at_address<float>(scale), at_address<int32_t>(zero_point), at_address(out),
      Layout{outer, channels, inner}, bits, DType(dtype), reinterpret_cast<cudaStream_t>(stream)));
}

void fake_quantize_backward(Address grad, Address x, Address scale, Address zero_point, Address out,
                            int64_t outer, int64_t channels, int64_t inner, int bits, int dtype,
                            int device, Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::fake_quantize_backward(
      at_address(grad), at_address(x), at_address<float>(scale), at_address<int32_t>(zero_point),
      at_address(out), Layout{outer, channels, inner}, bits, DType(dtype),
      reinterpret_cast<cudaStream_t>(stream)));
}

// An address of 0 is a tensor that is not there.
void affine_act_fake_quantize(Address x, Address scale, Address shift, Address residual, int act,
                              Address act_scale, Address act_zero_point, int bits, Address out,
                              int64_t outer, int64_t channels, int64_t inner, int dtype, int device,
                              Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::affine_act_fake_quantize(
      at_address(x), at_address<float>(scale), at_address<float>(shift), at_address(residual), act,
      at_address<float>(act_scale), at_address<int32_t>(act_zero_point), bits, at_address(out),
      Layout{outer, channels, inner}, DType(dtype), reinterpret_cast<cudaStream_t>(stream)));
}

void affine_act_quantize(Address x, Address scale, Address shift, Address residual, int act,
                         Address act_scale, Address act_zero_point, int bits, Address codes,
                         int64_t outer, int64_t channels, int64_t inner, int dtype, int device,
                         Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::affine_act_quantize(
      at_address(x), at_address<float>(scale), at_address<float>(shift), at_address(residual), act,
      at_address<float>(act_scale), at_address<int32_t>(act_zero_point), bits,
      at_address<uint8_t>(codes), Layout{outer, channels, inner}, DType(dtype),
      reinterpret_cast<cudaStream_t>(stream)));
}

void quantize_pack(Address x, Address scale, Address zero_point, Address packed, int64_t outer,
                   int64_t channels, int64_t inner, int bits, int dtype, int device,
                   Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::quantize_pack(at_address(x), at_address<float>(scale),
                                    at_address<int32_t>(zero_point), at_address<uint8_t>(packed),
                                    Layout{outer, channels, inner}, bits, DType(dtype),
                                    reinterpret_cast<cudaStream_t>(stream)));
}

void unpack_dequantize(Address packed, Address scale, Address zero_point, Address out,
                       int64_t outer, int64_t channels, int64_t inner, int bits, int dtype,
                       int device, Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::unpack_dequantize(at_address<uint8_t>(packed), at_address<float>(scale),
                                        at_address<int32_t>(zero_point), at_address(out),
                                        Layout{outer, channels, inner}, bits, DType(dtype),
                                        reinterpret_cast<cudaStream_t>(stream)));
}

void margin_loss(Address teacher, Address student, Address labels, Address total, Address margin,
                 Address disagreement, Address agreement, Address h_prime, Address grad_teacher,
                 Address grad_student, Address scratch, int64_t batch, int64_t classes,
                 double lambda_l, double lambda_u, double alpha_ds, double alpha_as, double beta,
                 bool detach_min, int dtype, int device, Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::margin_loss(
      at_address(teacher), at_address(student), at_address<int64_t>(labels),
      {at_address<float>(total), at_address<float>(margin), at_address<float>(disagreement),
       at_address<float>(agreement), at_address<float>(h_prime)},
      at_address(grad_teacher), at_address(grad_student), at_address<double>(scratch), batch,
      classes, {lambda_l, lambda_u, alpha_ds, alpha_as, beta, detach_min}, DType(dtype),
      reinterpret_cast<cudaStream_t>(stream)));
}

void entropy_distillation(Address teacher, Address student, Address loss, Address grad_student,
                          Address scratch, int64_t batch, int64_t classes, double temperature,
                          int dtype, int device, Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::entropy_distillation(at_address(teacher), at_address(student),
                                           at_address<float>(loss), at_address(grad_student),
                                           at_address<double>(scratch), batch, classes, temperature,
                                           DType(dtype), reinterpret_cast<cudaStream_t>(stream)));
}

// tensors: `count` DynamicTensor structs, written by Python as eight int64 numbers each.
static_assert(sizeof(adadfq::DynamicTensor) == 8 * sizeof(int64_t), "adadfq/ops/cuda.py writes it");

void dynamic_fake_quantize(Address tensors, int64_t count, Address scratch, int dtype, int device,
                           Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::dynamic_fake_quantize(at_address<adadfq::DynamicTensor>(tensors), count,
                                            at_address<double>(scratch), DType(dtype),
                                            reinterpret_cast<cudaStream_t>(stream)));
}

void foreach_fake_quantize(Address tensors, int64_t count, int dtype, int device, Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::foreach_fake_quantize(at_address<adadfq::DynamicTensor>(tensors), count,
                                            DType(dtype), reinterpret_cast<cudaStream_t>(stream)));
}

// tensors: `count` LearnedTensor structs, written by Python as ten int64 numbers each.
static_assert(sizeof(adadfq::LearnedTensor) == 10 * sizeof(int64_t), "adadfq/ops writes it");

void learned_fake_quantize_backward(Address tensors, int64_t count, Address scratch, int dtype,
                                    int device, Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::learned_fake_quantize_backward(
      at_address<adadfq::LearnedTensor>(tensors), count, at_address<double>(scratch), DType(dtype),
      reinterpret_cast<cudaStream_t>(stream)));
}

void observe_fake_quantize(Address x, Address out, int64_t n, Address running_min,
                           Address running_max, Address num_batches, Address scale,
                           Address zero_point, Address scratch, int bits, double momentum,
                           int dtype, int device, Address stream) {
  const OnDevice on(device);
  const adadfq::RangeState state{at_address<float>(running_min), at_address<float>(running_max),
                                 at_address<int64_t>(num_batches), at_address<float>(scale),
                                 at_address<int32_t>(zero_point)};
  check(adadfq::cuda::observe_fake_quantize(at_address(x), at_address(out), n, state,
                                            at_address<double>(scratch), bits, momentum,
                                            DType(dtype), reinterpret_cast<cudaStream_t>(stream)));
}

// grad_scale and grad_shift may be 0, then scratch too.
void affine_act_fake_quantize_backward(Address grad, Address x, Address scale, Address shift,
                                       Address residual, int act, Address grad_x,
                                       Address grad_residual, Address grad_scale,
                                       Address grad_shift, Address scratch, int64_t outer,
                                       int64_t channels, int64_t inner, int dtype, int device,
                                       Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::affine_act_fake_quantize_backward(
      at_address(grad), at_address(x), at_address<float>(scale), at_address<float>(shift),
      at_address(residual), act, at_address(grad_x), at_address(grad_residual),
      at_address<float>(grad_scale), at_address<float>(grad_shift), at_address<double>(scratch),
      Layout{outer, channels, inner}, DType(dtype), reinterpret_cast<cudaStream_t>(stream)));
}

// grad_scale and grad_shift may be 0.
void affine_act_learned_fake_quantize_backward(
    Address grad, Address x, Address scale, Address shift, Address residual, int act,
    Address act_scale, Address act_zero_point, int bits, Address grad_x, Address grad_residual,
    Address grad_scale, Address grad_shift, Address grad_act_scale, Address scratch,
    Address block_sums, int64_t outer, int64_t channels, int64_t inner, int dtype, int device,
    Address stream) {
  const OnDevice on(device);
  check(adadfq::cuda::affine_act_learned_fake_quantize_backward(
      at_address(grad), at_address(x), at_address<float>(scale), at_address<float>(shift),
      at_address(residual), act, at_address<float>(act_scale), at_address<int32_t>(act_zero_point),
      bits, at_address(grad_x), at_address(grad_residual), at_address<float>(grad_scale),
      at_address<float>(grad_shift), at_address<float>(grad_act_scale), at_address<double>(scratch),
      at_address<double>(block_sums), Layout{outer, channels, inner}, DType(dtype),
      reinterpret_cast<cudaStream_t>(stream)));
}

// y, weight and bias may be 0.
void bn_match(Address x, Address running_mean, Address running_var, Address weight, Address bias,
              double eps, Address y, Address loss, Address mean, Address var, Address scratch,
              int64_t outer, int64_t channels, int64_t inner, int dtype, int device,
              Address stream) {
  const OnDevice on(device);
  const adadfq::cuda::BatchNorm norm{at_address<float>(running_mean),
                                     at_address<float>(running_var), at_address<float>(weight),
                                     at_address<float>(bias), eps};
  check(adadfq::cuda::bn_match(at_address(x), norm, at_address(y), at_address<float>(loss),
                               at_address<double>(mean), at_address<double>(var),
                               at_address<double>(scratch), Layout{outer, channels, inner},
                               DType(dtype), reinterpret_cast<cudaStream_t>(stream)));
}

// grad_y and weight may be 0.
void bn_match_backward(Address grad_y, Address grad_loss, Address x, Address mean, Address var,
                       Address running_mean, Address running_var, Address weight, double eps,
                       Address out, int64_t outer, int64_t channels, int64_t inner, int dtype,
                       int device, Address stream) {
  const OnDevice on(device);
  const adadfq::cuda::BatchNorm norm{at_address<float>(running_mean),
                                     at_address<float>(running_var), at_address<float>(weight),
                                     nullptr, eps};
  check(adadfq::cuda::bn_match_backward(
      at_address(grad_y), at_address<float>(grad_loss), at_address(x), at_address<double>(mean),
      at_address<double>(var), norm, at_address(out), Layout{outer, channels, inner}, DType(dtype),
      reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of adadfq; tensors are addresses checked by adadfq.ops.native_args";
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("fake_quantize", &fake_quantize, nogil);
  m.def("fake_quantize_backward", &fake_quantize_backward, nogil);
  m.def("affine_act_fake_quantize", &affine_act_fake_quantize, nogil);
  m.def("affine_act_quantize", &affine_act_quantize, nogil);
  m.def("affine_act_fake_quantize_backward", &affine_act_fake_quantize_backward, nogil);
  m.def("affine_act_learned_fake_quantize_backward", &affine_act_learned_fake_quantize_backward,
        nogil);
  m.def("foreach_fake_quantize", &foreach_fake_quantize, nogil);
  m.def("learned_fake_quantize_backward", &learned_fake_quantize_backward, nogil);
  m.def("dynamic_fake_quantize", &dynamic_fake_quantize, nogil);
  m.def("observe_fake_quantize", &observe_fake_quantize, nogil);
  m.def("quantize_pack", &quantize_pack, nogil);
  m.def("unpack_dequantize", &unpack_dequantize, nogil);
  m.def("bn_match", &bn_match, nogil);
  m.def("bn_match_backward", &bn_match_backward, nogil);
  m.def("margin_loss", &margin_loss, nogil);
  m.def("entropy_distillation", &entropy_distillation, nogil);
  m.def("partial_doubles", &adadfq::cuda::partial_doubles);
  m.def("warm_up", &warm_up, nogil);
  m.attr("longest_row") = adadfq::cuda::kLongestRow;
}
