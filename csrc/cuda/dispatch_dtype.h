// From a number of dtype to a type.
#ifndef ADADFQ_CUDA_DISPATCH_DTYPE_H_
#define ADADFQ_CUDA_DISPATCH_DTYPE_H_

#include <cuda_runtime_api.h>

#include "../common/dtype.h"

namespace adadfq {
namespace cuda {

// function(T{}) with the type that `dtype` stands for.
template <typename Function>
cudaError_t dispatch_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_DISPATCH_DTYPE_H_
