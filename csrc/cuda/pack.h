// 16 bytes of elements, or one element: what a thread loads and stores at a time.
#ifndef ADADFQ_CUDA_PACK_H_
#define ADADFQ_CUDA_PACK_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

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

// The same for global memory, in one instruction: nvcc may store the structure value by value.
template <int n, typename T>
__device__ __forceinline__ void store_global(T* address, const Pack<T, n>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof pack >= sizeof(uint32_t)) {
    const size_t to = __cvta_generic_to_global(address);
    uint32_t words[sizeof pack / sizeof(uint32_t)];
    memcpy(words, &pack, sizeof words);
    if constexpr (sizeof pack == 16)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    else if constexpr (sizeof pack == 8)
      asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1])
                   : "memory");
    else
      asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(words[0]) : "memory");
    return;
  }
#endif
  store(address, pack);
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

// Elements between the beginning of a pack and all of these (null ones aside), where a pack is n
// elements whatever their type; -1 where they differ.
template <int n, typename... Ts>
int pack_phase(const Ts*... pointers) {
  int found = -2;
  const auto meet = [&](uintptr_t address, size_t size) {
    if (address == 0) return;
    const int phase = static_cast<int>(address / size % n);
    found = found == -2 || found == phase ? phase : -1;
  };
  (meet(reinterpret_cast<uintptr_t>(pointers), sizeof(Ts)), ...);
  return found;
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_PACK_H_
