// The range of every channel of a dense tensor [outer, channels, inner], as its quantiser, in one
// launch: blocks find the ends of their parts of channels (channel_walk.h), and the block that ends
// last joins them.
#ifndef ADADFQ_CUDA_CHANNEL_RANGES_H_
#define ADADFQ_CUDA_CHANNEL_RANGES_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/layout.h"
#include "channel_walk.h"
#include "last_block.h"
#include "launch.h"
#include "loaded.h"
#include "partials.h"
#include "reduce_ends.h"

namespace adadfq {
namespace cuda {

// Where the ranges go.
struct ChannelRanges {
  Ends* parts;  // [splits, channels]
  float* scale;
  int32_t* zero_point;
  int bits;
  unsigned* counter;
};

// Packs that a thread has on their way, and blocks that a multiprocessor holds.
constexpr int kRangeLoads = 4, kRangesResident = 4;

static_assert(std::max(kRowBlocks, kRangesResident * kColumnBlocks * kTileChannels) <=
                  kMostPartials,
              "the walk cuts channels into more parts than scratch holds");

// Widens `ends` by those of the elements begin .. end - 1 of x that belong to `channel`.
template <typename T>
__device__ __forceinline__ void widen_by(Ends& ends, const T* x, int64_t begin, int64_t end,
                                         const RowsShape& rows, int64_t channel) {
  for (int64_t i = begin; i < end; ++i)
    if (i / rows.inner % rows.channels == channel) ends.widen(to_float(x[i]));
}

// For the block that ends last. Several neighbouring threads join the parts of a channel.
template <typename T, int n, class Walk>
__device__ __forceinline__ void finish_ranges(const T* x, const Walk& walk,
                                              const ChannelRanges& ranges) {
  const int all = static_cast<int>(blockDim.x);
  int threads = 1;
  while (threads < kWarp && threads < walk.splits) threads *= 2;
  if (walk.splits > 4 * kWarp) threads = all;  // there are few channels
  const int thread = static_cast<int>(threadIdx.x) & (threads - 1), together = all / threads;
  for (int64_t begin = 0; begin < walk.channels; begin += together) {
    const int64_t channel = begin + threadIdx.x / threads;
    const bool exists = channel < walk.channels;
    Ends ends = zero_ends();
    for (int64_t split = thread; exists && split < walk.splits; split += threads) {
      const Ends* part = ranges.parts + split * walk.channels + channel;
      ends.join({load_shared_result(&part->lo), load_shared_result(&part->hi)});
    }
    if constexpr (!Walk::template kWhole<n>) {
      if (exists && thread == 0) {
        widen_by(ends, x, 0, walk.head, walk, channel);
        widen_by(ends, x, walk.tail, walk.elements, walk, channel);
      }
    }
    if (threads > kWarp) {
      __syncthreads();  // others may still read what the last block_ends() left
      ends = block_ends(ends);
    } else {
      ends = warp_ends(ends, threads);
    }
    if (exists && thread == 0) {
      const QParams params = qparams_from_range(ends.lo, ends.hi, ranges.bits);
      ranges.scale[channel] = params.scale;
      ranges.zero_point[channel] = params.zero_point;
    }
  }
}

// Ends of the channels of a block of columns: thread i has those of n of them, and there are as
// many threads to each as it reads rows side by side. Returned by the first of these.
template <int n>
__device__ __forceinline__ void column_ends(Ends (&ends)[n], const Columns& columns) {
  __shared__ Ends shared[n][kThreads];
  const int thread = static_cast<int>(threadIdx.x), lane = thread / columns.width;
#pragma unroll
  for (int j = 0; j < n; ++j) shared[j][thread] = ends[j];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (half >= columns.lanes || lane >= half || lane + half >= columns.lanes) continue;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      ends[j].join(shared[j][thread + half * columns.width]);
      shared[j][thread] = ends[j];
    }
  }
}

template <typename T, int n, class Walk>
__global__ void __launch_bounds__(kThreads, kRangesResident)
    channel_ranges_kernel(const T* x, const Walk walk, const ChannelRanges ranges) {
  const typename Walk::template Cursor<n> cursor(walk);
  constexpr int kOwn = Walk::kColumns ? n : 1;
  constexpr bool kWhole = Walk::template kWhole<n>;
  Ends ends[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) ends[j] = zero_ends();
  for (uint32_t at = cursor.at; at < cursor.end; at += kRangeLoads * cursor.step()) {
    Loaded<T, n> in[kRangeLoads];
    uint32_t mask[kRangeLoads];
#pragma unroll
    for (int u = 0; u < kRangeLoads; ++u) {
      mask[u] = 0;
      if (at + u * cursor.step() >= cursor.end) continue;
      const Place place = cursor.place(at + u * cursor.step());
      mask[u] = place.mask;
      if (place.mask != 0) in[u] = Loaded<T, n>::from(x + place.i);
    }
#pragma unroll
    for (int u = 0; u < kRangeLoads; ++u)
#pragma unroll
      for (int j = 0; j < n; ++j)
        if (mask[u] >> (kWhole ? 0 : j) & 1u) ends[j % kOwn].widen(in[u].value(j));
  }
  Ends* parts = ranges.parts + cursor.split * walk.channels + cursor.first_channel();
  if constexpr (Walk::kColumns) {
    column_ends(ends, walk);
    if (static_cast<int>(threadIdx.x) < walk.width)
#pragma unroll
      for (int j = 0; j < n; ++j)
        if (cursor.own_channel(j) < cursor.block_channels()) parts[cursor.own_channel(j)] = ends[j];
  } else {
    ends[0] = block_ends(ends[0]);
    if (threadIdx.x == 0) *parts = ends[0];
  }
  if (is_last_block(ranges.counter)) finish_ranges<T, n>(x, walk, ranges);
}

template <typename T, int n, class Walk>
cudaError_t launch_channel_ranges(const T* x, const Walk& walk, int64_t blocks,
                                  const ChannelRanges& ranges, cudaStream_t stream) {
  return launch(channel_ranges_kernel<T, n, Walk>, dim3(static_cast<unsigned>(blocks)),
                dim3(walk.threads), stream, x, walk, ranges);
}

// Queues the search; writes scale and zero_point, layout.channels values each. scratch:
// partial_doubles(channels) float64 numbers.
template <typename T>
cudaError_t channel_ranges(const T* x, const Layout& layout, float* scale, int32_t* zero_point,
                           int bits, double* scratch, cudaStream_t stream) {
  constexpr int n = kPackOf<T>;
  ChannelRanges ranges{reinterpret_cast<Ends*>(scratch), scale, zero_point, bits, nullptr};
  if (const cudaError_t error = block_counter(stream, &ranges.counter); error != cudaSuccess)
    return error;
  if (layout.inner > 1 || layout.channels == 1) {
    const RowsShape rows = rows_of<n>(layout, common_phase<T>(x), kRangeLoads);
    const int64_t blocks = rows.channels * rows.splits;
    if (rows.whole) return launch_channel_ranges<T, n>(x, WholeRows(rows), blocks, ranges, stream);
    return launch_channel_ranges<T, n>(x, Rows(rows), blocks, ranges, stream);
  }
  if (aligned(x) && layout.channels % n == 0) {
    const Columns columns = columns_of<n>(layout, kRangeLoads, kRangesResident);
    return launch_channel_ranges<T, n>(x, columns, columns.tiles * columns.splits, ranges, stream);
  }
  const Columns columns = columns_of<1>(layout, kRangeLoads, kRangesResident);
  return launch_channel_ranges<T, 1>(x, columns, columns.tiles * columns.splits, ranges, stream);
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_CHANNEL_RANGES_H_
