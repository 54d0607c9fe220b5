// The arithmetic of the losses on the disagreement d = t - q and the agreement a = t + q of two
// [B, K] tensors of logits, once, for host and device.
//
//   p = softmax(d), D = log K - H(p)           how far a row is from agreement, 0 <= D <= log K
//   y = log(K p) - D, dD/dd = p y
//   H' = 1 - D / max_b D                       (H - min H) / (log K - min H)
//   margin_loss:           mean max(lambda_l - H', 0) + mean max(H' - lambda_u, 0)
//                          + beta (alpha_ds mean CE(d, label) + alpha_as mean CE(a, label))
//   entropy_distillation:  -T^2 mean_b H(softmax(d / T)) = T^2 (mean_b D - log K)
//
// With x = d - max d, D is sum e^x x / sum e^x - log(sum e^x / K), in double: near agreement both
// terms are small and D keeps an absolute error of about 1e-15, where 1e-6 counts as agreement.
// Everything else needs float's exponential only, behind differences in double, for the logits may
// all be large and alike: the gradients, and sum e^(a - max a), in which the largest term is 1
// exactly and is added to the others in double. That leaves one exponential in double an element.
//
// Every comparison lets NaN through. Compile without contraction, reassociation or finite-math
// assumptions.
#ifndef ADADFQ_COMMON_LOGIT_LOSSES_H_
#define ADADFQ_COMMON_LOGIT_LOSSES_H_

#include <cmath>

#include "quantizer.h"

namespace adadfq {

// Where every D is below this many nats the batch agrees completely: H' is 1 and its gradient
// bounded. The same number is in adadfq/ops/reference.py.
constexpr double kFullAgreement = 1e-6;
// Below every sum and difference of float numbers, but finite.
constexpr double kLowestPeak = -1e300;
// Stands for an element that does not exist, relative to its peak: e^-700 adds nothing to a sum of
// 1 or more, and exponentials of less take longer.
constexpr double kAbsentLogit = -700;

// 1 / x to about a last place, for x in float's range of normal numbers: double's division is a
// call of a function on a GPU.
ADADFQ_HD double reciprocal(double x) {
  double r = static_cast<double>(1.0f / static_cast<float>(x));
  r *= fma(-x, r, 2.0);
  return r * fma(-x, r, 2.0);
}

// Sums over a row's d, or a part of it: total of e^x and weighted of e^x x, x = d - peak.
struct DisagreementSums {
  double peak = kLowestPeak, total = 0, weighted = 0;

  // Passes over NaN, which enters the sums.
  ADADFQ_HD void raise_peak(double to) {
    if (!(to > peak)) return;
    const double drop = peak - to, shrink = exp(drop);
    weighted = shrink * (weighted + total * drop);
    total *= shrink;
    peak = to;
  }

  ADADFQ_HD void add(double d, bool exists) {
    const double x = exists ? d - peak : kAbsentLogit, e = exp(x);
    total += e;
    weighted = fma(e, x, weighted);  // 0 * -infinity is NaN, as it should be
  }
};

// The same for a row's a.
struct AgreementSums {
  double peak = kLowestPeak, total = 0;

  ADADFQ_HD void raise_peak(double to) {
    if (!(to > peak)) return;
    total *= static_cast<double>(expf(static_cast<float>(peak - to)));
    peak = to;
  }

  ADADFQ_HD void add(double a, bool exists) {
    total += static_cast<double>(expf(static_cast<float>(exists ? a - peak : kAbsentLogit)));
  }
};

struct Deficit {
  double value;  // D
  double shift;  // log(K p) = d - shift
};

ADADFQ_HD Deficit deficit_of(const DisagreementSums& sums, double log_classes) {
  const double log_mean = log(sums.total) - log_classes;
  double value = sums.weighted * reciprocal(sums.total) - log_mean;
  value = value < 0.0 ? 0.0 : value;
  value = value > log_classes ? log_classes : value;
  return {value, sums.peak + log_mean};
}

// What margin_loss keeps of a row.
struct RowValues {
  double deficit;             // D
  double shift_ds;            // log(K p) = d - shift_ds
  double shift_as;            // log softmax(a) = a - shift_as
  double label_ds, label_as;  // both at the label; NaN where that is no class
};

// teacher, student: the logits at the label, NaN where that is no class.
ADADFQ_HD RowValues row_values(const DisagreementSums& ds, const AgreementSums& as,
                               double log_classes, double teacher, double student) {
  const Deficit deficit = deficit_of(ds, log_classes);
  const double shift_as = as.peak + log(as.total);
  // -infinity in d makes D NaN but might leave this a number: no loss is to look sound then.
  const double label_ds = teacher - student - deficit.shift + 0.0 * deficit.value;
  // The peak goes first, so that the label's own loss keeps its digits where it is all but certain.
  const double label_as = teacher + student - as.peak - log(as.total);
  return {deficit.value, deficit.shift, shift_as, label_ds, label_as};
}

struct MarginLossSettings {
  double lambda_l;
  double lambda_u;
  double alpha_ds;
  double alpha_as;
  double beta;
  bool detach_min;
};

struct LargestDeficit {
  double value;  // max_b D
  double floor;  // at least kFullAgreement
  double slope;  // 1 / floor
};

ADADFQ_HD LargestDeficit largest_deficit(double value) {
  const double floor = value < kFullAgreement ? kFullAgreement : value;
  return {value, floor, reciprocal(floor)};
}

// max(a, b), NaN where one is.
ADADFQ_HD double larger_or_nan(double a, double b) { return b > a || b != b ? b : a; }

// The largest D's H' is 0, and no H' is less, whatever the product's rounding.
ADADFQ_HD double h_prime_of(double deficit, const LargestDeficit& largest) {
  const double ratio = deficit * largest.slope;
  return deficit == largest.floor || ratio > 1.0 ? 0.0 : 1.0 - ratio;
}

// d L_margin / dH', per_row = 1 / B.
ADADFQ_HD double h_prime_gradient(double h, const MarginLossSettings& settings, double per_row) {
  return h > settings.lambda_u ? per_row : h < settings.lambda_l ? -per_row : 0.0;
}

// Sums over the batch.
struct BatchSums {
  double through_largest = 0;  // of dL/dH' D
  double ties = 0;             // rows with the largest D
  double margin = 0;
  double label_ds = 0, label_as = 0;

  ADADFQ_HD void add_deficit(double deficit, const LargestDeficit& largest,
                             const MarginLossSettings& settings, double per_row) {
    const double h = h_prime_of(deficit, largest);
    const double below = settings.lambda_l - h, above = h - settings.lambda_u;
    margin += (below < 0.0 ? 0.0 : below) + (above < 0.0 ? 0.0 : above);
    through_largest += h_prime_gradient(h, settings, per_row) * deficit;
    ties += deficit == largest.value ? 1.0 : 0.0;
  }
};

struct LossValues {
  double total, margin, disagreement, agreement;
};

ADADFQ_HD LossValues loss_values(const BatchSums& sums, const MarginLossSettings& settings,
                                 double per_row, double log_classes) {
  // Against a uniform guess: log p = log(K p) - log K.
  const double disagreement = log_classes - sums.label_ds * per_row;
  const double agreement = 0.0 - sums.label_as * per_row;
  // NaN where a label is no class.
  const double margin = sums.margin * per_row + 0.0 * agreement;
  const double total =
      margin + settings.beta * (settings.alpha_ds * disagreement + settings.alpha_as * agreement);
  return {total, margin, disagreement, agreement};
}

// What max_b D adds to dL/dD of a row that has it: the batch minimum of H is the maximum of D, and
// ties share its gradient evenly.
ADADFQ_HD double gradient_through_largest(const BatchSums& sums, const LargestDeficit& largest,
                                          const MarginLossSettings& settings) {
  if (settings.detach_min || !(largest.value >= kFullAgreement)) return 0.0;
  return sums.through_largest * largest.slope * largest.slope * reciprocal(sums.ties);
}

// dL/dD of a row.
ADADFQ_HD double deficit_gradient(double deficit, double grad_h, const LargestDeficit& largest,
                                  double through_largest) {
  return (deficit == largest.value ? through_largest : 0.0) - grad_h * largest.slope;
}

// The gradients of a row's elements. Its weights are
//   dL/dd = e^(d - shift_ds) (deficit y + ds), dL/da = as softmax(a), y = d - shift_ds
// but at the label, where p - 1 would cancel: e^y deficit y + label_ds, label_as.
struct RowGradient {
  double shift_ds, shift_as;
  float deficit, ds, as, label_ds, label_as;
};

struct Gradients {
  float teacher, student;
};

ADADFQ_HD RowGradient row_gradient(const RowValues& row, double grad_deficit, double weight_ds,
                                   double weight_as, double log_classes) {
  const double scale = exp(row.deficit - log_classes);  // p = scale e^y
  const float log_p_ds = static_cast<float>(row.label_ds - log_classes);
  const float log_p_as = static_cast<float>(row.label_as);
  return {row.shift_ds + row.deficit,
          row.shift_as,
          static_cast<float>(scale * grad_deficit),
          static_cast<float>(scale * weight_ds),
          static_cast<float>(weight_as),
          static_cast<float>(weight_ds) * expm1f(log_p_ds),
          static_cast<float>(weight_as) * expm1f(log_p_as)};
}

// y in float; finite, so that where p is 0 the product is.
ADADFQ_HD float centred_log_p(double d, double shift) {
  const float y = static_cast<float>(d - shift);
  return y < -1000.0f ? -1000.0f : y;
}

ADADFQ_HD Gradients element_gradients(double d, double a, bool is_label, const RowGradient& row) {
  const float y = centred_log_p(d, row.shift_ds), e = expf(y);
  const float through_deficit = row.deficit * y;
  const float ds = is_label ? e * through_deficit + row.label_ds : e * (through_deficit + row.ds);
  const float as = is_label ? row.label_as : row.as * expf(static_cast<float>(a - row.shift_as));
  return {as + ds, as - ds};
}

// entropy_distillation's, with respect to the student's logit; weight = -T / B e^(D - log K), and
// d is (t - q) / T.
ADADFQ_HD float distillation_gradient(double d, double shift, float weight) {
  const float y = centred_log_p(d, shift);
  return weight * (expf(y) * y);
}

}  // namespace adadfq

#endif  // ADADFQ_COMMON_LOGIT_LOSSES_H_
