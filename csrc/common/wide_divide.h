// FastDivide for 63-bit numbers.
#ifndef ADADFQ_COMMON_WIDE_DIVIDE_H_
#define ADADFQ_COMMON_WIDE_DIVIDE_H_

#include <cstdint>

#include "quantizer.h"

namespace adadfq {

// Exact for 0 <= n < 2^63 and 1 <= divisor < 2^63: csrc/common/fast_divide.h with 64 for 32.
class WideDivide {
 public:
  WideDivide() = default;

  explicit WideDivide(int64_t divisor) : divisor_(static_cast<uint64_t>(divisor)) {
    while ((uint64_t{1} << shift_) < divisor_) ++shift_;
    const unsigned __int128 above = (uint64_t{1} << shift_) - divisor_;
    multiplier_ = static_cast<uint64_t>((above << 64) / divisor_ + 1);
  }

  ADADFQ_HD int64_t quotient(int64_t number) const {
    const uint64_t n = static_cast<uint64_t>(number);
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(multiplier_, n);
#else
    const uint64_t high =
        static_cast<uint64_t>((static_cast<unsigned __int128>(multiplier_) * n) >> 64);
#endif
    return static_cast<int64_t>((high + n) >> shift_);
  }

  ADADFQ_HD int64_t divisor() const { return static_cast<int64_t>(divisor_); }

 private:
  uint64_t divisor_ = 1;
  uint64_t multiplier_ = 1;
  uint32_t shift_ = 0;
};

}  // namespace adadfq

#endif  // ADADFQ_COMMON_WIDE_DIVIDE_H_
