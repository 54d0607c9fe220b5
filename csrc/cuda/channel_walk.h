// Which thread reads what of a dense tensor [outer, channels, inner] whose channels are summed, or
// need parameters that are worth computing once.
//
// Rows (inner > 1, or one channel). A block has one channel and a part of its segments, inner
// neighbouring elements each. It reads windows of n elements that lie at multiples of 16 bytes:
// those that overlap a segment, with a mask of the elements that belong to it. So planes of 7 x 7
// and views that begin anywhere are read 16 bytes at a time too. A window is read whole although
// its neighbours' elements are other blocks'; only the windows over the tensor's two ends are not,
// their elements are left to be taken one by one. Where segments begin and end at such multiples,
// WholeRows walks the same way and knows it.
//
// Columns (inner == 1). A block has up to kTileChannels neighbouring channels and a part of the
// rows; a thread has n channels of every so many rows.
//
// What a block reads depends on the sizes and alignments alone, not on the device, and so do sums.
#ifndef ADADFQ_CUDA_CHANNEL_WALK_H_
#define ADADFQ_CUDA_CHANNEL_WALK_H_

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../common/fast_divide.h"
#include "../common/layout.h"
#include "launch.h"
#include "pack.h"

namespace adadfq {
namespace cuda {

// Channels of a block of columns: 64 or 128 bytes of a row.
constexpr int kTileChannels = 32;
// Blocks that channels are cut for, few enough for the block that combines their sums. Of rows more
// than any device holds at once. Of columns, whose blocks leave sums of many channels, so many for
// each that a multiprocessor holds: 128 multiprocessors or more have them all at once.
constexpr int64_t kRowBlocks = 4096, kColumnBlocks = 128;
// What a thread has to read at least, in batches of loads, before another block takes half of it.
constexpr int64_t kLeastBatches = 2;
// Longer segments are cut, so that places in them are 32-bit numbers.
constexpr int64_t kLongestSegment = int64_t{1} << 28;
// Windows or rows of a block, so that their numbers are.
constexpr int64_t kMostOfBlock = int64_t{1} << 29;

// Elements i .. i + n - 1; bit j of the mask says whether element i + j is meant. 0: nothing to do.
struct Place {
  int64_t i;
  uint32_t mask;
};

template <int n>
constexpr uint32_t kWholePack = (1u << n) - 1;

// Keeps the compiler from finding a number anew, from what it was found from, wherever it is used.
__device__ __forceinline__ int64_t as_found(int64_t value) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(value));
#endif
  return value;
}

struct RowsShape {
  int64_t elements;
  int64_t channels;
  int64_t inner;    // of a row of the tensor
  int64_t pieces;   // segments of such a row
  int64_t segment;  // their length; of the last what is left
  int64_t apart;    // elements from a row to the next of its channel, and what is left of these
  int64_t between;  // without the row
  int64_t limit;    // windows that begin below lie in the tensor
  int64_t row;      // windows of a segment, at most
  FastDivide by_row;
  int64_t windows;  // of a channel
  int64_t size;     // windows of a block
  int64_t splits;   // blocks of a channel
  int phase;        // elements between a multiple of 16 bytes and the tensor
  bool whole;       // all windows are, and there is one piece
  // The elements before `head` and from `tail` on are in no window that lies in the tensor.
  int64_t head;
  int64_t tail;
  unsigned threads;
};

// all_whole: RowsShape::whole is true, so that places cost less.
template <bool all_whole>
struct RowsWalk : RowsShape {
  static constexpr bool kColumns = false;
  // Whether n elements are meant or none of them.
  template <int n>
  static constexpr bool kWhole = all_whole || n == 1;

  __host__ __device__ explicit RowsWalk(const RowsShape& shape) : RowsShape(shape) {}

  // How a block goes through its part: numbers at, at + step, .. below end.
  template <int n>
  struct Cursor {
    const RowsShape& rows;
    int64_t channel;
    int64_t split;
    int64_t segment;  // of number 0
    int64_t first;    // element that it begins with, where segments are rows
    uint32_t at;
    uint32_t end;

    __device__ __forceinline__ explicit Cursor(const RowsShape& walk) : rows(walk) {
      const unsigned channels = static_cast<unsigned>(rows.channels);
      split = blockIdx.x / channels;
      channel = blockIdx.x % channels;
      const int64_t window = split * rows.size;
      segment = window / rows.row;
      const uint32_t lead = static_cast<uint32_t>(window - segment * rows.row);
      first = as_found((segment * rows.channels + channel) * rows.inner);
      at = lead + threadIdx.x;
      end = lead + static_cast<uint32_t>(min(rows.size, rows.windows - window));
    }

    __device__ __forceinline__ uint32_t step() const { return blockDim.x; }

    __device__ __forceinline__ Place place(uint32_t number) const {
      const uint32_t by = rows.by_row.quotient(number);
      if (all_whole)
        return {first + int64_t{number} * n + int64_t{by} * rows.between, kWholePack<n>};
      const int window = static_cast<int>(number - by * rows.by_row.divisor());
      int64_t begin = first + int64_t{by} * rows.apart, length = rows.inner;
      if (rows.pieces > 1) {
        const int64_t line = (segment + by) / rows.pieces,
                      within = (segment + by - line * rows.pieces) * rows.segment;
        begin = (line * rows.channels + channel) * rows.inner + within;
        length = min(rows.segment, rows.inner - within);
      }
      if (n == 1) return {begin + window, window < length ? 1u : 0u};
      const int lead = static_cast<int>((static_cast<uint32_t>(begin) + rows.phase) % n);
      const int before = window * n - lead;  // elements of the segment
      const int lo = max(-before, 0);
      const int hi = max(min(static_cast<int>(length) - before, n), 0);
      const int64_t i = begin + before;
      const bool inside = static_cast<uint64_t>(i) < static_cast<uint64_t>(rows.limit);
      return {i, inside ? ~(~0u << hi) & (~0u << lo) : 0u};
    }

    // The channels that the block has, and of these the j-th of this thread's.
    __device__ __forceinline__ int64_t first_channel() const { return channel; }
    __device__ __forceinline__ int block_channels() const { return 1; }
    __device__ __forceinline__ int own_channel(int) const { return 0; }
  };
};

using Rows = RowsWalk<false>;
using WholeRows = RowsWalk<true>;

// phase: see above; any where n is 1. loads: how many windows a thread reads at once.
template <int n>
RowsShape rows_of(const Layout& layout, int phase, int loads) {
  RowsShape rows{};
  rows.elements = layout.elements();
  rows.channels = layout.channels;
  rows.inner = layout.channels == 1 ? rows.elements : layout.inner;
  rows.segment = std::min(rows.inner, kLongestSegment);
  rows.pieces = (rows.inner + rows.segment - 1) / rows.segment;
  rows.apart = rows.channels * rows.inner;
  rows.between = rows.apart - rows.inner;
  rows.limit = std::max<int64_t>(rows.elements - n + 1, 0);
  rows.phase = n == 1 ? 0 : phase;
  const int64_t apart = std::gcd<int64_t>(rows.inner, n),
                most_lead = rows.phase % apart + n - apart;
  rows.whole = rows.inner % n == 0 && rows.phase == 0 && rows.pieces == 1;
  rows.row = (rows.segment + most_lead + n - 1) / n;
  rows.by_row = FastDivide(static_cast<uint32_t>(rows.row));
  rows.windows = rows.elements / (rows.channels * rows.inner) * rows.pieces * rows.row;
  rows.threads = kWarp;
  while (rows.threads < kThreads && int64_t{rows.threads} * loads < rows.windows) rows.threads *= 2;
  const int64_t batch = int64_t{rows.threads} * loads, batches = (rows.windows + batch - 1) / batch;
  const int64_t most = std::max<int64_t>(1, kRowBlocks / rows.channels);
  const int64_t wanted = std::min(most, (batches + kLeastBatches - 1) / kLeastBatches);
  const int64_t each = std::min((batches + wanted - 1) / wanted, kMostOfBlock / batch);
  rows.size = each * batch;
  rows.splits = (rows.windows + rows.size - 1) / rows.size;
  rows.head = rows.phase == 0 ? 0 : std::min<int64_t>(n - rows.phase, rows.elements);
  rows.tail = std::max(rows.head, rows.elements - (rows.elements + rows.phase) % n);
  return rows;
}

struct Columns {
  static constexpr bool kColumns = true;
  template <int n>
  static constexpr bool kWhole = true;

  int64_t channels;
  int64_t outer;
  int width;  // packs of a block's channels
  int lanes;  // rows that it reads side by side
  int64_t tiles;
  int64_t size;  // rows of a block
  int64_t splits;
  unsigned threads;

  template <int n>
  struct Cursor {
    const Columns& columns;
    int64_t tile_channel;
    int64_t split;
    int64_t first;
    int column;
    uint32_t at;
    uint32_t end;

    __device__ __forceinline__ explicit Cursor(const Columns& walk) : columns(walk) {
      const unsigned tiles = static_cast<unsigned>(columns.tiles);
      split = blockIdx.x / tiles;
      tile_channel = int64_t{blockIdx.x % tiles} * columns.width * n;
      column = static_cast<int>(threadIdx.x) % columns.width;
      const int64_t channel = tile_channel + column * n, row = split * columns.size;
      at = threadIdx.x / columns.width;
      end = 0;
      if (static_cast<int>(at) < columns.lanes && channel < columns.channels)
        end = static_cast<uint32_t>(min(columns.size, columns.outer - row));
      first = as_found(row * columns.channels + channel);
    }

    __device__ __forceinline__ uint32_t step() const { return columns.lanes; }

    __device__ __forceinline__ Place place(uint32_t number) const {
      return {first + int64_t{number} * columns.channels, kWholePack<n>};
    }

    __device__ __forceinline__ int64_t first_channel() const { return tile_channel; }
    __device__ __forceinline__ int block_channels() const {
      return static_cast<int>(min(int64_t{columns.width} * n, columns.channels - tile_channel));
    }
    __device__ __forceinline__ int own_channel(int j) const { return column * n + j; }
  };
};

// resident: blocks that a multiprocessor holds at once, at least.
template <int n>
Columns columns_of(const Layout& layout, int loads, int resident) {
  Columns columns{};
  columns.channels = layout.channels;
  columns.outer = layout.outer;
  const int64_t packs = layout.channels / n, most_packs = kTileChannels / n;
  columns.tiles = (packs + most_packs - 1) / most_packs;
  columns.width = static_cast<int>((packs + columns.tiles - 1) / columns.tiles);
  columns.tiles = (packs + columns.width - 1) / columns.width;
  columns.threads = kThreads;
  columns.lanes = kThreads / columns.width;
  const int64_t batch = int64_t{columns.lanes} * loads,
                batches = (layout.outer + batch - 1) / batch;
  const int64_t most = std::max<int64_t>(1, resident * kColumnBlocks / columns.tiles);
  const int64_t wanted = std::min(most, (batches + kLeastBatches - 1) / kLeastBatches);
  const int64_t each = std::min((batches + wanted - 1) / wanted, kMostOfBlock / batch);
  columns.size = each * batch;
  columns.splits = (layout.outer + columns.size - 1) / columns.size;
  return columns;
}

// Elements of T between a multiple of 16 bytes and all of these (null ones aside); -1 where they
// differ.
template <typename T, typename... Pointers>
int common_phase(Pointers... pointers) {
  int found = -2;
  const auto meet = [&](const void* pointer) {
    if (!pointer) return;
    const int phase =
        static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kPackBytes / sizeof(T));
    found = found == -2 || found == phase ? phase : -1;
  };
  (meet(pointers), ...);
  return found;
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_CHANNEL_WALK_H_
