// From a DType to a storage type.
#ifndef ADADFQ_CPU_DISPATCH_DTYPE_H_
#define ADADFQ_CPU_DISPATCH_DTYPE_H_

#include <stdexcept>

#include "../common/dtype.h"

namespace adadfq {

// Calls body(T{}) with the storage type of `dtype`.
template <typename Body>
void dispatch_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
  throw std::invalid_argument("unknown dtype number");
}

}  // namespace adadfq

#endif  // ADADFQ_CPU_DISPATCH_DTYPE_H_
