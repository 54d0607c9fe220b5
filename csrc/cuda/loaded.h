// Elements that a thread has loaded and not used yet.
#ifndef ADADFQ_CUDA_LOADED_H_
#define ADADFQ_CUDA_LOADED_H_

#include <cstdint>
#include <type_traits>

#include "pack.h"

namespace adadfq {
namespace cuda {

template <typename T, int n, bool pairs = sizeof(T) == 2 && n % 2 == 0>
struct Loaded {
  Pack<T, n> pack;

  static __device__ __forceinline__ Loaded from(const T* address) { return {load<n>(address)}; }

  __device__ __forceinline__ float value(int j) const { return to_float(pack.values[j]); }
};

// 16-bit elements stay in the words that were loaded until they are used: of an array of them nvcc
// makes one register each right behind the load, and whatever is loaded next waits for that.
template <typename T, int n>
struct Loaded<T, n, true> {
  Pack<uint32_t, n / 2> words;

  static __device__ __forceinline__ Loaded from(const T* address) {
    return {load<n / 2>(reinterpret_cast<const uint32_t*>(address))};
  }

  __device__ __forceinline__ float value(int j) const {
    const uint32_t word = words.values[j / 2];
    if (std::is_same<T, BFloat16>::value)
      return bits_to_float(j % 2 == 0 ? word << 16 : word & 0xffff0000u);
    return to_float(T{static_cast<uint16_t>(j % 2 == 0 ? word : word >> 16)});
  }
};

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_LOADED_H_
