// Fake quantisation over each channel's own range, of one tensor or of a list.
//
//   lo_c = min(0, min x_c), hi_c = max(0, max x_c); NaN if the channel holds a NaN
//   scale_c, zero_point_c = qparams_from_range(lo_c, hi_c)        (csrc/common/quantizer.h)
//   x_hat = round(clamp(x / scale_c, -zero_point_c, 2^bits - 1 - zero_point_c)) * scale_c
//
// The arithmetic is csrc/common/division.h; build with --fmad=false.
//
// Channels that are one row of memory each, as those of weights along axis 0: one launch for up to
// 90 tensors, whose table is the kernel's parameters, so that nothing is copied to the device. A
// row belongs to 1 to 256 neighbouring threads of a block, and stays in registers between the
// search for its range and the rounding, up to 8192 float32 or 16384 16-bit elements; what is
// longer is read again, mostly from the second-level cache. Bytes an element, float32: 8. Rows that
// are not whole packs of 16 bytes are read by elements: those are the first layer's and depthwise
// weights, too small for it to be felt. There is a block for every 256 threads of rows rather than
// a persistent grid: rows differ in length, and so the device shares them out.
//
// Other channels, and rows beyond 65536 elements: two launches, channel_ranges.h and
// fake_quantize.cu. Bytes an element, float32: 12, of which 4 from the cache where the tensor fits
// it. 16-bit types: half.
//
// Test: ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_cuda_kernels.py -k dynamic
//
// On a GPU: python -m pytest -m gpu tests
//
// Time: python -m benchmarks ops --device cuda --suite gpu --ops
// dynamic_fake_quantize,foreach_dynamic_fake_quantize
//
// Alone: nvcc -std=c++17 -O3 --fmad=false -c csrc/cuda/dynamic_fake_quantize.cu
#include "dynamic_fake_quantize.h"

#include "channel_ranges.h"
#include "dispatch_dtype.h"
#include "fake_quantize.h"
#include "quantize_rows.h"

namespace adadfq {
namespace cuda {

cudaError_t dynamic_fake_quantize(const DynamicTensor* tensors, int64_t count, double* scratch,
                                  DType dtype, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    RowsQueue<T> queue(stream);
    for (const DynamicTensor* t = tensors; t != tensors + count; ++t) {
      const Layout& layout = t->layout;
      const int bits = static_cast<int>(t->bits);
      cudaError_t error = cudaSuccess;
      if (layout.outer == 1 && layout.inner <= kLongestRow) {
        error = queue.add(*t);
      } else if (!scratch) {
        return cudaErrorInvalidValue;
      } else {
        error = channel_ranges(static_cast<const T*>(t->x), layout, t->scale, t->zero_point, bits,
                               scratch, stream);
        if (error == cudaSuccess)
          error = fake_quantize(t->x, t->scale, t->zero_point, t->out, layout, bits, dtype, stream);
      }
      if (error != cudaSuccess) return error;
    }
    return queue.flush();
  });
}

}  // namespace cuda
}  // namespace adadfq
