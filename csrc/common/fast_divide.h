// Division of many 31-bit numbers by one, as a multiplication and a shift.
#ifndef ADADFQ_COMMON_FAST_DIVIDE_H_
#define ADADFQ_COMMON_FAST_DIVIDE_H_

#include <cstdint>

#include "quantizer.h"

namespace adadfq {

// Exact for n < 2^31 and 1 <= divisor < 2^31 (Granlund and Montgomery): with 2^s >= divisor and
// m = floor(2^(32 + s) / divisor) + 1 - 2^32, n / divisor is (floor(m n / 2^32) + n) >> s.
class FastDivide {
 public:
  FastDivide() = default;

  explicit FastDivide(uint32_t divisor) : divisor_(divisor) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t above = (uint64_t{1} << shift_) - divisor;
    multiplier_ = static_cast<uint32_t>((above << 32) / divisor + 1);
  }

  ADADFQ_HD uint32_t quotient(uint32_t n) const {
    const uint32_t high = static_cast<uint32_t>((uint64_t{multiplier_} * n) >> 32);
    return (high + n) >> shift_;
  }

  ADADFQ_HD uint32_t divisor() const { return divisor_; }

 private:
  uint32_t divisor_ = 1;
  uint32_t multiplier_ = 1;
  uint32_t shift_ = 0;
};

}  // namespace adadfq

#endif  // ADADFQ_COMMON_FAST_DIVIDE_H_
