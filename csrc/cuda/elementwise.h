// One pass over a dense tensor [outer, channels, inner] with values per channel: every element is
// read once and written once, 16 bytes at a time.
//
// An Op says what happens to an element; this file says which thread does it:
//
//   struct Channel;                                        what it needs of a channel
//   template <int n> struct In;                            n elements as they were loaded
//   template <int n> struct Out;                           n elements to be stored
//   Channel channel(int64_t c) const;
//   template <int n> In<n> load(int64_t i) const;          elements i .. i + n - 1
//   void apply(const In<n>&, int j, const Channel&, Out<n>&) const;   element j of them
//   void store(int64_t i, const Out<n>&) const;
//   void prepare();                                        if there: what is the same for all, once
//   a thread const void* / bool aligned() const                     host: whether 16-byte accesses
//   are allowed
//
// The grid is persistent; a thread has kInFlight packs on their way before it uses the first.
#ifndef ADADFQ_CUDA_ELEMENTWISE_H_
#define ADADFQ_CUDA_ELEMENTWISE_H_

#include <cstdint>
#include <numeric>

#include "../common/fast_divide.h"
#include "../common/layout.h"
#include "launch.h"
#include "pack.h"

namespace adadfq {
namespace cuda {

// kRows: a pack belongs to one channel. kColumns: inner is 1, and a thread meets the same channels
// in every pack. kAny: what is left, as planes of 7 x 7.
enum class Walk { kRows, kColumns, kAny };

struct Positions {
  int64_t elements;
  int64_t channels;
  int64_t inner;
  // Packs (or elements, in kAny) of a row, for numbers below 2^31.
  FastDivide by_inner;
  FastDivide by_channels;
  bool fits_32_bits;

  struct Place {
    int64_t channel;
    int64_t within;  // the channel's row
  };

  // Of pack `number`, where rows have `inner / width` packs.
  __device__ __forceinline__ Place place(int64_t number, int64_t row) const {
    if (channels == 1) return {0, 0};
    if (fits_32_bits) {
      const uint32_t n = static_cast<uint32_t>(number), segment = by_inner.quotient(n);
      return {segment - by_channels.quotient(segment) * by_channels.divisor(),
              n - segment * by_inner.divisor()};
    }
    return {number / row % channels, number % row};
  }
};

// Loads of an Op that a thread has in flight: 64 bytes, fewer where registers are short.
template <Walk walk, int n, class In>
constexpr int kInFlight = n == 1 ? 4
                          : walk == Walk::kAny || sizeof(In) > 2 * kPackBytes
                              ? (sizeof(In) > kPackBytes ? 1 : 2)
                              : 4 * kPackBytes / static_cast<int>(sizeof(In));
// Blocks that a multiprocessor is to hold.
template <Walk walk>
constexpr int kBlocksEach = walk == Walk::kRows ? 4 : 2;

template <class Op>
__device__ __forceinline__ auto prepare(Op& op, int) -> decltype(op.prepare()) {
  op.prepare();
}

template <class Op>
__device__ __forceinline__ void prepare(Op&, ...) {}

template <Walk kWalk, int n, class Op>
__device__ __forceinline__ void elementwise_pack(const Op& op, const Positions& positions,
                                                 int64_t pack,
                                                 const typename Op::template In<n>& in,
                                                 const typename Op::Channel* columns,
                                                 typename Op::Channel& row, int64_t& row_channel) {
  typename Op::template Out<n> out;
  if constexpr (kWalk == Walk::kColumns) {
#pragma unroll
    for (int j = 0; j < n; ++j) op.apply(in, j, columns[j], out);
  } else if constexpr (kWalk == Walk::kRows) {
    const int64_t channel = positions.place(pack, positions.inner / n).channel;
    if (channel != row_channel) {
      row = op.channel(channel);
      row_channel = channel;
    }
#pragma unroll
    for (int j = 0; j < n; ++j) op.apply(in, j, row, out);
  } else {
    Positions::Place place = positions.place(pack * n, positions.inner);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      op.apply(in, j, op.channel(place.channel), out);
      if (++place.within == positions.inner) {
        place.within = 0;
        if (++place.channel == positions.channels) place.channel = 0;
      }
    }
  }
  op.store(pack * n, out);
}

template <Walk kWalk, int n, class Op>
__global__ void __launch_bounds__(kThreads, kBlocksEach<kWalk>)
    elementwise_kernel(const Op given, const Positions positions) {
  Op op = given;
  prepare(op, 0);
  using In = typename Op::template In<n>;
  constexpr int kLoads = kInFlight<kWalk, n, In>;
  using Channel = typename Op::Channel;
  const int64_t packs = positions.elements / n;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;

  Channel columns[kWalk == Walk::kColumns ? n : 1], row{};
  int64_t row_channel = -1;
  if constexpr (kWalk == Walk::kColumns) {
    const int64_t column = first % (positions.channels / n) * n;
#pragma unroll
    for (int j = 0; j < n; ++j) columns[j] = op.channel(column + j);
  }
  for (int64_t pack = first; pack < packs; pack += kLoads * step) {
    In in[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (pack + u * step < packs) in[u] = op.template load<n>((pack + u * step) * n);
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (pack + u * step < packs)
        elementwise_pack<kWalk, n>(op, positions, pack + u * step, in[u], columns, row,
                                   row_channel);
  }
  // Fewer than n elements are left. In rows and columns of whole packs none are.
  if constexpr (kWalk == Walk::kAny && n > 1) {
    const int64_t i = packs * n + first;
    if (i < positions.elements) {
      typename Op::template Out<1> out;
      const int64_t channel =
          positions.channels == 1 ? 0 : i / positions.inner % positions.channels;
      op.apply(op.template load<1>(i), 0, op.channel(channel), out);
      op.store(i, out);
    }
  }
}

template <Walk kWalk, int n, class Op>
cudaError_t launch_elementwise(const Op& op, const Layout& layout, cudaStream_t stream) {
  const int64_t elements = layout.elements(), packs = (elements + n - 1) / n;
  int64_t blocks = persistent_blocks((packs + kThreads - 1) / kThreads, kBlocksEach<kWalk>);
  if (kWalk == Walk::kColumns) {
    // A step over the grid must be one over whole rows.
    const int64_t columns = layout.channels / n,
                  turn = columns / std::gcd<int64_t>(columns, kThreads);
    blocks = (blocks + turn - 1) / turn * turn;
  }
  Positions positions{elements, layout.channels, layout.inner, FastDivide(), FastDivide(), false};
  if (layout.channels > 1 && elements <= kLast32Bits) {
    const int64_t row = kWalk == Walk::kRows ? layout.inner / n : layout.inner;
    positions.by_inner = FastDivide(static_cast<uint32_t>(row));
    positions.by_channels = FastDivide(static_cast<uint32_t>(layout.channels));
    positions.fits_32_bits = true;
  }
  return launch(elementwise_kernel<kWalk, n, Op>, dim3(static_cast<unsigned>(blocks)),
                dim3(kThreads), stream, op, positions);
}

// Queues `op` over all elements; n is how many make 16 bytes.
template <int n, class Op>
cudaError_t elementwise(const Op& op, const Layout& layout, bool is_aligned, cudaStream_t stream) {
  if (layout.elements() == 0) return cudaSuccess;
  if (!is_aligned) return launch_elementwise<Walk::kAny, 1>(op, layout, stream);
  if (layout.inner % n == 0) return launch_elementwise<Walk::kRows, n>(op, layout, stream);
  // More channels than that would leave blocks without work.
  constexpr int64_t kMostColumns = 1 << 14;
  if (layout.inner == 1 && layout.channels % n == 0 && layout.channels <= kMostColumns)
    return launch_elementwise<Walk::kColumns, n>(op, layout, stream);
  return launch_elementwise<Walk::kAny, n>(op, layout, stream);
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_ELEMENTWISE_H_
