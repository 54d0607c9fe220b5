// Counters of ended blocks, one for every stream and every capture; see last_block.h.
#include "last_block.h"

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

namespace adadfq {
namespace cuda {
namespace {

// Reused after that many streams and captures: by then the launches of the first have long ended,
// and graphs so far apart are hardly replayed at the same time.
constexpr unsigned kCounters = 1 << 16;
__device__ unsigned counters[kCounters];

// device, stream, capture (0: none)
using Place = std::tuple<int, cudaStream_t, unsigned long long>;

unsigned counter_of(const Place& place) {
  // Never freed: launches may come from destructors of static objects.
  static auto& mutex = *new std::mutex;
  static auto& known = *new std::map<Place, unsigned>;
  static unsigned next = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  // A forgotten stream gets another counter, which is as good.
  if (known.size() >= 4096) known.clear();
  const auto [found, is_new] = known.try_emplace(place, next);
  if (is_new) next = (next + 1) % kCounters;
  return found->second;
}

}  // namespace

cudaError_t block_counter(cudaStream_t stream, unsigned** counter) {
  int device = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  void* first = nullptr;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaStreamGetCaptureInfo(stream, &status, &capture);
  if (error == cudaSuccess) error = cudaGetSymbolAddress(&first, counters);
  if (error != cudaSuccess) return error;
  if (status == cudaStreamCaptureStatusNone) capture = 0;
  *counter = static_cast<unsigned*>(first) + counter_of({device, stream, capture});
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace adadfq
