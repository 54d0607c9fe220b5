// k-bit codes (k = 2..8) in a little-endian bit stream, once, for host and device.
//
//   code  = clamp(round(x / scale) + zero_point, 0, 2^k - 1), 0 for NaN
//   x_hat = (code - zero_point) * scale
//
// Code i is bits [i k, (i + 1) k) of the stream, lowest bit first; bit j of the stream is bit j % 8
// of byte j / 8; unused bits of the last byte are 0. Eight codes are k whole bytes, so groups of
// eight neighbouring elements are independent of each other, and a 64-bit word holds any of them.
//
// value_from_code(code_from_value(x)) is fake_quantize_value(x) (quantizer.h), bit for bit, where
// x / scale is not NaN.
#ifndef ADADFQ_COMMON_PACKING_H_
#define ADADFQ_COMMON_PACKING_H_

#include <cstdint>

#include "quantizer.h"

namespace adadfq {

constexpr int kGroup = 8;

// Bytes of `n` codes.
ADADFQ_HD int64_t packed_bytes(int64_t n, int bits) {
  return n / kGroup * bits + (n % kGroup * bits + 7) / 8;
}

// lo, hi: code_bounds of the zero point. More than k bits only where that is none a code can have.
ADADFQ_HD uint32_t code_from_value(float x, float scale, float lo, float hi) {
  const float steps = round_half_even(clamp_keep_nan(x / scale, lo, hi));
  return static_cast<uint32_t>(static_cast<int32_t>(steps == steps ? steps - lo : 0.0f));
}

// lo: minus the zero point. A code at the zero point gives +0, as round_half_even does.
ADADFQ_HD float value_from_code(uint32_t code, float scale, float lo) {
  return (static_cast<float>(static_cast<int32_t>(code)) + lo) * scale;
}

// Code `i` of a group in its place, cut to its bits; a group is the bitwise or of its eight.
ADADFQ_HD uint64_t place_code(uint32_t code, int i, int bits) {
  return uint64_t{code & static_cast<uint32_t>(max_code(bits))} << i * bits;
}

// Code `i` of a group.
ADADFQ_HD uint32_t code_at(uint64_t group, int i, int bits) {
  return static_cast<uint32_t>(group >> i * bits) & static_cast<uint32_t>(max_code(bits));
}

// `bytes` is the width for a whole group, packed_bytes of what there is for the last.
ADADFQ_HD void store_group(uint64_t group, int bytes, uint8_t* packed) {
  for (int i = 0; i < bytes; ++i) packed[i] = static_cast<uint8_t>(group >> 8 * i);
}

ADADFQ_HD uint64_t load_group(const uint8_t* packed, int bytes) {
  uint64_t group = 0;
  for (int i = 0; i < bytes; ++i) group |= uint64_t{packed[i]} << 8 * i;
  return group;
}

}  // namespace adadfq

#endif  // ADADFQ_COMMON_PACKING_H_
