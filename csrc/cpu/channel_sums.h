// Two sums for every channel, taken in one walk over a dense tensor.
//
// The tensor is cut into chunks, and each chunk adds what it finds to its own partial sums; the
// partial sums are then added in order. Chunks depend on the layout only, so the result is the same
// bit for bit whatever the number of threads.
//
// Within a chunk, where neighbouring elements belong to one channel, the walk goes row piece by row
// piece; where the channel changes from element to element (channels_last, [N, C]), tile by tile of
// whole rows of columns. Pieces and tiles fit the cache and are short enough for sums in float.
// Rows too short to be worth a sum of their own (7x7, 14x14) share lanes over some rows of their
// channel.
#ifndef ADADFQ_CPU_CHANNEL_SUMS_H_
#define ADADFQ_CPU_CHANNEL_SUMS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "channelwise.h"
#include "target_clones.h"

namespace adadfq {

constexpr int64_t kPieceElements = 4096;  // of a row: 16 KiB as float32, half an L1 cache
constexpr int64_t kTileElements = 32768;  // of columns: 128 KiB as float32, within an L2 cache
constexpr int64_t kTileRows = 64;
constexpr int64_t kShortRow = 512;
constexpr int64_t kChunkElements = 32768;
constexpr int64_t kMostChunks = 4096;

// Sums in float are kept in this many lanes, whatever the width of a vector register, so that every
// machine adds in the same order.
constexpr int kLanes = 32;
constexpr int kShortLanes = 16;

struct ChannelWalk {
  explicit ChannelWalk(const Layout& tensor) : layout(tensor) {
    by_rows = layout.outer == 1 || layout.inner >= kRowElements;
    pieces = by_rows ? (layout.inner + kPieceElements - 1) / kPieceElements : 1;
    units = by_rows ? layout.outer * layout.channels * pieces : layout.outer;
    tile_rows = std::min(kTileRows, std::max<int64_t>(16, kTileElements / columns()));
    short_rows = by_rows && layout.inner <= kShortRow && layout.outer > 1;
    const int64_t n = layout.elements();
    int64_t elements =
        std::max({kChunkElements, 64 * width(), (n + kMostChunks - 1) / kMostChunks});
    // Several rows of a channel a chunk, if that leaves enough chunks to share out.
    if (short_rows) elements = std::max(elements, std::min(8 * columns(), n / 32));
    chunks = std::min(units, std::max<int64_t>(1, layout.elements() / elements));
  }

  int64_t columns() const { return layout.channels * layout.inner; }
  // Row pieces after which the lanes of short rows go to double.
  int64_t flush_units() const {
    return layout.channels * std::max<int64_t>(1, kPieceElements / layout.inner);
  }
  // Floats a chunk needs to keep sums in before they go to double.
  int64_t scratch() const {
    return !by_rows ? 2 * columns() : short_rows ? 2 * kShortLanes * layout.channels : 0;
  }
  // Partial sums of a chunk.
  int64_t width() const { return by_rows ? layout.channels : columns(); }
  int64_t channel_of(int64_t column) const { return by_rows ? column : column / layout.inner; }

  Layout layout;
  bool by_rows;
  bool short_rows;
  int64_t pieces;  // of a row
  int64_t units;   // row pieces, or rows of columns
  int64_t tile_rows;
  int64_t chunks;
};

// One value a partial sum, from one a channel.
inline std::vector<float> spread(const ChannelWalk& walk, const float* channelwise) {
  std::vector<float> values(walk.width());
  for (int64_t k = 0; k < walk.width(); ++k) values[k] = channelwise[walk.channel_of(k)];
  return values;
}

// row(begin, n, channel) for every row piece in units [first, last).
template <typename Row>
ADADFQ_INLINE void walk_rows(const ChannelWalk& walk, int64_t first, int64_t last, const Row& row) {
  const int64_t inner = walk.layout.inner, channels = walk.layout.channels;
  int64_t line = first / walk.pieces, piece = first % walk.pieces, channel = line % channels;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t begin = piece * kPieceElements;
    row(line * inner + begin, std::min(kPieceElements, inner - begin), channel);
    if (++piece == walk.pieces) {
      piece = 0;
      ++line;
      channel = channel + 1 == channels ? 0 : channel + 1;
    }
  }
}

// tile(begin, rows) for every tile in units [first, last).
template <typename Tile>
ADADFQ_INLINE void walk_tiles(const ChannelWalk& walk, int64_t first, int64_t last,
                              const Tile& tile) {
  for (int64_t unit = first; unit < last; unit += walk.tile_rows) {
    tile(unit * walk.columns(), std::min(walk.tile_rows, last - unit));
  }
}

// chunk(first, last, a, b, overall, scratch) adds the sums of units [first, last) to a and b,
// walk.width() values each that start at 0, and a sum over all channels to *overall, which starts
// at 0 too; scratch is walk.scratch() + walk.width() floats of any value. The totals go to `a` and
// `b`, one value a channel; that over all channels is returned.
template <typename Chunk>
double channel_sums_and_overall(const ChannelWalk& walk, int threads, std::vector<double>& a,
                                std::vector<double>& b, const Chunk& chunk) {
  const int64_t width = walk.width();
  std::vector<double> partial(2 * walk.chunks * width), overall(walk.chunks);
  const int64_t parts =
      std::min<int64_t>(walk.chunks, useful_threads(walk.layout.elements(), threads));
  // Allocated here: an exception must not leave a parallel region. With room between the threads'
  // parts, or the sums of one would share a cache line with another's at every row.
  const int64_t stride = walk.scratch() + width + 64;
  std::vector<float> scratch(parts * stride);
  parallel_for(parts, static_cast<int>(parts), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t stop = (part + 1) * walk.chunks / parts;
      for (int64_t i = part * walk.chunks / parts; i < stop; ++i) {
        double* sums = &partial[2 * i * width];
        double all = 0;
        chunk(i * walk.units / walk.chunks, (i + 1) * walk.units / walk.chunks, sums, sums + width,
              &all, scratch.data() + part * stride);
        overall[i] = all;
      }
    }
  });
  a.assign(walk.layout.channels, 0.0);
  b.assign(walk.layout.channels, 0.0);
  double total = 0;
  for (int64_t i = 0; i < walk.chunks; ++i) {
    const double* sums = &partial[2 * i * width];
    total += overall[i];
    for (int64_t k = 0; k < width; ++k) {
      a[walk.channel_of(k)] += sums[k];
      b[walk.channel_of(k)] += sums[width + k];
    }
  }
  return total;
}

// The same for chunk(first, last, a, b, scratch), without a sum over all channels.
template <typename Chunk>
void channel_sums(const ChannelWalk& walk, int threads, std::vector<double>& a,
                  std::vector<double>& b, const Chunk& chunk) {
  channel_sums_and_overall(walk, threads, a, b,
                           [&](int64_t first, int64_t last, double* sum_a, double* sum_b, double*,
                               float* scratch) { chunk(first, last, sum_a, sum_b, scratch); });
}

struct Two {
  float first, second;
};

// Adds value(i), a Two, for every i in [0, n) to kCount lanes each of first and second; what is
// left over is returned. (Adding it to a lane would take the lanes out of their registers.)
// Elements must not depend on each other.
template <int kCount, typename Value>
ADADFQ_INLINE Two add_to_lanes(int64_t n, float* first, float* second, const Value& value) {
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) {
#pragma omp simd
    for (int j = 0; j < kCount; ++j) {
      const Two two = value(i + j);
      first[j] += two.first;
      second[j] += two.second;
    }
  }
  if (kCount == kLanes && i + kShortLanes <= n) {
#pragma omp simd
    for (int j = 0; j < kShortLanes; ++j) {
      const Two two = value(i + j);
      first[j] += two.first;
      second[j] += two.second;
    }
    i += kShortLanes;
  }
  Two rest = {0.0f, 0.0f};
  for (; i < n; ++i) {
    const Two two = value(i);
    rest.first += two.first;
    rest.second += two.second;
  }
  return rest;
}

// Adds value(i) over i in [0, n) to the lanes of a channel with short rows: kShortLanes sums of its
// first numbers, as many of its second.
template <typename Value>
ADADFQ_INLINE void add_short_row(int64_t n, float* ADADFQ_RESTRICT lanes, const Value& value) {
  float first[kShortLanes], second[kShortLanes];
  for (int j = 0; j < kShortLanes; ++j) first[j] = lanes[j];
  for (int j = 0; j < kShortLanes; ++j) second[j] = lanes[kShortLanes + j];
  const Two rest = add_to_lanes<kShortLanes>(n, first, second, value);
  for (int j = 0; j < kShortLanes; ++j) lanes[j] = first[j];
  for (int j = 0; j < kShortLanes; ++j) lanes[kShortLanes + j] = second[j];
  lanes[0] += rest.first;
  lanes[kShortLanes] += rest.second;
}

ADADFQ_INLINE float sum_short_lanes(float* lanes) {
  for (int j = 0; j < 8; ++j) lanes[j] += lanes[j + 8];
  for (int j = 0; j < 4; ++j) lanes[j] += lanes[j + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// Sums of value(i) over i in [0, n).
template <typename Value>
ADADFQ_INLINE Two sum_of_row(int64_t n, const Value& value) {
  float first[kLanes] = {0}, second[kLanes] = {0};
  const Two rest = add_to_lanes<kLanes>(n, first, second, value);
  for (int j = 0; j < kShortLanes; ++j) first[j] += first[j + kShortLanes];
  for (int j = 0; j < kShortLanes; ++j) second[j] += second[j + kShortLanes];
  return {sum_short_lanes(first) + rest.first, sum_short_lanes(second) + rest.second};
}

ADADFQ_INLINE float sum_of_values(int64_t n, const float* ADADFQ_RESTRICT values) {
  float lanes[kLanes] = {0}, rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) lanes[j] += values[i + j];
  }
  for (; i < n; ++i) rest += values[i];
  for (int j = 0; j < kShortLanes; ++j) lanes[j] += lanes[j + kShortLanes];
  return sum_short_lanes(lanes) + rest;
}

// first[i], second[i]: sums of value(r, i) over r in [0, rows), for every i in [0, columns). As
// many columns at a time as there are lanes, whose sums stay in registers.
template <typename Value>
ADADFQ_INLINE void sums_of_columns(int64_t rows, int64_t columns, float* ADADFQ_RESTRICT first,
                                   float* ADADFQ_RESTRICT second, const Value& value) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    float a[kLanes] = {0}, b[kLanes] = {0};
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        const Two two = value(r, i + j);
        a[j] += two.first;
        b[j] += two.second;
      }
    }
    for (int j = 0; j < kLanes; ++j) first[i + j] = a[j];
    for (int j = 0; j < kLanes; ++j) second[i + j] = b[j];
  }
  for (int64_t k = i; k < columns; ++k) first[k] = second[k] = 0;
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t k = i; k < columns; ++k) {
      const Two two = value(r, k);
      first[k] += two.first;
      second[k] += two.second;
    }
  }
}

}  // namespace adadfq

#endif  // ADADFQ_CPU_CHANNEL_SUMS_H_
