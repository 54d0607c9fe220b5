// Quantisation to k-bit codes packed into bytes, and back (the format is csrc/common/packing.h).
//
//   pack     code = clamp(round(x / scale_c) + zero_point_c, 0, 2^k - 1)    -> k bits
//   unpack   x_hat = (code - zero_point_c) * scale_c
//
// A tile of elements becomes one code a byte, in the cache, and those become groups of eight: the
// first loop knows channels and no bits, the second bits and no channels. Tiles are whole groups,
// so threads share no byte.
//
// Bytes an element, float32: 4 + k / 8 each way; 16-bit types 2 + k / 8.
//
// Test: python -m pytest tests/test_packing.py
#include "packing.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "../common/packing.h"
#include "code_params.h"
#include "dispatch_dtype.h"
#include "huge_pages.h"
#include "target_clones.h"

namespace adadfq {
namespace {

constexpr int64_t kTile = 4096;
// Elements whose codes, of any width, are whole cache lines.
constexpr int64_t kAlign = 512;
static_assert(kTile % kAlign == 0, "a tile begins where a group does");

template <typename T, typename Params>
ADADFQ_INLINE void encode(const T* ADADFQ_RESTRICT x, uint8_t* ADADFQ_RESTRICT codes, int64_t n,
                          Params scale, Params lo, Params hi) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    codes[i] =
        static_cast<uint8_t>(code_from_value(to_float(x[i]), at(scale, i), at(lo, i), at(hi, i)));
  }
}

template <typename T, typename Params>
ADADFQ_INLINE void decode(const uint8_t* ADADFQ_RESTRICT codes, T* ADADFQ_RESTRICT out, int64_t n,
                          Params scale, Params lo) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>(value_from_code(codes[i], at(scale, i), at(lo, i)));
  }
}

template <int kBits>
ADADFQ_INLINE void pack_groups(const uint8_t* ADADFQ_RESTRICT codes, int64_t groups,
                               uint8_t* ADADFQ_RESTRICT packed) {
  for (int64_t g = 0; g < groups; ++g) {
    uint64_t group = 0;
    for (int i = 0; i < kGroup; ++i) group |= place_code(codes[g * kGroup + i], i, kBits);
    store_group(group, kBits, packed + g * kBits);
  }
}

template <int kBits>
ADADFQ_INLINE void unpack_groups(const uint8_t* ADADFQ_RESTRICT packed, int64_t groups,
                                 uint8_t* ADADFQ_RESTRICT codes) {
  for (int64_t g = 0; g < groups; ++g) {
    const uint64_t group = load_group(packed + g * kBits, kBits);
    for (int i = 0; i < kGroup; ++i) {
      codes[g * kGroup + i] = static_cast<uint8_t>(code_at(group, i, kBits));
    }
  }
}

// Calls body(width) with the width as a constant, so that loops over a group's codes unroll.
template <typename Body>
ADADFQ_INLINE void with_width(int bits, const Body& body) {
  switch (bits) {
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 5:
      return body(std::integral_constant<int, 5>{});
    case 6:
      return body(std::integral_constant<int, 6>{});
    case 7:
      return body(std::integral_constant<int, 7>{});
    case 8:
      return body(std::integral_constant<int, 8>{});
  }
  throw std::invalid_argument("codes have 2 to 8 bits");
}

}  // namespace

#define ADADFQ_DEFINE(T)                                                                          \
  ADADFQ_CLONES void encode_row(const T* x, uint8_t* codes, int64_t n, float scale, float lo,     \
                                float hi) {                                                       \
    encode(x, codes, n, scale, lo, hi);                                                           \
  }                                                                                               \
  ADADFQ_CLONES void encode_pattern(const T* x, uint8_t* codes, int64_t n, const float* scale,    \
                                    const float* lo, const float* hi) {                           \
    encode(x, codes, n, scale, lo, hi);                                                           \
  }                                                                                               \
  ADADFQ_CLONES void decode_row(const uint8_t* codes, T* out, int64_t n, float scale, float lo) { \
    decode(codes, out, n, scale, lo);                                                             \
  }                                                                                               \
  ADADFQ_CLONES void decode_pattern(const uint8_t* codes, T* out, int64_t n, const float* scale,  \
                                    const float* lo) {                                            \
    decode(codes, out, n, scale, lo);                                                             \
  }

ADADFQ_DEFINE(float)
ADADFQ_DEFINE(BFloat16)
ADADFQ_DEFINE(Float16)

#undef ADADFQ_DEFINE

ADADFQ_CLONES void pack_whole_groups(const uint8_t* codes, int64_t groups, uint8_t* packed,
                                     int bits) {
  with_width(bits, [&](auto width) ADADFQ_INLINE_LAMBDA {
    pack_groups<decltype(width)::value>(codes, groups, packed);
  });
}

ADADFQ_CLONES void unpack_whole_groups(const uint8_t* packed, int64_t groups, uint8_t* codes,
                                       int bits) {
  with_width(bits, [&](auto width) ADADFQ_INLINE_LAMBDA {
    unpack_groups<decltype(width)::value>(packed, groups, codes);
  });
}

namespace {

// Of `n` codes; only the last tile of a tensor has a group that is not whole.
void pack_tile(const uint8_t* codes, int64_t n, uint8_t* packed, int bits) {
  const int64_t groups = n / kGroup;
  const int rest = static_cast<int>(n % kGroup);
  pack_whole_groups(codes, groups, packed, bits);
  uint64_t group = 0;
  for (int i = 0; i < rest; ++i) group |= place_code(codes[groups * kGroup + i], i, bits);
  store_group(group, static_cast<int>(packed_bytes(rest, bits)), packed + groups * bits);
}

void unpack_tile(const uint8_t* packed, int64_t n, uint8_t* codes, int bits) {
  const int64_t groups = n / kGroup;
  const int rest = static_cast<int>(n % kGroup);
  unpack_whole_groups(packed, groups, codes, bits);
  const uint64_t group =
      load_group(packed + groups * bits, static_cast<int>(packed_bytes(rest, bits)));
  for (int i = 0; i < rest; ++i) {
    codes[groups * kGroup + i] = static_cast<uint8_t>(code_at(group, i, bits));
  }
}

// tile(begin, n, codes) over all elements, in parallel; `codes` has room for n.
template <typename Tile>
void for_each_tile(int64_t elements, int threads, const Tile& tile) {
  parallel_for(elements, useful_threads(elements, threads), kAlign,
               [&](int64_t begin, int64_t end) {
                 alignas(64) uint8_t codes[kTile];
                 for (; begin < end; begin += kTile)
                   tile(begin, std::min(kTile, end - begin), codes);
               });
}

}  // namespace

void quantize_pack(const void* x, const float* scale, const int32_t* zero_point, uint8_t* packed,
                   const Layout& layout, int bits, DType dtype, int threads) {
  const ChannelParams<3> params = code_params(scale, zero_point, layout.channels, bits);
  const Segments<3> segments(layout, params);
  prefer_huge_pages(packed, packed_bytes(layout.elements(), bits));
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(x);
    for_each_tile(layout.elements(), threads, [&](int64_t begin, int64_t n, uint8_t* codes) {
      segments.walk(
          begin, begin + n,
          [&](int64_t i, int64_t count, const auto& p) {
            encode_row(from + i, codes + (i - begin), count, p[0], p[1], p[2]);
          },
          [&](int64_t i, int64_t count, const auto& p) {
            encode_pattern(from + i, codes + (i - begin), count, p[0], p[1], p[2]);
          });
      pack_tile(codes, n, packed + begin / kGroup * bits, bits);
    });
  });
}

void unpack_dequantize(const uint8_t* packed, const float* scale, const int32_t* zero_point,
                       void* out, const Layout& layout, int bits, DType dtype, int threads) {
  const ChannelParams<3> params = code_params(scale, zero_point, layout.channels, bits);
  const Segments<3> segments(layout, params);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    T* to = static_cast<T*>(out);
    prefer_huge_pages(out, layout.elements() * sizeof(T));
    for_each_tile(layout.elements(), threads, [&](int64_t begin, int64_t n, uint8_t* codes) {
      unpack_tile(packed + begin / kGroup * bits, n, codes, bits);
      segments.walk(
          begin, begin + n,
          [&](int64_t i, int64_t count, const auto& p) {
            decode_row(codes + (i - begin), to + i, count, p[0], p[1]);
          },
          [&](int64_t i, int64_t count, const auto& p) {
            decode_pattern(codes + (i - begin), to + i, count, p[0], p[1]);
          });
    });
  });
}

}  // namespace adadfq
