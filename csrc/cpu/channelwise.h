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

// Any range of a tensor's elements in pieces whose parameters are at hand: rows of one channel
// where these are long, else whatever there is, beside the parameters in memory order.
template <size_t N>
class Segments {
 public:
  // `params` must outlive this.
  Segments(const Layout& layout, const ChannelParams<N>& params)
      : layout_(layout), period_(layout.channels * layout.inner), params_(params), stretched_(0) {
    rows_ = layout.inner >= kRowElements || (layout.inner > 1 && period_ > kLargestPattern);
    if (rows_) return;
    const int64_t n = layout.elements();
    const int64_t repeats =
        std::max<int64_t>(1, std::min((kPatternElements + period_ - 1) / period_, n / period_));
    as_is_ = layout.inner == 1 && repeats == 1;
    if (!as_is_) stretched_ = stretch(params, layout, repeats);
    length_ = repeats * period_;
  }

  // Calls, from element `begin` to `end` and in order,
  //   row(i, n, values)         n elements from the i-th on, all of one channel with these N
  //                             parameters, or
  //   pattern(i, n, pointers)   n elements from the i-th on, the j-th of them with pointers[p][j].
  template <typename Row, typename Pattern>
  void walk(int64_t begin, int64_t end, const Row& row, const Pattern& pattern) const {
    if (rows_) {
      const int64_t inner = layout_.inner;
      int64_t channel = begin / inner % layout_.channels;
      for (int64_t stop = (begin / inner + 1) * inner; begin < end; begin = stop, stop += inner) {
        row(begin, std::min(stop, end) - begin, params_.at(channel));
        channel = channel + 1 == layout_.channels ? 0 : channel + 1;
      }
      return;
    }
    const ChannelParams<N>& values = as_is_ ? params_ : stretched_;
    for (int64_t phase = begin % length_; begin < end; phase = 0) {
      const int64_t count = std::min(length_ - phase, end - begin);
      std::array<const float*, N> pointers;
      for (size_t p = 0; p < N; ++p) pointers[p] = values.each[p].data() + phase;
      pattern(begin, count, pointers);
      begin += count;
    }
  }

 private:
  const Layout layout_;
  const int64_t period_;
  const ChannelParams<N>& params_;
  ChannelParams<N> stretched_;
  bool rows_, as_is_ = false;
  int64_t length_ = 0;
};

// Segments::walk over all elements, in parallel.
template <size_t N, typename Row, typename Pattern>
void for_each_segment(const Layout& layout, const ChannelParams<N>& params, int threads,
                      const Row& row, const Pattern& pattern) {
  const Segments<N> segments(layout, params);
  const int64_t n = layout.elements();
  constexpr int64_t kAlign = 64;  // elements: threads then share no cache line of the output
  parallel_for(n, useful_threads(n, threads), kAlign,
               [&](int64_t begin, int64_t end) { segments.walk(begin, end, row, pattern); });
}

}  // namespace adadfq

#endif  // ADADFQ_CPU_CHANNELWISE_H_
