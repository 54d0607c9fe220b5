// One pass over a dense tensor [outer, channels, inner] with parameters and two sums per channel,
// in one launch: threads sum in float over short runs and in double beyond, blocks add those in a
// fixed order and write partial sums, and the block that ends last adds these and finishes the
// channels. channel_walk.h says which thread reads what.
//
// An Op says what happens to elements:
//
//   static constexpr int kPacks;      how many tensors it reads
//   static constexpr bool kSums;      whether it has sums, and all that follows store_one()
//   struct Channel;                   what it needs of a channel, found once a block
//   template <int n> struct In, Out;  n elements as loaded, and to be stored
//   struct Item;                      what an element becomes, for Out and for the sums
//   struct Sums;                      two sums in float; Sums{} begins them
//
//   Channel channel(int64_t c) const;
//   In<n> load<n>(int64_t i) const;                         elements i .. i + n - 1
//   Item item(const In<n>&, int j, const Channel&) const;   element j of them
//   bool stores() const;                                    the same for all elements
//   void put(const Item&, const Channel&, int j, Out<n>&) const;
//   void store(int64_t i, const Out<n>&) const;
//   void store_one(int64_t i, int j, const Out<n>&) const;  its element j, to i
//
//   static constexpr bool kPivot;     whether sums are about a value near the mean of a run's
//   float value(const Item&) const;   these
//   void add(const Item&, float pivot, Sums&) const;
//   Item nothing(float pivot) const;                        adds nothing
//   void join(Sums& into, const Sums& other) const;
//
//   What a run of `count` elements adds to the totals; false where float was too small for it, and
//   then, with kExact, the elements are read again for what each of them adds:
//   bool run_totals(const Sums&, float pivot, int count, const Channel&, Totals&) const;
//   static constexpr bool kExact;
//   Totals exact_totals(const Item&, const Channel&) const;
//
//   What finish() reads of a channel, loaded ahead; finish() writes the channel's results, and with
//   kOverall end() gets the sum of what it returned:
//   struct Known;
//   Known known(int64_t c) const;
//   double finish(int64_t c, const Totals&, const Known&) const;
//   static constexpr bool kOverall;
//   void end(double sum) const;
//
//   With kTensorSum there is a third sum, over the whole tensor: what a run adds to it, where
//   blocks leave theirs (partial_doubles(channels) float64 numbers), and what becomes of the total:
//   static constexpr bool kTensorSum;
//   double tensor_sum(const Sums&) const;
//   double* block_sums() const;
//   void end_tensor(double sum) const;
#ifndef ADADFQ_CUDA_CHANNEL_SUMS_H_
#define ADADFQ_CUDA_CHANNEL_SUMS_H_

#include "../common/batch_norm.h"
#include "channel_walk.h"
#include "last_block.h"
#include "loaded.h"
#include "partials.h"

namespace adadfq {
namespace cuda {

struct alignas(16) Totals {
  double first;
  double second;

  __device__ __forceinline__ void add(const Totals& other) {
    first += other.first;
    second += other.second;
  }
};

// Blocks that a multiprocessor holds at least; more have no registers for what they load.
constexpr int kSumsResident = 2;

static_assert(std::max(kRowBlocks, kSumsResident * kColumnBlocks * kTileChannels) <= kMostPartials,
              "the walk cuts channels into more parts than scratch holds");

// Where blocks leave their sums: Totals [splits, channels]; one split has the channels' results,
// and where these are added, those are what is left: double [channels].
struct Partials {
  double* scratch;  // null: no sums
  unsigned* counter;
  int64_t channels;
  int64_t splits;
};

// Packs that are summed in float.
constexpr int kRunPacks = 64;

// Loads of an Op that a thread has in flight: as many as its registers hold.
template <int n, class Op>
constexpr int kChannelLoads = n == 1 || Op::kPacks == 1 ? 4 : 2;

// The block's sum, for thread 0; zeros for others. buffer: one a thread.
__device__ __forceinline__ Totals block_sum(Totals mine, Totals* buffer) {
  __syncthreads();
  buffer[threadIdx.x] = mine;
  for (unsigned d = blockDim.x / 2; d > 0; d /= 2) {
    __syncthreads();
    if (threadIdx.x < d) buffer[threadIdx.x].add(buffer[threadIdx.x + d]);
  }
  return threadIdx.x == 0 ? buffer[0] : Totals{0.0, 0.0};
}

__device__ __forceinline__ Totals load_totals(const Totals* from) {
  const double2 loaded = load_shared_result(reinterpret_cast<const double2*>(from));
  return {loaded.x, loaded.y};
}

// A block's sums of channel c; by one thread.
template <class Op>
__device__ __forceinline__ void deliver(const Op& op, const Partials& partials, int64_t split,
                                        int64_t c, const Totals& totals) {
  if (partials.splits > 1) {
    reinterpret_cast<Totals*>(partials.scratch)[split * partials.channels + c] = totals;
  } else {
    const double result = op.finish(c, totals, op.known(c));
    if (Op::kOverall) partials.scratch[c] = result;
  }
}

// For the block that ends last: this thread's share of op.finish() over the channels. buffer: one a
// thread.
template <class Op>
__device__ __forceinline__ double finish_channels(const Op& op, const Partials& partials,
                                                  Totals* buffer) {
  constexpr int kSlots = 4;  // loads that do not wait for each other
  const unsigned threads = blockDim.x, thread = threadIdx.x;
  const int64_t channels = partials.channels, splits = partials.splits;
  // A slot is a channel where there are many, else a part of a channel's splits, which `group`
  // threads share.
  const bool many = channels > 2 * threads;
  unsigned group = 1;
  if (!many)
    while (2 * group * channels <= threads) group *= 2;
  const int64_t parts = many ? 1 : kSlots * group;
  const int64_t together = many ? kSlots * threads : threads / group;
  const auto* from = reinterpret_cast<const Totals*>(partials.scratch);
  double sum = 0;
  for (int64_t begin = 0; begin < channels; begin += together) {
    int64_t c[kSlots], part[kSlots];
    typename Op::Known known[kSlots];
    Totals totals[kSlots];
#pragma unroll
    for (int u = 0; u < kSlots; ++u) {
      c[u] = begin + (many ? u * threads + thread : thread / group);
      part[u] = many ? 0 : u * group + thread % group;
      totals[u] = {0.0, 0.0};
      if (c[u] < channels && (many || u == 0)) known[u] = op.known(c[u]);
    }
#pragma unroll 2
    for (int64_t split = 0; split < splits; split += parts) {
#pragma unroll
      for (int u = 0; u < kSlots; ++u)
        if (c[u] < channels && split + part[u] < splits)
          totals[u].add(load_totals(from + (split + part[u]) * channels + c[u]));
    }
    if (!many) {
      totals[0].add(totals[1]);
      totals[2].add(totals[3]);
      totals[0].add(totals[2]);
      __syncthreads();
      buffer[thread] = totals[0];
      for (unsigned d = group / 2; d > 0; d /= 2) {
        __syncthreads();
        if (thread % group < d) buffer[thread].add(buffer[thread + d]);
      }
      totals[0] = buffer[thread];
    }
#pragma unroll
    for (int u = 0; u < kSlots; ++u)
      if (c[u] < channels && (many || (u == 0 && thread % group == 0)))
        sum += op.finish(c[u], totals[u], known[u]);
  }
  return sum;
}

// The sum over the whole tensor, from those of the blocks; for thread 0.
__device__ __forceinline__ double add_blocks(const double* block_sums, Totals* buffer) {
  double sum = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x)
    sum += load_shared_result(block_sums + block);
  return block_sum({sum, 0.0}, buffer).first;
}

// Same for one split, whose blocks have finished the channels.
__device__ __forceinline__ double add_results(const Partials& partials) {
  constexpr int kSlots = 8;
  double sum = 0;
  for (int64_t begin = threadIdx.x; begin < partials.channels; begin += kSlots * blockDim.x) {
    double values[kSlots];
#pragma unroll
    for (int u = 0; u < kSlots; ++u) {
      const int64_t c = begin + u * blockDim.x;
      values[u] = c < partials.channels ? load_shared_result(partials.scratch + c) : 0.0;
    }
#pragma unroll
    for (int u = 0; u < kSlots; ++u) sum += values[u];
  }
  return sum;
}

template <int n, class Op, class Walk>
struct ChannelPass {
  static constexpr bool kColumns = Walk::kColumns;
  // Whether a pack is stored and summed whole or not at all.
  static constexpr bool kWhole = Walk::template kWhole<n>;
  static constexpr int kLoads = kChannelLoads<n, Op>;
  static constexpr int kChannels = kColumns ? n : 1;  // of a thread

  using Channel = typename Op::Channel;
  using Item = typename Op::Item;
  using In = typename Op::template In<n>;
  using Out = typename Op::template Out<n>;
  using Cursor = typename Walk::template Cursor<n>;

  struct Batch {
    Place places[kLoads];
    In in[kLoads];
  };

  static __device__ __forceinline__ int of(int j) { return kColumns ? j : 0; }

  static __device__ __forceinline__ bool valid(const Place& place, int j) {
    return kWhole || (place.mask >> j & 1u) != 0;
  }

  static __device__ __forceinline__ void load(const Op& op, const Cursor& cursor, uint32_t number,
                                              Batch& batch) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const uint32_t mine = number + u * cursor.step();
      batch.places[u] = mine < cursor.end ? cursor.place(mine) : Place{0, 0};
      if (batch.places[u].mask != 0) batch.in[u] = op.template load<n>(batch.places[u].i);
    }
  }

  static __device__ __forceinline__ void store(const Op& op, const Place& place,
                                               const Item (&items)[n], const Channel* channels) {
    Out out;
#pragma unroll
    for (int j = 0; j < n; ++j) op.put(items[j], channels[of(j)], j, out);
    if (kWhole || place.mask == kWholePack<n>) {
      op.store(place.i, out);
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j)
        if (valid(place, j)) op.store_one(place.i + j, j, out);
    }
  }
};

// Totals of a thread's channels: of one in registers, of columns in buffer[k * kThreads +
// threadIdx.x] of shared memory, as registers could not hold those.
template <bool kShared>
struct ThreadTotals {
  Totals own;
  Totals* buffer;
  double tensor;

  __device__ __forceinline__ void start(int channels) {
    own = {0.0, 0.0};
    if (kShared)
      for (int k = 0; k < channels; ++k) buffer[k * kThreads + threadIdx.x] = own;
  }

  __device__ __forceinline__ void add(int k, const Totals& found) {
    if (!kShared) return own.add(found);
    // One channel after the other: the compiler would have all of them in registers at once.
    volatile Totals& mine = buffer[k * kThreads + threadIdx.x];
    mine.first = mine.first + found.first;
    mine.second = mine.second + found.second;
  }
};

// What a thread has summed since it last added to its totals.
template <int n, class Op, class Walk>
struct ChannelRun {
  using Pass = ChannelPass<n, Op, Walk>;
  static constexpr int kLoads = Pass::kLoads, kChannels = Pass::kChannels;

  typename Op::Sums sums[n];
  float pivot[kChannels];
  int count;    // elements of a channel
  int batches;  // of loads
  uint32_t begin;

  __device__ __forceinline__ void start(uint32_t number) {
#pragma unroll
    for (int j = 0; j < n; ++j) sums[j] = {};
    count = 0;
    batches = 0;
    begin = number;
  }

  // The mean of the run's first elements: of a window's, or of those in some rows.
  __device__ __forceinline__ void find_pivot(const Op& op, const typename Pass::Batch& batch,
                                             const typename Op::Channel* channels) {
    constexpr int kPacks = n == 1 ? kLoads : !Walk::kColumns ? 1 : kLoads < 2 ? kLoads : 2;
    float found = 0.0f;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) pivot[k] = 0.0f;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      typename Pass::In in = batch.in[u];
      Place place = batch.places[u];
      if (!Pass::kWhole) {
#pragma unroll
        for (int next = 1; next < kLoads; ++next)
          if (place.mask == 0) {
            in = batch.in[next];
            place = batch.places[next];
          }
      }
      if (place.mask == 0) continue;
      found += static_cast<float>(elements(place));
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float value = op.value(op.item(in, j, channels[Pass::of(j)]));
        pivot[Pass::of(j)] += Pass::valid(place, j) ? value : 0.0f;
      }
    }
    const float each = 1.0f / (found == 0.0f ? 1.0f : found);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) pivot[k] = finite_or_zero(pivot[k] * each);
  }

  // Of a channel.
  static __device__ __forceinline__ int elements(const Place& place) {
    return Walk::kColumns ? 1 : Pass::kWhole ? n : __popc(place.mask);
  }

  // Adds the run to the totals of its channels. Its numbers: from `begin` up to `end`.
  __device__ __forceinline__ void flush(const Op& op, const typename Pass::Cursor& cursor,
                                        uint32_t end, const typename Op::Channel* channels,
                                        ThreadTotals<Walk::kColumns>& totals) {
    if (!Walk::kColumns) {
#pragma unroll
      for (int d = n / 2; d > 0; d /= 2)
#pragma unroll
        for (int j = 0; j < d; ++j) op.join(sums[j], sums[j + d]);
    }
    unsigned failed = 0;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      Totals found;
      if (op.run_totals(sums[k], pivot[k], count, channels[k], found))
        totals.add(k, found);
      else
        failed |= 1u << k;
      if constexpr (Op::kTensorSum) totals.tensor += op.tensor_sum(sums[k]);
    }
    if constexpr (Op::kExact) {
      for (uint32_t number = begin; failed != 0 && number < end; number += cursor.step()) {
        const Place place = cursor.place(number);
        if (place.mask == 0) continue;
        const auto in = op.template load<n>(place.i);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const int k = Pass::of(j);
          if (Pass::valid(place, j) && (failed >> k & 1u) != 0)
            totals.add(k, op.exact_totals(op.item(in, j, channels[k]), channels[k]));
        }
      }
    }
  }
};

// Element i alone.
template <class Op>
__device__ __forceinline__ void take_element(const Op& op, int64_t i,
                                             const typename Op::Channel& channel, bool with_sums,
                                             ThreadTotals<false>& totals) {
  const auto in = op.template load<1>(i);
  const typename Op::Item item = op.item(in, 0, channel);
  if (op.stores()) {
    typename Op::template Out<1> out;
    op.put(item, channel, 0, out);
    op.store(i, out);
  }
  if constexpr (Op::kSums) {
    if (with_sums) {
      typename Op::Sums sums{};
      const float pivot = Op::kPivot ? finite_or_zero(op.value(item)) : 0.0f;
      op.add(item, pivot, sums);
      Totals found{0.0, 0.0};
      if (!op.run_totals(sums, pivot, 1, channel, found)) {
        if constexpr (Op::kExact) found = op.exact_totals(item, channel);
      }
      totals.add(0, found);
      if constexpr (Op::kTensorSum) totals.tensor += op.tensor_sum(sums);
    }
  }
}

// The elements that no window in the tensor has: up to n - 1 at each end.
template <int n, class Op>
__device__ __forceinline__ void take_ends(const Op& op, const RowsShape& rows, int64_t channel,
                                          int64_t split, const typename Op::Channel& params,
                                          bool with_sums, ThreadTotals<false>& totals) {
  for (int side = 0; side < 2; ++side) {
    if (split != (side == 0 ? 0 : rows.splits - 1)) continue;
    const int64_t i = (side == 0 ? 0 : rows.tail) + threadIdx.x;
    if (i < (side == 0 ? rows.head : rows.elements) && i / rows.inner % rows.channels == channel)
      take_element(op, i, params, with_sums, totals);
  }
}

// Adds the threads' totals; helpers, neighbouring threads, share a channel.
template <int n, class Op>
__device__ __forceinline__ void combine_columns(const Op& op, const Columns& columns,
                                                const Columns::Cursor<n>& cursor,
                                                const Partials& partials, const Totals* buffer) {
  constexpr int kHelpers = kThreads / kTileChannels;
  const int helper = static_cast<int>(threadIdx.x) % kHelpers;
  const int j = static_cast<int>(threadIdx.x) / kHelpers % n;
  const int column = static_cast<int>(threadIdx.x) / kHelpers / n;
  __syncthreads();
  Totals sum{0.0, 0.0};
  if (column < columns.width)
    for (int lane = helper; lane < columns.lanes; lane += kHelpers)
      sum.add(buffer[j * kThreads + lane * columns.width + column]);
#pragma unroll
  for (int d = kHelpers / 2; d > 0; d /= 2)
    sum.add({__shfl_down_sync(kAllLanes, sum.first, d, kHelpers),
             __shfl_down_sync(kAllLanes, sum.second, d, kHelpers)});
  const int64_t c = cursor.tile_channel + column * n + j;
  if (helper == 0 && column < columns.width && c < columns.channels)
    deliver(op, partials, cursor.split, c, sum);
}

template <int n, class Op, class Walk>
__global__ void __launch_bounds__(kThreads, kSumsResident)
    channel_kernel(const Op op, const Walk walk, const Partials partials) {
  using Pass = ChannelPass<n, Op, Walk>;
  constexpr int kChannels = Pass::kChannels, kLoads = Pass::kLoads;
  constexpr bool kWhole = Pass::kWhole;
  __shared__ typename Op::Channel shared[Walk::kColumns ? kTileChannels : 1];
  const typename Walk::template Cursor<n> cursor(walk);
  const bool with_sums = Op::kSums && partials.scratch != nullptr;

  // The first loads are under way while the channels' parameters are found.
  typename Pass::Batch batch;
  uint32_t number = cursor.at;
  Pass::load(op, cursor, number, batch);
  if (static_cast<int>(threadIdx.x) < cursor.block_channels())
    shared[threadIdx.x] = op.channel(cursor.first_channel() + threadIdx.x);
  __syncthreads();
  const typename Op::Channel* channels = shared + cursor.own_channel(0);

  __shared__ Totals buffer[Op::kSums ? kThreads * kChannels : 1];
  ThreadTotals<Walk::kColumns> totals{{0.0, 0.0}, buffer, 0.0};
  if constexpr (Op::kSums) totals.start(kChannels);
  ChannelRun<n, Op, Walk> run;
  run.start(number);
  while (number < cursor.end) {
    if constexpr (Op::kSums) {
      if constexpr (Op::kPivot)
        if (run.count == 0) run.find_pivot(op, batch, channels);
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const Place& place = batch.places[u];
      if (place.mask == 0) continue;
      typename Op::Item items[n];
#pragma unroll
      for (int j = 0; j < n; ++j) items[j] = op.item(batch.in[u], j, channels[Pass::of(j)]);
      if (op.stores()) Pass::store(op, place, items, channels);
      if constexpr (Op::kSums) {
        // Whether they are wanted or not: a branch here costs more than the sums.
        run.count += run.elements(place);
        if (!kWhole && place.mask != kWholePack<n>) {
#pragma unroll
          for (int j = 0; j < n; ++j)
            if (!Pass::valid(place, j)) items[j] = op.nothing(run.pivot[Pass::of(j)]);
        }
#pragma unroll
        for (int j = 0; j < n; ++j) op.add(items[j], run.pivot[Pass::of(j)], run.sums[j]);
      }
    }
    number += kLoads * cursor.step();
    if constexpr (Op::kSums) {
      if (++run.batches == kRunPacks / kLoads || number >= cursor.end) {
        if (with_sums) run.flush(op, cursor, min(number, cursor.end), channels, totals);
        run.start(number);
      }
    }
    Pass::load(op, cursor, number, batch);
  }
  if constexpr (!kWhole) {
    if (walk.head != 0 || walk.tail != walk.elements)
      take_ends<n>(op, walk, cursor.channel, cursor.split, channels[0], with_sums, totals);
  }
  if constexpr (Op::kSums) {
    if (!with_sums) return;
    if constexpr (Walk::kColumns) {
      combine_columns<n>(op, walk, cursor, partials, buffer);
    } else {
      const Totals sum = block_sum(totals.own, buffer);
      if (threadIdx.x == 0) deliver(op, partials, cursor.split, cursor.channel, sum);
    }
    if constexpr (Op::kTensorSum) {
      const Totals sum = block_sum({totals.tensor, 0.0}, buffer);
      if (threadIdx.x == 0) op.block_sums()[blockIdx.x] = sum.first;
    }
    if (partials.splits == 1 && !Op::kOverall && !Op::kTensorSum) return;
    if (!is_last_block(partials.counter)) return;
    double sum = 0;
    if (partials.splits > 1)
      sum = finish_channels(op, partials, buffer);
    else if constexpr (Op::kOverall)
      sum = add_results(partials);
    if constexpr (Op::kTensorSum) {
      const double total = add_blocks(op.block_sums(), buffer);
      if (threadIdx.x == 0) op.end_tensor(total);
    }
    if constexpr (Op::kOverall) {
      const Totals overall = block_sum({sum, 0.0}, buffer);
      if (threadIdx.x == 0) op.end(overall.first);
    }
  }
}

template <int n, class Op, class Walk>
cudaError_t launch_channel_pass(const Op& op, const Walk& walk, int64_t blocks, double* scratch,
                                cudaStream_t stream) {
  Partials partials{scratch, nullptr, walk.channels, walk.splits};
  if (scratch)
    if (const cudaError_t error = block_counter(stream, &partials.counter); error != cudaSuccess)
      return error;
  return launch(channel_kernel<n, Op, Walk>, dim3(static_cast<unsigned>(blocks)),
                dim3(walk.threads), stream, op, walk, partials);
}

// Queues `op` over all elements. phase: common_phase() of its tensors of T. scratch:
// partial_doubles(channels) float64 numbers, or null: no sums.
template <typename T, class Op>
cudaError_t channel_pass(const Op& op, const Layout& layout, int phase, double* scratch,
                         cudaStream_t stream) {
  constexpr int n = kPackOf<T>;
  if (layout.elements() == 0) return cudaSuccess;
  if (layout.inner == 1 && layout.channels > 1) {
    if (phase == 0 && layout.channels % n == 0) {
      const Columns columns = columns_of<n>(layout, kChannelLoads<n, Op>, kSumsResident);
      return launch_channel_pass<n>(op, columns, columns.tiles * columns.splits, scratch, stream);
    }
    const Columns columns = columns_of<1>(layout, kChannelLoads<1, Op>, kSumsResident);
    return launch_channel_pass<1>(op, columns, columns.tiles * columns.splits, scratch, stream);
  }
  if (phase >= 0) {
    const RowsShape rows = rows_of<n>(layout, phase, kChannelLoads<n, Op>);
    const int64_t blocks = rows.channels * rows.splits;
    if (rows.whole) return launch_channel_pass<n>(op, WholeRows(rows), blocks, scratch, stream);
    return launch_channel_pass<n>(op, Rows(rows), blocks, scratch, stream);
  }
  const Rows rows(rows_of<1>(layout, 0, kChannelLoads<1, Op>));
  return launch_channel_pass<1>(op, rows, rows.channels * rows.splits, scratch, stream);
}

}  // namespace cuda
}  // namespace adadfq

#endif  // ADADFQ_CUDA_CHANNEL_SUMS_H_
