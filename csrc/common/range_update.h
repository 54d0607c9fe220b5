// How a batch moves the range of an activation, once, for host and device.
//
//   n        = num_batches + 1
//   rate     = (1 - m) / (1 - m^n) = expm1(log m) / expm1(n log m)       1 where m = 0
//   running += rate (end - running)                                      both ends, in float64
//   scale, zero_point = qparams_from_range(running_min, running_max)
//
// After n batches batch i weighs m^(n - i), divided by the sum of those weights. The rate is a
// small difference: 1 - m^n would lose the digits of it where m is near 1. Compile without
// floating-point contraction.
#ifndef ADADFQ_COMMON_RANGE_UPDATE_H_
#define ADADFQ_COMMON_RANGE_UPDATE_H_

#include <cmath>
#include <cstdint>

#include "ends.h"
#include "quantizer.h"

namespace adadfq {

// State of an activation range, one value each.
struct RangeState {
  float* running_min;
  float* running_max;
  int64_t* num_batches;
  float* scale;
  int32_t* zero_point;
};

// What the rate takes of the momentum, in 0..1 without 1.
struct Momentum {
  double log;         // -infinity for 0
  double complement;  // m - 1
};

inline Momentum momentum_of(double momentum) {
  const double log = std::log(momentum);
  return {log, std::expm1(log)};
}

// Of batch n = 1, 2, ...
ADADFQ_HD double update_rate(const Momentum& momentum, int64_t n) {
  return momentum.complement / expm1(momentum.log * static_cast<double>(n));
}

ADADFQ_HD float moved_end(float running, float end, double rate) {
  const double past = static_cast<double>(running);
  return static_cast<float>(past + rate * (static_cast<double>(end) - past));
}

// All of an update that does not wait for the batch.
struct RangeUpdate {
  float running_min;
  float running_max;
  int64_t num_batches;
  double rate;
};

ADADFQ_HD RangeUpdate next_update(const RangeState& state, const Momentum& momentum) {
  const int64_t n = *state.num_batches + 1;
  return {*state.running_min, *state.running_max, n, update_rate(momentum, n)};
}

// Moves the range by the ends of a batch.
ADADFQ_HD void finish_update(const RangeState& state, const RangeUpdate& update, const Ends& batch,
                             int bits) {
  const float lo = moved_end(update.running_min, batch.lo, update.rate);
  const float hi = moved_end(update.running_max, batch.hi, update.rate);
  const QParams q = qparams_from_range(lo, hi, bits);
  *state.num_batches = update.num_batches;
  *state.running_min = lo;
  *state.running_max = hi;
  *state.scale = q.scale;
  *state.zero_point = q.zero_point;
}

}  // namespace adadfq

#endif  // ADADFQ_COMMON_RANGE_UPDATE_H_
