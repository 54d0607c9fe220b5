// The order of a dense tensor's elements in memory.
#ifndef ADADFQ_COMMON_LAYOUT_H_
#define ADADFQ_COMMON_LAYOUT_H_

#include <cstdint>

namespace adadfq {

// [outer, channels, inner]: element i belongs to channel (i / inner) % channels. That covers every
// dense layout of a tensor with a channel axis (contiguous, channels_last, permuted) without a
// copy.
struct Layout {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t elements() const { return outer * channels * inner; }
};

}  // namespace adadfq

#endif  // ADADFQ_COMMON_LAYOUT_H_
