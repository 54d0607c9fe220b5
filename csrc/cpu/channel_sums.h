// Two sums for every channel, taken in one walk over a dense tensor.
//
// The tensor is cut into chunks, and each chunk adds what it finds to its own partial sums; the
// partial sums are then added in order. Chunks depend on the layout only, so the result is the same
// bit for bit whatever the number of threads.
//
// Within a chunk, where neighbouring elements belong to one channel, the walk goes row piece by row
// piece; where the channel changes from element to element (channels_last, [N, C]), tile by tile of
// whole rows of columns. Pieces and tiles fit the cache and are short enough for sums in float.
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
constexpr int64_t kTileRows = 256;
constexpr int64_t kChunkElements = 32768;
constexpr int64_t kMostChunks = 256;

struct ChannelWalk {
  explicit ChannelWalk(const Layout& tensor) : layout(tensor) {
    by_rows = layout.outer == 1 || layout.inner >= kRowElements;
    pieces = by_rows ? (layout.inner + kPieceElements - 1) / kPieceElements : 1;
    units = by_rows ? layout.outer * layout.channels * pieces : layout.outer;
    tile_rows = std::min(kTileRows, std::max<int64_t>(16, kTileElements / columns()));
    const int64_t elements = std::max(
        {kChunkElements, 64 * width(), (layout.elements() + kMostChunks - 1) / kMostChunks});
    chunks = std::min(units, std::max<int64_t>(1, layout.elements() / elements));
  }

  int64_t columns() const { return layout.channels * layout.inner; }
  // Partial sums of a chunk.
  int64_t width() const { return by_rows ? layout.channels : columns(); }
  int64_t channel_of(int64_t column) const { return by_rows ? column : column / layout.inner; }

  Layout layout;
  bool by_rows;
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

// chunk(first, last, a, b) adds the sums of units [first, last) to a and b, walk.width() values
// each that start at 0. Their totals go to `a` and `b`, one value a channel.
template <typename Chunk>
void channel_sums(const ChannelWalk& walk, int threads, std::vector<double>& a,
                  std::vector<double>& b, const Chunk& chunk) {
  const int64_t width = walk.width();
  std::vector<double> partial(2 * walk.chunks * width);
  threads = useful_threads(walk.layout.elements(), threads);
  parallel_for(walk.chunks, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double* sums = &partial[2 * i * width];
      chunk(i * walk.units / walk.chunks, (i + 1) * walk.units / walk.chunks, sums, sums + width);
    }
  });
  a.assign(walk.layout.channels, 0.0);
  b.assign(walk.layout.channels, 0.0);
  for (int64_t i = 0; i < walk.chunks; ++i) {
    const double* sums = &partial[2 * i * width];
    for (int64_t k = 0; k < width; ++k) {
      a[walk.channel_of(k)] += sums[k];
      b[walk.channel_of(k)] += sums[width + k];
    }
  }
}

// Sums in float are kept in this many lanes, whatever the width of a vector register, so that every
// machine adds in the same order.
constexpr int kLanes = 32;

// body(i, lane) for every i in [0, n).
template <typename Body>
ADADFQ_INLINE void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) body(i + j, j);
  }
  if (i + kLanes / 2 <= n) {
    for (int j = 0; j < kLanes / 2; ++j) body(i + j, j);
    i += kLanes / 2;
  }
  for (int j = 0; i + j < n; ++j) body(i + j, j);
}

ADADFQ_INLINE float sum_lanes(const float* lanes) {
  float quarter[kLanes / 4];
  for (int j = 0; j < kLanes / 4; ++j) {
    quarter[j] = (lanes[j] + lanes[j + kLanes / 4]) +
                 (lanes[j + kLanes / 2] + lanes[j + kLanes / 2 + kLanes / 4]);
  }
  float total = 0;
  for (int j = 0; j < kLanes / 4; ++j) total += quarter[j];
  return total;
}

}  // namespace adadfq

#endif  // ADADFQ_CPU_CHANNEL_SUMS_H_
