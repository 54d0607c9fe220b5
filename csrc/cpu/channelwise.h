// Walking a dense tensor whose elements need the parameters of their channel.
#ifndef ADADFQ_CPU_CHANNELWISE_H_
#define ADADFQ_CPU_CHANNELWISE_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../common/layout.h"
#include "parallel.h"

namespace adadfq {

// N float parameters for every channel.
template <size_t N>
struct ChannelParams {
  explicit ChannelParams(int64_t channels) {
    for (auto& values : each) values.resize(channels);
  }

  std::array<float, N> at(int64_t channel) const {
    std::array<float, N> values;
    for (size_t p = 0; p < N; ++p) values[p] = each[p][channel];
    return values;
  }

  std::array<std::vector<float>, N> each;
};

// From this many neighbouring elements of one channel on, a loop with constant parameters pays.
constexpr int64_t kRowElements = 16;
// Elements the repeated parameters are stretched to, at least and at most (they should stay in the
// L1 cache).
constexpr int64_t kPatternElements = 1024;
constexpr int64_t kLargestPattern = 65536;

// Repeats the parameters in memory order: [repeats, channels, inner] values.
template <size_t N>
ChannelParams<N> stretch(const ChannelParams<N>& params, const Layout& layout, int64_t repeats) {
  ChannelParams<N> out(repeats * layout.channels * layout.inner);
  for (size_t p = 0; p < N; ++p) {
    auto to = out.each[p].begin();
    for (int64_t r = 0; r < repeats; ++r) {
      for (const float value : params.each[p]) to = std::fill_n(to, layout.inner, value);
    }
  }
  return out;
}

// Calls, over all elements and in parallel,
//   row(begin, n, values)         n elements from `begin` on, all of one channel with these N
//                                 parameters, or
//   pattern(begin, n, pointers)   n elements from `begin` on, the i-th with pointers[p][i].
template <size_t N, typename Row, typename Pattern>
void for_each_segment(const Layout& layout, const ChannelParams<N>& params, int threads,
                      const Row& row, const Pattern& pattern) {
  const int64_t n = layout.elements(), inner = layout.inner, period = layout.channels * inner;
  constexpr int64_t kAlign = 64;  // elements: threads then share no cache line of the output
  threads = useful_threads(n, threads);

  if (inner >= kRowElements || (inner > 1 && period > kLargestPattern)) {
    parallel_for(n, threads, kAlign, [&](int64_t begin, int64_t end) {
      int64_t channel = begin / inner % layout.channels;
      for (int64_t stop = (begin / inner + 1) * inner; begin < end; begin = stop, stop += inner) {
        row(begin, std::min(stop, end) - begin, params.at(channel));
        channel = channel + 1 == layout.channels ? 0 : channel + 1;
      }
    });
    return;
  }

  const int64_t repeats =
      std::max<int64_t>(1, std::min((kPatternElements + period - 1) / period, n / period));
  const bool as_is = inner == 1 && repeats == 1;
  const ChannelParams<N> stretched = as_is ? ChannelParams<N>(0) : stretch(params, layout, repeats);
  const ChannelParams<N>& values = as_is ? params : stretched;
  const int64_t length = repeats * period;
  parallel_for(n, threads, kAlign, [&](int64_t begin, int64_t end) {
    for (int64_t phase = begin % length; begin < end; phase = 0) {
      const int64_t count = std::min(length - phase, end - begin);
      std::array<const float*, N> pointers;
      for (size_t p = 0; p < N; ++p) pointers[p] = values.each[p].data() + phase;
      pattern(begin, count, pointers);
      begin += count;
    }
  });
}

}  // namespace adadfq

#endif  // ADADFQ_CPU_CHANNELWISE_H_
