// Scratch memory of results per channel.
#ifndef ADADFQ_CUDA_PARTIALS_H_
#define ADADFQ_CUDA_PARTIALS_H_

#include <algorithm>
#include <cstdint>

namespace adadfq {
namespace cuda {

// Results of blocks for channels, over all channels; more only where there are more channels.
constexpr int64_t kMostPartials = int64_t{1} << 14;

// Float64 numbers for them, two each.
inline int64_t partial_doubles(int64_t channels) { return 2 * std::max(channels, kMostPartials); }

// Rows of memory up to so many elements need none. Longer ones have too few blocks to read them,
// which would read them twice besides.
constexpr int64_t kLongestRow = 1 << 16;

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_PARTIALS_H_
