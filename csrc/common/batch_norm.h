// The arithmetic of matching batch statistics with those of a BatchNorm, once, for host and device;
// see csrc/cuda/bn_match.cu for the formulas. Compile without floating-point contraction.
#ifndef ADADFQ_COMMON_BATCH_NORM_H_
#define ADADFQ_COMMON_BATCH_NORM_H_

#include <cmath>

#include "quantizer.h"

namespace adadfq {

// weight / sqrt(running_var + eps), in double and then rounded: square roots in float are not
// rounded alike everywhere. Without a weight it is 1.
ADADFQ_HD float batch_norm_slope(float running_var, float weight, double eps) {
  const double slope = 1.0 / sqrt(static_cast<double>(running_var) + eps);
  return static_cast<float>(static_cast<double>(weight) * slope);
}

// Subtracting first keeps the digits of a channel whose mean dwarfs its deviation. Without a bias
// it is -0, which changes nothing when added.
ADADFQ_HD float batch_norm(float x, float running_mean, float slope, float bias) {
  return (x - running_mean) * slope + bias;
}

// `value`, or 0 where it is not finite: what sums are taken about must be.
ADADFQ_HD float finite_or_zero(float value) {
  const float largest = 3.40282347e+38f;
  return value >= -largest && value <= largest ? value : 0.0f;
}

// Sums of x - origin and of its squares.
struct SumsAbout {
  double sum;
  double squares;
};

// Those of `count` values about `origin`, from sums about `pivot`.
ADADFQ_HD SumsAbout moved_sums(float sum, float squares, int count, float pivot, float origin) {
  const double by = static_cast<double>(pivot) - static_cast<double>(origin);
  const double first = static_cast<double>(sum), all = static_cast<double>(count) * by;
  return {first + all, static_cast<double>(squares) + (2.0 * first + all) * by};
}

// Mean and biased variance.
struct Moments {
  double mean;
  double var;
};

ADADFQ_HD Moments moments(SumsAbout sums, float origin, double inverse_count) {
  const double offset = sums.sum * inverse_count;
  const double var = sums.squares * inverse_count - offset * offset;
  return {static_cast<double>(origin) + offset, var < 0.0 ? 0.0 : var};
}

// A channel's share of the loss.
ADADFQ_HD double moments_distance(Moments found, float running_mean, float running_var) {
  const double mean = found.mean - static_cast<double>(running_mean);
  const double var = found.var - static_cast<double>(running_var);
  return mean * mean + var * var;
}

// dL/dx = shift + slope (x - mean).
struct MatchGradient {
  float shift;
  float slope;
  float mean;
};

// factor: dL/dloss 2 / (C n). What rounding the mean to float leaves out goes to the shift: it may
// be much of the deviation.
ADADFQ_HD MatchGradient match_gradient(Moments found, float running_mean, float running_var,
                                       double factor) {
  const float mean = static_cast<float>(found.mean);
  const double slope = factor * 2.0 * (found.var - static_cast<double>(running_var));
  const double shift = factor * (found.mean - static_cast<double>(running_mean)) +
                       slope * (static_cast<double>(mean) - found.mean);
  return {static_cast<float>(shift), static_cast<float>(slope), mean};
}

ADADFQ_HD float match_gradient_at(float x, MatchGradient gradient) {
  return gradient.shift + gradient.slope * (x - gradient.mean);
}

}  // namespace adadfq

#endif  // ADADFQ_COMMON_BATCH_NORM_H_
