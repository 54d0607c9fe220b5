// Fake quantisation over each channel's own range, of one tensor or of a list.
//
//   lo_c = min(0, min x_c), hi_c = max(0, max x_c); NaN if the channel holds a NaN
//   scale_c, zero_point_c = qparams_from_range(lo_c, hi_c)        (csrc/common/quantizer.h)
//   x_hat = round(clamp(x / scale_c, -zero_point_c, 2^bits - 1 - zero_point_c)) * scale_c
//
// Where a channel's elements lie together (weights), each thread finds the range of a channel and
// quantises it while it is in the cache: 8 bytes an element of memory traffic in float32. The
// channels of all such tensors of a list are shared out together, by elements. Otherwise (channel
// axis innermost, rows too short to vectorise along, or fewer channels than threads) the ranges are
// found first, then the tensor is quantised in a second pass: 12 bytes.
//
// Test: python -m pytest tests/test_native_cpu.py -k dynamic
// Time: python -m benchmarks ops --ops dynamic_fake_quantize,foreach_dynamic_fake_quantize
#include "dynamic_fake_quantize.h"

#include <limits>
#include <vector>

#include "../common/quantizer.h"
#include "dispatch_dtype.h"
#include "fake_quantize.h"
#include "huge_pages.h"
#include "quantize_loops.h"
#include "ranges.h"

namespace adadfq {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

void set_qparams(const DynamicTensor& t, int64_t channel, const Range& range) {
  const QParams q = range.qparams(static_cast<int>(t.bits));
  t.scale[channel] = q.scale;
  t.zero_point[channel] = q.zero_point;
}

bool rows_lie_together(const Layout& layout) {
  return layout.outer == 1 || layout.inner >= kRowElements;
}

template <typename T>
void quantize_channels(const DynamicTensor& t, int64_t begin, int64_t end) {
  const Layout& layout = t.layout;
  const T* x = static_cast<const T*>(t.x);
  T* out = static_cast<T*>(t.out);
  const int64_t stride = layout.channels * layout.inner;
  for (int64_t c = begin; c < end; ++c) {
    Range range;
    for (int64_t o = 0; o < layout.outer; ++o) {
      find_range(x + o * stride + c * layout.inner, layout.inner, range);
    }
    set_qparams(t, c, range);
    const CodeBounds bounds = code_bounds(t.zero_point[c], max_code(static_cast<int>(t.bits)));
    for (int64_t o = 0; o < layout.outer; ++o) {
      const int64_t at = o * stride + c * layout.inner;
      quantize_row(x + at, out + at, layout.inner, t.scale[c], bounds.lo, bounds.hi);
    }
  }
}

// All channels of `tensors`, each by one thread; threads take equal numbers of elements, up to a
// channel.
template <typename T>
void by_channels(const std::vector<const DynamicTensor*>& tensors, int threads) {
  int64_t total = 0;
  for (const DynamicTensor* t : tensors) total += t->layout.elements();
  parallel_for(total, useful_threads(total, threads), 1, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (const DynamicTensor* t : tensors) {
      // A channel belongs to the thread whose part holds its first element.
      const int64_t channels = t->layout.channels, length = t->layout.elements() / channels;
      const int64_t first = (std::max<int64_t>(begin - start, 0) + length - 1) / length;
      const int64_t last = (std::max<int64_t>(end - start, 0) + length - 1) / length;
      quantize_channels<T>(*t, std::min(first, channels), std::min(last, channels));
      start += t->layout.elements();
    }
  });
}

template <typename T>
void ranges_by_rows(const DynamicTensor& t, int threads) {
  const T* x = static_cast<const T*>(t.x);
  const int64_t inner = t.layout.inner, channels = t.layout.channels;
  constexpr int64_t kPiece = 16384;
  const int64_t pieces = (inner + kPiece - 1) / kPiece;
  std::vector<Range> found(t.layout.outer * channels * pieces);
  parallel_for(found.size(), threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i % pieces * kPiece;
      find_range(x + i / pieces * inner + at, std::min(kPiece, inner - at), found[i]);
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    Range range;
    for (int64_t o = 0; o < t.layout.outer; ++o) {
      for (int64_t p = 0; p < pieces; ++p) range.join(found[(o * channels + c) * pieces + p]);
    }
    set_qparams(t, c, range);
  }
}

template <typename T>
void ranges_by_columns(const DynamicTensor& t, int threads) {
  const T* x = static_cast<const T*>(t.x);
  const Layout& layout = t.layout;
  const int64_t columns = layout.channels * layout.inner;
  const int64_t parts = std::min<int64_t>(threads, layout.outer);
  std::vector<float> lo(parts * columns, kInf), hi(parts * columns, -kInf);
  std::vector<int32_t> nan(parts * columns, 0);
  parallel_for(parts, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * layout.outer / parts, last = (p + 1) * layout.outer / parts;
      find_ranges(x + first * columns, last - first, columns, &lo[p * columns], &hi[p * columns],
                  &nan[p * columns]);
    }
  });
  for (int64_t c = 0; c < layout.channels; ++c) {
    Range range;
    for (int64_t p = 0; p < parts; ++p) {
      for (int64_t k = 0; k < layout.inner; ++k) {
        const int64_t i = p * columns + c * layout.inner + k;
        range.join({lo[i], hi[i], nan[i]});
      }
    }
    set_qparams(t, c, range);
  }
}

}  // namespace

void dynamic_fake_quantize(const DynamicTensor* tensors, int64_t count, DType dtype, int threads) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    std::vector<const DynamicTensor*> whole;
    for (const DynamicTensor* t = tensors; t != tensors + count; ++t) {
      const Layout& layout = t->layout;
      const int useful = useful_threads(layout.elements(), threads);
      prefer_huge_pages(t->out, layout.elements() * sizeof(T));
      if (rows_lie_together(layout) && layout.channels >= useful) {
        whole.push_back(t);
        continue;
      }
      if (rows_lie_together(layout)) {
        ranges_by_rows<T>(*t, useful);
      } else {
        ranges_by_columns<T>(*t, useful);
      }
      fake_quantize(t->x, t->scale, t->zero_point, t->out, layout, static_cast<int>(t->bits), dtype,
                    threads);
    }
    by_channels<T>(whole, threads);
  });
}

}  // namespace adadfq
