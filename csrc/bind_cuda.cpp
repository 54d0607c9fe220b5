// adadfq._C_cuda: the CUDA launchers for Python.
//
// Tensors come as device addresses that adadfq/ops/native_args.py has checked, the stream as its
// handle. The CUDA runtime is linked statically: importing this module needs neither a device nor a
// driver. It keeps its own idea of the current device, hence the device argument.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "cuda/fake_quantize.h"

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
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

void fake_quantize(Address x, Address scale, Address zero_point, Address out, int64_t outer,
                   int64_t channels, int64_t inner, int bits, int dtype, int device,
                   Address stream) {
  check(cudaSetDevice(device));
  check(adadfq::cuda::fake_quantize(
      at_address(x), at_address<float>(scale), at_address<int32_t>(zero_point), at_address(out),
      Layout{outer, channels, inner}, bits, DType(dtype), reinterpret_cast<cudaStream_t>(stream)));
}

void fake_quantize_backward(Address grad, Address x, Address scale, Address zero_point, Address out,
                            int64_t outer, int64_t channels, int64_t inner, int bits, int dtype,
                            int device, Address stream) {
  check(cudaSetDevice(device));
  check(adadfq::cuda::fake_quantize_backward(
      at_address(grad), at_address(x), at_address<float>(scale), at_address<int32_t>(zero_point),
      at_address(out), Layout{outer, channels, inner}, bits, DType(dtype),
      reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of adadfq; tensors are addresses checked by adadfq.ops.native_args";
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("fake_quantize", &fake_quantize, nogil);
  m.def("fake_quantize_backward", &fake_quantize_backward, nogil);
}
