// What follows an affine map: residual, activation.
#ifndef ADADFQ_COMMON_ACTIVATION_H_
#define ADADFQ_COMMON_ACTIVATION_H_

#include "division.h"
#include "quantizer.h"

namespace adadfq {

// Bounds of an activation; infinite where there is none.
struct ActBounds {
  float lo;
  float hi;
};

// act: 0 none, 1 ReLU, 2 ReLU6, as in adadfq/ops/reference.py.
inline ActBounds act_bounds(int act) {
  const float infinity = __builtin_huge_valf();
  return {act == 0 ? -infinity : 0.0f, act == 2 ? 6.0f : infinity};
}

// Where the activation is flat: at u <= lo and u >= hi. NaN: nowhere on that side.
inline ActBounds flat_bounds(int act) {
  const float nowhere = __builtin_nanf("");
  return {act == 0 ? nowhere : 0.0f, act == 2 ? 6.0f : nowhere};
}

ADADFQ_HD float affine(float x, float scale, float shift) { return x * scale + shift; }

// NaN stays.
ADADFQ_HD float activation(float u, ActBounds bounds) {
  return clamp_keep_nan(u, bounds.lo, bounds.hi);
}

// The quantiser of activation(u), for u: multiplying by a power of two and clamping are monotone,
// so the activation's bounds become the quantiser's.
ADADFQ_HD ChannelQuantizer with_activation(ChannelQuantizer q, ActBounds bounds) {
  const float lo = clamp_keep_nan(bounds.lo * q.by.factor, q.lo, q.hi),
              hi = clamp_keep_nan(bounds.hi * q.by.factor, q.lo, q.hi);
  return {q.by, q.scale, lo, hi};
}

// What arrives before the activation of the gradient `grad` behind it.
ADADFQ_HD float activation_gradient(float grad, float u, ActBounds flat) {
  return (u <= flat.lo) | (u >= flat.hi) ? 0.0f : grad;
}

}  // namespace adadfq

#endif  // ADADFQ_COMMON_ACTIVATION_H_
