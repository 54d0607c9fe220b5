// Fake quantisation over a dense tensor, per tensor (one channel) or per channel.
//
//   x_hat = (clamp(round(x / scale_c) + zero_point_c, 0, 2^bits - 1) - zero_point_c) * scale_c
//   grad  = grad where round(x / scale_c) + zero_point_c is in 0..2^bits - 1, else 0
//
// The tensor is walked once, in memory order, whatever the place of the channel axis
// (channelwise.h). Bytes an element, float32: 8 forward, 12 backward; 16-bit types half of that.
//
// Test: python -m pytest tests/test_native_cpu.py -k fake_quantize
// Time: python -m benchmarks ops --ops fake_quantize,fake_quantize_
#include "fake_quantize.h"

#include "code_params.h"
#include "dispatch_dtype.h"
#include "huge_pages.h"
#include "quantize_loops.h"

namespace adadfq {
void fake_quantize(const void* x, const float* scale, const int32_t* zero_point, void* out,
                   const Layout& layout, int bits, DType dtype, int threads) {
  const ChannelParams<3> params = code_params(scale, zero_point, layout.channels, bits);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    prefer_huge_pages(out, layout.elements() * sizeof(T));
    for_each_segment(
        layout, params, threads,
        [=](int64_t i, int64_t n, const auto& p) {
          quantize_row(from + i, to + i, n, p[0], p[1], p[2]);
        },
        [=](int64_t i, int64_t n, const auto& p) {
          quantize_pattern(from + i, to + i, n, p[0], p[1], p[2]);
        });
  });
}

void foreach_fake_quantize(const DynamicTensor* tensors, int64_t count, DType dtype, int threads) {
  for (const DynamicTensor* t = tensors; t != tensors + count; ++t) {
    fake_quantize(t->x, t->scale, t->zero_point, t->out, t->layout, static_cast<int>(t->bits),
                  dtype, threads);
  }
}

void fake_quantize_backward(const void* grad, const void* x, const float* scale,
                            const int32_t* zero_point, void* out, const Layout& layout, int bits,
                            DType dtype, int threads) {
  const ChannelParams<3> params = code_params(scale, zero_point, layout.channels, bits);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* upstream = static_cast<const T*>(grad);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    prefer_huge_pages(out, layout.elements() * sizeof(T));
    for_each_segment(
        layout, params, threads,
        [=](int64_t i, int64_t n, const auto& p) {
          clip_row(upstream + i, from + i, to + i, n, p[0], p[1], p[2]);
        },
        [=](int64_t i, int64_t n, const auto& p) {
          clip_pattern(upstream + i, from + i, to + i, n, p[0], p[1], p[2]);
        });
  });
}

}  // namespace adadfq
