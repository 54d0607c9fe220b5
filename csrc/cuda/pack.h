// 16 bytes of elements, or one element: what a thread loads and stores at a time.
#ifndef ADADFQ_CUDA_PACK_H_
#define ADADFQ_CUDA_PACK_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/dtype.h"

namespace adadfq {
namespace cuda {

constexpr int kPackBytes = 16;

// Elements of 16 bytes.
template <typename T>
constexpr int kPackOf = kPackBytes / static_cast<int>(sizeof(T));

template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T values[n];
};

template <int n, typename T>
__device__ __forceinline__ Pack<T, n> load(const T* address) {
  return *reinterpret_cast<const Pack<T, n>*>(address);
}

template <int n, typename T>
__device__ __forceinline__ void store(T* address, const Pack<T, n>& pack) {
  *reinterpret_cast<Pack<T, n>*>(address) = pack;
}

template <typename T, int n>
__device__ __forceinline__ Pack<T, n> to_pack(const float (&values)[n]) {
  Pack<T, n> pack;
#pragma unroll
  for (int j = 0; j < n; ++j) pack.values[j] = from_float<T>(values[j]);
  return pack;
}

// Whether all of these (null ones aside) begin at multiples of 16 bytes.
template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % kPackBytes == 0));
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_PACK_H_
