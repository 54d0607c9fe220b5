// The arithmetic of training-mode BatchNorm and LeakyReLU, once, for host and device; see
// csrc/cpu/batch_norm_act.cpp for the formulas. Compile without floating-point contraction.
#ifndef ADADFQ_COMMON_BATCH_NORM_ACT_H_
#define ADADFQ_COMMON_BATCH_NORM_ACT_H_

#include <cmath>

#include "quantizer.h"

namespace adadfq {

// u = (x - mean) slope + shift, all float; `mean` is a channel's batch mean, rounded.
struct NormMap {
  float slope;
  float shift;
};

// 1 / sqrt(var + eps), in double: square roots in float are not rounded alike everywhere.
ADADFQ_HD double inverse_deviation(double var, double eps) { return 1.0 / sqrt(var + eps); }

// What rounding the mean to float leaves out goes to the shift: it may be much of the deviation.
ADADFQ_HD NormMap norm_map(double mean, double inverse, double weight, double bias) {
  const double slope = weight * inverse;
  const double left_out = static_cast<double>(static_cast<float>(mean)) - mean;
  return {static_cast<float>(slope), static_cast<float>(bias + slope * left_out)};
}

// u where u > 0, else negative_slope u; NaN stays.
ADADFQ_HD float leaky_relu(float u, float negative_slope) {
  const float scaled = negative_slope * u;
  return u > 0.0f ? u : scaled;
}

// What arrives before the activation of the gradient `grad` behind it.
ADADFQ_HD float leaky_relu_gradient(float grad, float u, float negative_slope) {
  const float scaled = negative_slope * grad;
  return u > 0.0f ? grad : scaled;
}

// Sums over the elements of a channel: of g, and of g times (x - mean) / deviation. `sum_product`
// is that of g and x - float(mean).
struct NormSums {
  double g;
  double g_hat;
};

ADADFQ_HD NormSums norm_sums(double sum, double sum_product, double mean, double inverse) {
  const double left_out = static_cast<double>(static_cast<float>(mean)) - mean;
  return {sum, inverse * (sum_product + left_out * sum)};
}

// The part of the gradient that came through the statistics: offset + factor (x - mean).
struct StatisticsGradient {
  float offset;
  float factor;
};

// weighted: sums over samples of weight times a channel's NormSums; count: elements of the channel.
ADADFQ_HD StatisticsGradient statistics_gradient(NormSums weighted, double mean, double inverse,
                                                 double count) {
  const double left_out = static_cast<double>(static_cast<float>(mean)) - mean;
  const double factor = -inverse * inverse * (weighted.g_hat / count);
  const double offset = factor * left_out - inverse * (weighted.g / count);
  return {static_cast<float>(offset), static_cast<float>(factor)};
}

}  // namespace adadfq

#endif  // ADADFQ_COMMON_BATCH_NORM_ACT_H_
