// Fake quantisation of a list of tensors with given scales, and its backward where these are
// learned (LSQ: Esser et al., ICLR 2020).
//
//   q = x / scale_c, k = round(q), codes are lo <= k <= hi with lo = -zero_point_c
//   grad_x       = grad where k is a code, else 0
//   grad_scale_c = sum grad (k - q where k is a code; lo where k < lo; hi where k > hi)
//
// The arithmetic is csrc/common/division.h; build with --fmad=false.
//
// Channels that are one row of memory each, as those of weights along axis 0: one launch for up to
// 90 tensors forward and 64 backward, whose table is the kernel's parameters (quantize_rows.h,
// learned_rows.h). Other channels, and rows beyond 65536 elements: one launch a tensor
// (fake_quantize.cu, channel_sums.h). Sums are in float over at most 64 elements, eight such lanes
// joined, in double beyond. Bytes an element, float32: 8 forward, 12 backward; 16-bit types half of
// that.
//
// Test: ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_cuda_kernels.py -k learned
//
// On a GPU: python -m pytest -m gpu tests
//
// Alone: nvcc -std=c++17 -O3 --fmad=false -c csrc/cuda/learned_fake_quantize.cu
#include "learned_fake_quantize.h"

#include "../common/division.h"
#include "channel_sums.h"
#include "dispatch_dtype.h"
#include "fake_quantize.h"
#include "learned_rows.h"
#include "quantize_rows.h"

namespace adadfq {
namespace cuda {
namespace {

template <typename T>
struct LearnedBackward {
  const T* grad;
  const T* x;
  const float* scale;
  const int32_t* zero_point;
  T* grad_x;
  float* grad_scale;
  int32_t qmax;

  static constexpr int kPacks = 2;
  static constexpr bool kSums = true, kPivot = false, kExact = false, kOverall = false,
                        kTensorSum = false;

  struct Channel {
    ChannelQuantizer quantizer;
    CodeBounds codes;
  };

  template <int n>
  struct In {
    Loaded<T, n> grad, x;
  };
  template <int n>
  struct Out {
    Pack<T, n> grad_x;
  };

  struct Item {
    float kept, term;
  };

  struct Sums {
    float terms;
  };

  struct Known {};

  __device__ Channel channel(int64_t c) const {
    return {channel_quantizer(scale[c], zero_point[c], qmax, kToNeighbours),
            code_bounds(zero_point[c], qmax)};
  }

  template <int n>
  __device__ In<n> load(int64_t i) const {
    using Pack = Loaded<T, n>;
    return {Pack::from(grad + i), Pack::from(x + i)};
  }

  template <int n>
  __device__ Item item(const In<n>& in, int j, const Channel& channel) const {
    const LearnedStep step = learned_step(in.x.value(j), channel.quantizer, channel.codes);
    const float value = in.grad.value(j);
    return {keep_if(step.inside, value), value * step.slope};
  }

  __device__ bool stores() const { return true; }

  template <int n>
  __device__ void put(const Item& item, const Channel&, int j, Out<n>& out) const {
    out.grad_x.values[j] = from_float<T>(item.kept);  // exact
  }

  template <int n>
  __device__ void store(int64_t i, const Out<n>& out) const {
    cuda::store(grad_x + i, out.grad_x);
  }

  template <int n>
  __device__ void store_one(int64_t i, int j, const Out<n>& out) const {
    grad_x[i] = out.grad_x.values[j];
  }

  __device__ float value(const Item& item) const { return item.term; }

  __device__ Item nothing(float) const { return {0.0f, 0.0f}; }

  __device__ void add(const Item& item, float, Sums& sums) const { sums.terms += item.term; }

  __device__ void join(Sums& into, const Sums& other) const { into.terms += other.terms; }

  __device__ bool run_totals(const Sums& sums, float, int, const Channel&, Totals& totals) const {
    totals = {static_cast<double>(sums.terms), 0.0};
    return true;
  }

  __device__ Known known(int64_t) const { return {}; }

  __device__ double finish(int64_t c, const Totals& totals, const Known&) const {
    grad_scale[c] = static_cast<float>(totals.first);
    return 0.0;
  }
};

bool channels_are_rows(const Layout& layout) {
  return layout.outer == 1 && layout.inner <= kLongestRow;
}

}  // namespace

cudaError_t foreach_fake_quantize(const DynamicTensor* tensors, int64_t count, DType dtype,
                                  cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    RowsQueue<T, true> queue(stream);
    for (const DynamicTensor* t = tensors; t != tensors + count; ++t) {
      cudaError_t error = cudaSuccess;
      if (channels_are_rows(t->layout)) {
        error = queue.add(*t);
      } else {
        error = fake_quantize(t->x, t->scale, t->zero_point, t->out, t->layout,
                              static_cast<int>(t->bits), dtype, stream);
      }
      if (error != cudaSuccess) return error;
    }
    return queue.flush();
  });
}

cudaError_t learned_fake_quantize_backward(const LearnedTensor* tensors, int64_t count,
                                           double* scratch, DType dtype, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    LearnedRowsQueue<T> queue(stream);
    for (const LearnedTensor* t = tensors; t != tensors + count; ++t) {
      cudaError_t error = cudaSuccess;
      if (channels_are_rows(t->layout)) {
        error = queue.add(*t);
      } else if (!scratch) {
        return cudaErrorInvalidValue;
      } else {
        const LearnedBackward<T> op{static_cast<const T*>(t->grad),
                                    static_cast<const T*>(t->x),
                                    t->scale,
                                    t->zero_point,
                                    static_cast<T*>(t->grad_x),
                                    t->grad_scale,
                                    max_code(static_cast<int>(t->bits))};
        error = channel_pass<T>(op, t->layout, common_phase<T>(t->grad, t->x, t->grad_x), scratch,
                                stream);
      }
      if (error != cudaSuccess) return error;
    }
    return queue.flush();
  });
}

}  // namespace cuda
}  // namespace adadfq
