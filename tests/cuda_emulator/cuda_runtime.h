// Enough of CUDA to run this project's kernels on a CPU: csrc/cuda compiles against it, unchanged,
// with a C++ compiler.
//
// A block is an OS thread's, its threads are fibers of that, and every kernel runs to its end
// inside cudaLaunchKernelEx. What memory the kernels share, how they wait for each other and what a
// warp exchanges behave as on a GPU; time and memory ordering do not. Barriers that some threads of
// a block never reach end the process.
//
// Threads run in ascending or descending order, launch by launch in turns (EMULATOR_ORDER=ascending
// or descending fixes it), so that a missing barrier gives two results.
//
// Launches can be recorded instead of run, as they would be on a GPU of any number of
// multiprocessors: see emulator_record().
#ifndef ADADFQ_TESTS_CUDA_EMULATOR_CUDA_RUNTIME_H_
#define ADADFQ_TESTS_CUDA_EMULATOR_CUDA_RUNTIME_H_

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>

using std::max;
using std::min;

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
// A block has an OS thread to itself while it runs, or runs after others of that thread have ended;
// it begins with all bytes 0xff, NaNs and huge numbers.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(16) double2 {
  double x, y;
};

// ------------------------------------------------------------------------------------------------
// runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
using cudaStream_t = struct EmulatedStream*;

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

union cudaLaunchAttributeValue {
  int cooperative;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "too many blocks in cooperative launch";
  }
}

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    default:
      return "cudaErrorCooperativeLaunchTooLarge";
  }
}

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                            unsigned long long* id = nullptr) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode now = cudaStreamCaptureModeGlobal;
  std::swap(now, *mode);
  return cudaSuccess;
}

// Handles are not reused here.
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
}

template <typename T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

namespace emulator {

// A GPU of few multiprocessors, so that loops over a persistent grid go round.
constexpr int kMultiprocessors = 2;

// Multiprocessors of the GPU that launches are recorded for; 0 where they run. Also its number as a
// device, under which the launchers remember what they have asked.
int recorded_multiprocessors();

// Notes a launch of the function at `kernel`; parameters: their bytes as the device would get them.
void record(const void* kernel, dim3 grid, dim3 block, bool cooperative,
            const std::string& parameters);

template <typename T>
void append_parameter(std::string& bytes, const T& parameter) {
  bytes.resize((bytes.size() + alignof(T) - 1) / alignof(T) * alignof(T));
  bytes.append(reinterpret_cast<const char*>(&parameter), sizeof parameter);
}

struct Shape {
  dim3 grid, block;
};

cudaError_t run(const Shape& shape, bool cooperative, const std::function<void()>& kernel);

// Waits for all threads of the block that have not ended.
void wait_for_block();

// Waits for all threads of all blocks.
void wait_for_grid();

// Gives `bytes` of `mine` to the lanes of `mask` and waits for theirs; returns where lane 0's are,
// 16 bytes a lane, until this thread's next exchange.
const unsigned char* exchange(unsigned mask, const void* mine, size_t bytes);

unsigned lane();

}  // namespace emulator

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::recorded_multiprocessors();
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = device == 0 ? emulator::kMultiprocessors : device;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    cooperative |= config->attrs[i].id == cudaLaunchAttributeCooperative &&
                   config->attrs[i].val.cooperative != 0;
  if (emulator::recorded_multiprocessors() != 0) {
    std::string bytes;
    (emulator::append_parameter(bytes, Parameters(arguments)), ...);
    emulator::record(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                     cooperative, bytes);
    return cudaSuccess;
  }
  return emulator::run({config->gridDim, config->blockDim}, cooperative,
                       [&] { kernel(Parameters(arguments)...); });
}

// ------------------------------------------------------------------------------------------------
// device

struct Index {
  unsigned x, y, z;
};

// Of the thread that runs.
extern __thread Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulator::wait_for_block(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  const char nothing = 0;
  emulator::exchange(mask, &nothing, 1);
}

namespace emulator {

template <typename T>
T from_lane(const unsigned char* values, unsigned lane) {
  T value;
  std::memcpy(&value, values + 16 * lane, sizeof value);
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, int width) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  const unsigned char* values = exchange(mask, &value, sizeof value);
  // Beyond its part of the warp a lane gets its own.
  const unsigned first = lane() / width * width;
  return from_lane<T>(values, source >= first && source < first + width ? source : lane());
}

}  // namespace emulator

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return emulator::shuffle(mask, value, emulator::lane() ^ lane_mask, width);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle(mask, value, emulator::lane() + delta, width);
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  unsigned old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(address, &old, old >= limit ? 0 : old + 1, false,
                                      __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

#endif  // ADADFQ_TESTS_CUDA_EMULATOR_CUDA_RUNTIME_H_
