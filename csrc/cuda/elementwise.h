// One pass over a dense tensor [outer, channels, inner] with values per channel: every element is
// read once and written once, 16 bytes at a time.
//
// An Op says what happens to an element; this file says which thread does it:
//
//   struct Parameters;                                     what memory has of a channel
//   struct Channel;                                        what is made of it
//   template <int n> struct In;                            n elements as they were loaded
//   template <int n> struct Out;                           n elements to be stored
//   void prepare();                                        optional: what all elements share
//   Parameters parameters(int64_t c) const;
//   Channel channel(const Parameters&) const;
//   template <int n> In<n> load(int64_t i) const;          elements i .. i + n - 1
//   void apply(const In<n>&, int j, const Channel&, Out<n>&) const;   element j of them
//   void store(int64_t i, const Out<n>&) const;
//
// Packs begin at multiples of 16 bytes; elements before the first and behind the last are done one
// by one. Where the tensors are not aligned alike, all are.
//
// The grid is persistent; a thread has kInFlight packs on their way before it uses the first.
#ifndef ADADFQ_CUDA_ELEMENTWISE_H_
#define ADADFQ_CUDA_ELEMENTWISE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "../common/fast_divide.h"
#include "../common/layout.h"
#include "../common/wide_divide.h"
#include "launch.h"
#include "pack.h"

namespace adadfq {
namespace cuda {

// kRows: a pack belongs to one channel. kColumns: it may belong to many, but a thread meets the
// same in every pack. kPlanes: it belongs to one or two, as in planes of 7 x 7.
enum class Walk { kRows, kColumns, kPlanes };

// Where elements, or whatever rows consist of, belong.
struct Positions {
  int64_t elements;
  int64_t channels;
  int64_t inner;
  // Packs (in kRows) or elements of a row, for numbers below 2^31.
  FastDivide by_inner;
  FastDivide by_channels;
  bool fits_32_bits;

  struct Place {
    int64_t channel;
    int64_t within;  // the channel's row
  };

  // Of pack or element `number`, where rows have `row` of them.
  __device__ __forceinline__ Place place(int64_t number, int64_t row) const {
    if (channels == 1) return {0, 0};
    if (fits_32_bits) return place_32(number);
    return {number / row % channels, number % row};
  }

  __device__ __forceinline__ Place place_32(int64_t number) const {
    const uint32_t n = static_cast<uint32_t>(number), segment = by_inner.quotient(n);
    return {segment - by_channels.quotient(segment) * by_channels.divisor(),
            n - segment * by_inner.divisor()};
  }
};

struct PackPositions : Positions {
  int64_t head;  // elements before the first pack
  int64_t packs;
  // For larger numbers.
  WideDivide by_wide_inner;
  WideDivide by_wide_channels;

  // Where there is more than one channel.
  __device__ __forceinline__ Place place(int64_t number) const {
    if (fits_32_bits) return place_32(number);
    const int64_t segment = by_wide_inner.quotient(number);
    return {segment - by_wide_channels.quotient(segment) * channels,
            number - segment * by_wide_inner.divisor()};
  }
};

// Loads of an Op that a thread has in flight: 64 bytes, fewer where registers are short.
template <Walk walk, int n, class In>
constexpr int kInFlight = n == 1 ? 4
                          : walk == Walk::kPlanes || sizeof(In) > 2 * kPackBytes
                              ? (sizeof(In) > kPackBytes ? 1 : 2)
                              : 4 * kPackBytes / static_cast<int>(sizeof(In));
// Blocks that a multiprocessor is to hold.
template <Walk walk>
constexpr int kBlocksEach = walk == Walk::kColumns ? 2 : 4;

template <class Op>
__device__ __forceinline__ auto prepare(Op& op, int) -> decltype(op.prepare()) {
  op.prepare();
}

template <class Op>
__device__ __forceinline__ void prepare(Op&, ...) {}

// One of two, word by word: what is chosen by address would have to be in memory.
template <class Channel>
__device__ __forceinline__ Channel choose(bool is_second, const Channel& first,
                                          const Channel& second) {
  static_assert(sizeof(Channel) % sizeof(uint32_t) == 0, "a channel consists of 32-bit words");
  constexpr int kWords = sizeof(Channel) / sizeof(uint32_t);
  uint32_t a[kWords], b[kWords];
  memcpy(a, &first, sizeof first);
  memcpy(b, &second, sizeof second);
#pragma unroll
  for (int k = 0; k < kWords; ++k) a[k] = is_second ? b[k] : a[k];
  Channel chosen;
  memcpy(&chosen, a, sizeof chosen);
  return chosen;
}

// The first `loads` packs from `pack` on, `step` apart, as far as there are any.
template <int n, int loads, class Op>
__device__ __forceinline__ void load_batch(const Op& op, const PackPositions& positions,
                                           int64_t pack, int64_t step,
                                           typename Op::template In<n> (&in)[loads]) {
#pragma unroll
  for (int u = 0; u < loads; ++u)
    if (pack + u * step < positions.packs)
      in[u] = op.template load<n>(positions.head + (pack + u * step) * n);
}

// Everything of `batch` packs but their loads.
template <Walk kWalk, int n, int loads, class Op>
__device__ __forceinline__ void finish_batch(const Op& op, const PackPositions& positions,
                                             int64_t pack, int64_t step,
                                             const typename Op::template In<n> (&in)[loads],
                                             const typename Op::Channel* columns) {
  using Channel = typename Op::Channel;
  using Parameters = typename Op::Parameters;
  constexpr bool kPlanes = kWalk == Walk::kPlanes;

  // All of a batch's parameters are on their way before the first is used.
  Parameters first[loads]{}, second[kPlanes ? loads : 1]{};
  int split[kPlanes ? loads : 1]{};
  // One loop then serves one channel and many.
  constexpr bool kReady = kWalk == Walk::kRows && std::is_same_v<Channel, Parameters>;
  if constexpr (kReady)
    for (Parameters& parameters : first) parameters = columns[0];
  if (kWalk != Walk::kColumns && positions.channels > 1) {
#pragma unroll
    for (int u = 0; u < loads; ++u) {
      if (pack + u * step >= positions.packs) continue;
      if constexpr (kPlanes) {
        const Positions::Place place = positions.place(positions.head + (pack + u * step) * n);
        const int64_t next = place.channel + 1 == positions.channels ? 0 : place.channel + 1;
        first[u] = second[u] = op.parameters(place.channel);
        split[u] = static_cast<int>(min(positions.inner - place.within, int64_t{n}));
        if (split[u] < n) second[u] = op.parameters(next);
      } else {
        first[u] = op.parameters(positions.place(pack + u * step).channel);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < loads; ++u) {
    if (pack + u * step >= positions.packs) continue;
    typename Op::template Out<n> out;
    if constexpr (kWalk == Walk::kColumns) {
#pragma unroll
      for (int j = 0; j < n; ++j) op.apply(in[u], j, columns[j], out);
    } else if constexpr (kPlanes) {
      const Channel before = op.channel(first[u]), behind = op.channel(second[u]);
#pragma unroll
      for (int j = 0; j < n; ++j) op.apply(in[u], j, choose(j >= split[u], before, behind), out);
    } else {
      Channel row = columns[0];
      if (kReady || positions.channels > 1) row = op.channel(first[u]);
#pragma unroll
      for (int j = 0; j < n; ++j) op.apply(in[u], j, row, out);
    }
    op.store(positions.head + (pack + u * step) * n, out);
  }
}

template <Walk kWalk, int n, class Op>
__global__ void __launch_bounds__(kThreads, kBlocksEach<kWalk>)
    elementwise_kernel(const Op given, const PackPositions positions) {
  Op op = given;
  using In = typename Op::template In<n>;
  constexpr int kLoads = kInFlight<kWalk, n, In>;
  using Channel = typename Op::Channel;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;

  In in[kLoads];
  load_batch<n>(op, positions, first, step, in);
  prepare(op, 0);

  // Of kRows what one channel has.
  constexpr int kKept = kWalk == Walk::kColumns ? n : 1;
  Channel columns[kKept]{};
  if (kWalk == Walk::kColumns || (kWalk == Walk::kRows && positions.channels == 1)) {
    typename Op::Parameters parameters[kKept];
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      int64_t channel = 0;
      if (kWalk == Walk::kColumns)
        channel = positions.place(positions.head + first * n + j).channel;
      parameters[j] = op.parameters(channel);
    }
#pragma unroll
    for (int j = 0; j < kKept; ++j) columns[j] = op.channel(parameters[j]);
  }

  for (int64_t pack = first; pack < positions.packs;) {
    finish_batch<kWalk, n>(op, positions, pack, step, in, columns);
    pack += kLoads * step;
    load_batch<n>(op, positions, pack, step, in);
  }

  // Head and tail: the grid's last threads have the least to do.
  if constexpr (n > 1) {
    const int64_t left = step - 1 - first;
    if (left < positions.elements - positions.packs * n) {
      const int64_t i = left < positions.head ? left : left + positions.packs * n;
      typename Op::template Out<1> out;
      // Rows have a head or a tail only where there is one channel.
      int64_t channel = 0;
      if (kWalk != Walk::kRows) channel = positions.place(i).channel;
      op.apply(op.template load<1>(i), 0, op.channel(op.parameters(channel)), out);
      op.store(i, out);
    }
  }
}

template <Walk kWalk, int n, class Op>
cudaError_t launch_elementwise(const Op& op, const Layout& layout, int64_t head, int64_t turn,
                               cudaStream_t stream) {
  const int64_t elements = layout.elements(), packs = (elements - head) / n;
  const int64_t needed = (packs + kThreads - 1) / kThreads;
  int64_t blocks = persistent_blocks(needed, kBlocksEach<kWalk>);
  if (blocks < needed) blocks = std::max(turn, blocks / turn * turn);
  PackPositions positions{};
  positions.elements = elements;
  positions.head = head;
  positions.packs = packs;
  positions.channels = layout.channels;
  positions.inner = layout.inner;
  const int64_t row = kWalk == Walk::kRows ? layout.inner / n : layout.inner;
  if (layout.channels > 1 && elements <= kLast32Bits) {
    positions.by_inner = FastDivide(static_cast<uint32_t>(row));
    positions.by_channels = FastDivide(static_cast<uint32_t>(layout.channels));
    positions.fits_32_bits = true;
  } else if (layout.channels > 1) {
    positions.by_wide_inner = WideDivide(row);
    positions.by_wide_channels = WideDivide(layout.channels);
  }
  return launch(elementwise_kernel<kWalk, n, Op>, dim3(static_cast<unsigned>(blocks)),
                dim3(kThreads), stream, op, positions);
}

// Queues `op` over all elements; n is how many make 16 bytes, phase is
// pack_phase<n>() of its tensors.
template <int n, class Op>
cudaError_t elementwise(const Op& op, const Layout& layout, int phase, cudaStream_t stream) {
  const int64_t elements = layout.elements(), channels = layout.channels, inner = layout.inner;
  if (elements == 0) return cudaSuccess;
  if (phase < 0) return launch_elementwise<Walk::kRows, 1>(op, layout, 0, 1, stream);
  const int64_t head = std::min<int64_t>((n - phase) % n, elements);
  if (channels == 1 || (head == 0 && inner % n == 0))
    return launch_elementwise<Walk::kRows, n>(op, layout, head, 1, stream);
  if (inner >= n) return launch_elementwise<Walk::kPlanes, n>(op, layout, head, 1, stream);
  // Blocks of a grid whose step is one over whole periods of the channels.
  constexpr int64_t kLongestTurn = 256;
  const int64_t row = channels * inner, period = row / std::gcd<int64_t>(row, n),
                turn = period / std::gcd<int64_t>(period, kThreads);
  if (turn <= kLongestTurn)
    return launch_elementwise<Walk::kColumns, n>(op, layout, head, turn, stream);
  return launch_elementwise<Walk::kRows, 1>(op, layout, 0, 1, stream);
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_ELEMENTWISE_H_
