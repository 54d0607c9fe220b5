// Walking a dense tensor whose elements need the parameters of their channel.
#ifndef ADADFQ_CPU_CHANNELWISE_H_
#define ADADFQ_CPU_CHANNELWISE_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/layout.h"
#include "parallel.h"

namespace adadfq {

// Three float parameters for every channel.
struct ChannelParams {
  explicit ChannelParams(int64_t n) : a(n), b(n), c(n) {}

  std::vector<float> a, b, c;
};

// From this many neighbouring elements of one channel on, a loop with constant parameters pays.
constexpr int64_t kRowElements = 16;
// Elements the repeated parameters are stretched to, at least and at most (they should stay in the
// L1 cache).
constexpr int64_t kPatternElements = 1024;
constexpr int64_t kLargestPattern = 65536;

// Repeats the parameters in memory order: [repeats, channels, inner] values.
inline ChannelParams stretch(const ChannelParams& params, const Layout& layout, int64_t repeats) {
  ChannelParams out(repeats * layout.channels * layout.inner);
  int64_t i = 0;
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t c = 0; c < layout.channels; ++c) {
      for (int64_t k = 0; k < layout.inner; ++k, ++i) {
        out.a[i] = params.a[c];
        out.b[i] = params.b[c];
        out.c[i] = params.c[c];
      }
    }
  }
  return out;
}

// Calls, over all elements and in parallel,
//   row(begin, n, a, b, c)              n elements from `begin` on, all of one channel, or
//   pattern(begin, n, a[], b[], c[])    n elements from `begin` on, the i-th with a[i], b[i], c[i].
template <typename Row, typename Pattern>
void for_each_segment(const Layout& layout, const ChannelParams& params, int threads,
                      const Row& row, const Pattern& pattern) {
  const int64_t n = layout.elements(), inner = layout.inner, period = layout.channels * inner;
  constexpr int64_t kAlign = 64;  // elements: threads then share no cache line of the output
  threads = useful_threads(n, threads);

  if (inner >= kRowElements || (inner > 1 && period > kLargestPattern)) {
    parallel_for(n, threads, kAlign, [&](int64_t begin, int64_t end) {
      int64_t channel = begin / inner % layout.channels;
      for (int64_t stop = (begin / inner + 1) * inner; begin < end; begin = stop, stop += inner) {
        row(begin, std::min(stop, end) - begin, params.a[channel], params.b[channel],
            params.c[channel]);
        channel = channel + 1 == layout.channels ? 0 : channel + 1;
      }
    });
    return;
  }

  const int64_t repeats =
      std::max<int64_t>(1, std::min((kPatternElements + period - 1) / period, n / period));
  const bool as_is = inner == 1 && repeats == 1;
  const ChannelParams stretched = as_is ? ChannelParams(0) : stretch(params, layout, repeats);
  const ChannelParams& values = as_is ? params : stretched;
  const int64_t length = repeats * period;
  parallel_for(n, threads, kAlign, [&](int64_t begin, int64_t end) {
    for (int64_t phase = begin % length; begin < end; phase = 0) {
      const int64_t count = std::min(length - phase, end - begin);
      pattern(begin, count, values.a.data() + phase, values.b.data() + phase,
              values.c.data() + phase);
      begin += count;
    }
  });
}

}  // namespace adadfq

#endif  // ADADFQ_CPU_CHANNELWISE_H_
