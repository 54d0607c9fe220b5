// bfloat16 and float16 as 16-bit storage, converted with integer arithmetic, or by a GPU's own
// instructions, which round alike.
//
// Without branches, so that loops over them vectorise on any instruction set; without _Float16 or
// __half, so that any C++17 compiler takes it, host and device alike. Rounding is to nearest, ties
// to even; NaN stays NaN, infinities and subnormals are kept. Exhaustively tested against PyTorch's
// conversions.
#ifndef ADADFQ_COMMON_DTYPE_H_
#define ADADFQ_COMMON_DTYPE_H_

#include <cstdint>
#include <cstring>

#include "quantizer.h"

namespace adadfq {

// Storage types. The numbers of DType are shared with adadfq/ops/native_args.py.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

ADADFQ_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

ADADFQ_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

ADADFQ_HD float to_float(float value) { return value; }

ADADFQ_HD float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

ADADFQ_HD float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(value.bits));
  return converted;
#endif
  const uint32_t sign = (uint32_t{value.bits} & 0x8000u) << 16;
  const uint32_t shifted = (uint32_t{value.bits} & 0x7fffu)
                           << 13;  // exponent and mantissa in place
  const uint32_t normal = shifted + (112u << 23);
  const uint32_t special = shifted + (224u << 23);  // infinity and NaN: all exponent bits set
  // A subnormal gets the implicit one of exponent 113 and loses it again by subtraction, which
  // normalises it and holds where subnormal floats are flushed to zero.
  const uint32_t subnormal =
      float_to_bits(bits_to_float(shifted + (113u << 23)) - bits_to_float(113u << 23));
  uint32_t bits = shifted < (1u << 23) ? subnormal : normal;
  bits = shifted >= (31u << 23) ? special : bits;
  return bits_to_float(bits | sign);
}

template <typename T>
ADADFQ_HD T from_float(float value);

template <>
ADADFQ_HD float from_float<float>(float value) {
  return value;
}

template <>
ADADFQ_HD BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 converted;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(converted.bits) : "f"(value));
  return converted;
#endif
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding would make an infinity of some NaN.
  return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0u)};
}

template <>
ADADFQ_HD Float16 from_float<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  Float16 converted;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(converted.bits) : "f"(value));
  return converted;
#endif
  const uint32_t all = float_to_bits(value);
  const uint32_t sign = (all >> 16) & 0x8000u;
  const uint32_t bits = all & 0x7fffffffu;
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 shifts the mantissa to where half's subnormals have theirs and rounds
  // it there.
  const uint32_t subnormal = float_to_bits(bits_to_float(bits) + 0.5f) - (126u << 23);
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = bits < (113u << 23) ? subnormal : normal;
  half = bits >= (143u << 23) ? special : half;
  return {static_cast<uint16_t>(half | sign)};
}

// Bit for bit, so that 16-bit values stay integers.
ADADFQ_HD float keep_if(bool keep, float value) { return keep ? value : 0.0f; }

template <typename T>
ADADFQ_HD T keep_if(bool keep, T value) {
  return {static_cast<uint16_t>(keep ? value.bits : 0)};
}

}  // namespace adadfq

#endif  // ADADFQ_COMMON_DTYPE_H_
