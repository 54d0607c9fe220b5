// Exhaustive and random checks of csrc/common's arithmetic that only GPUs use: exit status 1 and a
// line for the first case that is wrong.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../csrc/common/division.h"
#include "../csrc/common/fast_divide.h"
#include "../csrc/common/wide_divide.h"

using namespace adadfq;

// A GPU's approximate reciprocal is within one unit in the last place; here from anything within 4.
void check_reciprocals() {
  for (uint32_t mantissa = 0; mantissa < (1u << 23); ++mantissa) {
    const float s = bits_to_float(0x3f800000u | mantissa), exact = 1.0f / s;
    for (int off = -4; off <= 4; ++off) {
      const float found = refined_reciprocal(s, bits_to_float(float_to_bits(exact) + off));
      if (float_to_bits(found) == float_to_bits(exact)) continue;
      std::printf("1 / %a from %d units off is %a, not %a\n", s, off, found, exact);
      std::exit(1);
    }
  }
}

template <typename Divide, typename Number>
void check_division(Number number, Number divisor) {
  const auto found = Divide(divisor).quotient(number);
  if (static_cast<Number>(found) == number / divisor) return;
  std::printf("%" PRId64 " / %" PRId64 " is not %" PRId64 "\n", static_cast<int64_t>(number),
              static_cast<int64_t>(divisor), static_cast<int64_t>(found));
  std::exit(1);
}

// Numbers of all sizes, multiples of the divisor and their neighbours.
template <typename Divide, typename Number>
void check_divisions(int bits) {
  std::mt19937_64 random(0);
  const auto draw = [&] {
    return static_cast<Number>((random() >> (64 - bits)) >> random() % bits);
  };
  const Number largest = static_cast<Number>((uint64_t{1} << bits) - 1);
  for (int i = 0; i < 2000000; ++i) {
    const Number divisor = std::max<Number>(1, draw()), number = draw();
    const Number multiple = number / divisor * divisor;
    for (const Number n : {number, multiple, static_cast<Number>(multiple == 0 ? 0 : multiple - 1),
                           largest, Number{0}})
      check_division<Divide>(n, divisor);
  }
  check_division<Divide>(largest, largest);
  check_division<Divide>(largest, Number{1});
}

// The quotient of ChannelQuantizer against division: ties and their neighbours, at random scales.
void check_quantizers() {
  std::mt19937 random(0);
  for (int i = 0; i < 200000; ++i) {
    const float scale = bits_to_float(0x00800000u + random() % (0x7f000000u - 0x00800000u));
    const int32_t qmax = (1 << (2 + random() % 7)) - 1, zero_point = random() % (qmax + 1);
    const CodeBounds bounds = code_bounds(zero_point, qmax);
    const ChannelQuantizer to_codes = channel_quantizer(scale, zero_point, qmax, kToCodes);
    const ChannelQuantizer inside = channel_quantizer(scale, zero_point, qmax, kToNeighbours);
    const int step = static_cast<int>(random() % (qmax + 5)) - zero_point - 2;
    const float tie = static_cast<float>((step + 0.5) * static_cast<double>(scale));
    for (const float x : {std::nextafter(tie, -INFINITY), tie, std::nextafter(tie, INFINITY)}) {
      const float want = fake_quantize_value(x, scale, bounds.lo, bounds.hi);
      const float found = fake_quantize_value(x, to_codes);
      if (want == found &&
          inside_range(x, scale, bounds.lo, bounds.hi) == inside_range(x, inside, bounds))
        continue;
      std::printf("%a over %a: %a, not %a\n", x, scale, found, want);
      std::exit(1);
    }
  }
}

int main() {
  check_reciprocals();
  check_divisions<FastDivide, uint32_t>(31);
  check_divisions<WideDivide, int64_t>(63);
  check_quantizers();
}
