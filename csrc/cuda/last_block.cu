// Counters of ended blocks, one for every stream and every capture; see block_counter.h.
#include "block_counter.h"

#include <cuda_runtime.h>

#include <atomic>
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

// Those of `device`, the current one. Asking takes longer than a launch.
cudaError_t counters_of(int device, unsigned** first) {
  constexpr int kDevices = 64;
  static std::atomic<unsigned*> known[kDevices];
  if (device < kDevices && (*first = known[device].load(std::memory_order_acquire)) != nullptr)
    return cudaSuccess;
  void* address = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&address, counters);
  if (error != cudaSuccess) return error;
  *first = static_cast<unsigned*>(address);
  if (device < kDevices) known[device].store(*first, std::memory_order_release);
  return cudaSuccess;
}

// device, stream, capture. A stream's handle says which one it is in its capture alone: handles are
// reused, and cudaStreamPerThread is another stream in every thread. Elsewhere the stream is its
// id, which is unique for the life of the program, but must not be asked for in a capture.
using Place = std::tuple<int, uint64_t, uint64_t>;
constexpr uint64_t kNoCapture = UINT64_MAX;

cudaError_t place_of(int device, cudaStream_t stream, Place* place) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0, id = 0;
  cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture);
  if (error != cudaSuccess) return error;
  if (status != cudaStreamCaptureStatusNone) {
    *place = {device, reinterpret_cast<uintptr_t>(stream), capture};
    return cudaSuccess;
  }
  error = cudaStreamGetId(stream, &id);
  *place = {device, id, kNoCapture};
  return error;
}

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

cudaError_t load_block_counters() {
  int device = 0;
  unsigned* first = nullptr;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? counters_of(device, &first) : error;
}

cudaError_t block_counter(cudaStream_t stream, unsigned** counter) {
  int device = 0;
  unsigned* first = nullptr;
  Place place;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = counters_of(device, &first);
  if (error == cudaSuccess) error = place_of(device, stream, &place);
  if (error != cudaSuccess) return error;
  *counter = first + counter_of(place);
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace adadfq
