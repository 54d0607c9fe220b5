// Per-channel affine map, residual, activation and per-tensor fake quantisation in one pass.
//
//   u     = x scale_c + shift_c + residual
//   x_hat = fake_quantize(act(u))                     act: none, ReLU, ReLU6
//   code  = round(act(u) / act_scale) + act_zero_point in 0..2^bits - 1, 0 for NaN
//
// Build with --fmad=false. Bytes an element, float32: 8, 12 with a residual, 5 and 9 where codes
// are stored; 16-bit types 4, 6, 3 and 4.
//
// Test: ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_cuda_kernels.py -k affine
//
// On a GPU: python -m pytest -m gpu tests
//
// Time: python -m benchmarks ops --device cuda --suite gpu --ops affine_act_fake_quantize
//
// Alone: nvcc -std=c++17 -O3 --fmad=false -c csrc/cuda/affine_act_fake_quantize.cu
#include "affine_act_fake_quantize.h"

#include <type_traits>

#include "../common/activation.h"
#include "../common/division.h"
#include "dispatch_dtype.h"
#include "elementwise.h"

namespace adadfq {
namespace cuda {
namespace {

// To: T for x_hat, uint8_t for codes.
template <typename T, typename To, bool kResidual>
struct Forward {
  const T* x;
  const float* scale;
  const float* shift;
  const T* residual;
  const float* act_scale;  // null: not quantised
  const int32_t* act_zero_point;
  To* out;
  ActBounds act;
  int32_t qmax;
  ChannelQuantizer quantizer;
  float zero_point_bits;

  static constexpr bool kCodes = std::is_same_v<To, uint8_t>;

  struct Parameters {
    float scale, shift;
  };

  using Channel = Parameters;

  template <int n>
  struct In {
    Pack<T, n> packs[kResidual ? 2 : 1];
  };

  template <int n>
  struct Out {
    std::conditional_t<kCodes, uint8_t, float> values[n];
  };

  __device__ void prepare() {
    if (!act_scale) return;
    const QParams params{*act_scale, *act_zero_point};
    quantizer =
        with_activation(channel_quantizer(params.scale, params.zero_point, qmax, kToCodes), act);
    // Of a whole number from 2^23 on, as of this plus a code, the last bits are the number's.
    zero_point_bits = static_cast<float>(params.zero_point) + 8388608.0f;
  }

  __device__ Parameters parameters(int64_t c) const { return {scale[c], shift[c]}; }

  __device__ Channel channel(const Parameters& from) const { return from; }

  template <int n>
  __device__ In<n> load(int64_t i) const {
    In<n> in;
    in.packs[0] = cuda::load<n>(x + i);
    if constexpr (kResidual) in.packs[1] = cuda::load<n>(residual + i);
    return in;
  }

  template <int n>
  __device__ void apply(const In<n>& in, int j, const Channel& channel, Out<n>& out) const {
    float u = affine(to_float(in.packs[0].values[j]), channel.scale, channel.shift);
    if constexpr (kResidual) u += to_float(in.packs[1].values[j]);
    if constexpr (kCodes) {
      const float code = centred_code(u, quantizer) + zero_point_bits;
      out.values[j] = static_cast<uint8_t>(code == code ? float_to_bits(code) : 0);
    } else {
      out.values[j] = act_scale ? fake_quantize_value(u, quantizer) : activation(u, act);
    }
  }

  template <int n>
  __device__ void store(int64_t i, const Out<n>& values) const {
    if constexpr (kCodes) {
      Pack<uint8_t, n> codes;
#pragma unroll
      for (int j = 0; j < n; ++j) codes.values[j] = values.values[j];
      store_global(out + i, codes);
    } else {
      store_global(out + i, to_pack<T>(values.values));
    }
  }
};

template <typename T, typename To, bool kResidual>
cudaError_t run(const void* x, const float* scale, const float* shift, const void* residual,
                int act, const float* act_scale, const int32_t* act_zero_point, int bits, void* out,
                const Layout& layout, cudaStream_t stream) {
  const Forward<T, To, kResidual> op{static_cast<const T*>(x),
                                     scale,
                                     shift,
                                     static_cast<const T*>(residual),
                                     act_scale,
                                     act_zero_point,
                                     static_cast<To*>(out),
                                     act_bounds(act),
                                     max_code(bits),
                                     {},
                                     0.0f};
  return elementwise<kPackOf<T>>(op, layout, pack_phase<kPackOf<T>>(op.x, op.residual, op.out),
                                 stream);
}

template <bool kCodes>
cudaError_t dispatch(const void* x, const float* scale, const float* shift, const void* residual,
                     int act, const float* act_scale, const int32_t* act_zero_point, int bits,
                     void* out, const Layout& layout, DType dtype, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using To = std::conditional_t<kCodes, uint8_t, T>;
    const auto chosen = residual ? run<T, To, true> : run<T, To, false>;
    return chosen(x, scale, shift, residual, act, act_scale, act_zero_point, bits, out, layout,
                  stream);
  });
}

}  // namespace

cudaError_t affine_act_fake_quantize(const void* x, const float* scale, const float* shift,
                                     const void* residual, int act, const float* act_scale,
                                     const int32_t* act_zero_point, int bits, void* out,
                                     const Layout& layout, DType dtype, cudaStream_t stream) {
  return dispatch<false>(x, scale, shift, residual, act, act_scale, act_zero_point, bits, out,
                         layout, dtype, stream);
}

cudaError_t affine_act_quantize(const void* x, const float* scale, const float* shift,
                                const void* residual, int act, const float* act_scale,
                                const int32_t* act_zero_point, int bits, uint8_t* codes,
                                const Layout& layout, DType dtype, cudaStream_t stream) {
  return dispatch<true>(x, scale, shift, residual, act, act_scale, act_zero_point, bits, codes,
                        layout, dtype, stream);
}

}  // namespace cuda
}  // namespace adadfq
