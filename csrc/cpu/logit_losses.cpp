// Losses on the disagreement d = t - q and the agreement a = t + q of two [B, K] tensors of logits.
//
//   p = softmax(d), D = log K - H(p)          how far row b is from agreement, 0 <= D <= log K
//   dD/dd = p (log(K p) - D)
//   H' = 1 - D / max_b D                      (H - min H) / (log K - min H)
//   margin_loss:           mean max(lambda_l - H', 0) + mean max(H' - lambda_u, 0)
//                          + beta (alpha_ds mean CE(d, y) + alpha_as mean CE(a, y))
//   entropy_distillation:  -T^2 mean_b H(softmax(d / T)) = T^2 (mean_b D - log K)
//
// D is computed from logits c centred on their mean, as sum p c - log mean exp c: taking H from log
// K would lose every digit where teacher and student nearly agree. Everything is in double. Rows
// are independent and summed in order, so the result does not depend on the number of threads.
//
// Bytes an element, float32: 16 (two logits in, two gradients out), 12 for the distillation loss;
// the time goes to exp, one or two an element.
//
// Test: python -m pytest tests/test_native_cpu.py -k "margin or distillation"
// Time: python -m benchmarks ops --ops margin_loss,entropy_distillation
#include "logit_losses.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch_dtype.h"
#include "parallel.h"

namespace adadfq {
namespace {

// Where every D is below this many nats the batch agrees completely: H' is 1 and its gradient
// bounded.
constexpr double kFullAgreement = 1e-6;
// An element costs about as much as this many elements of an elementwise kernel.
constexpr int64_t kElementCost = 8;

// Like std::max and std::min, but a NaN on the left stays.
double at_least(double v, double lo) { return v < lo ? lo : v; }
double at_most(double v, double hi) { return v > hi ? hi : v; }

// The largest value; NaN if there is one.
double largest_of(const double* values, int64_t n) {
  double largest = values[0];
  for (int64_t i = 1; i < n; ++i) {
    if (values[i] > largest || std::isnan(values[i])) largest = values[i];
    if (std::isnan(largest)) break;
  }
  return largest;
}

// Replaces logits by log softmax, and writes the softmax to p.
void log_softmax(double* logits, double* p, int64_t classes) {
  const double peak = largest_of(logits, classes);
  double sum = 0;
  for (int64_t k = 0; k < classes; ++k) sum += p[k] = std::exp(logits[k] - peak);
  const double log_sum = peak + std::log(sum);
  for (int64_t k = 0; k < classes; ++k) {
    logits[k] -= log_sum;
    p[k] /= sum;
  }
}

// As log_softmax; returns D = log K - H(p).
double entropy_deficit(double* logits, double* p, int64_t classes) {
  const double log_classes = std::log(static_cast<double>(classes));
  double mean = 0;
  for (int64_t k = 0; k < classes; ++k) mean += logits[k];
  mean /= static_cast<double>(classes);
  for (int64_t k = 0; k < classes; ++k) logits[k] -= mean;
  const double peak = largest_of(logits, classes);
  double sum = 0, weighted = 0, log_mean_exp, log_sum;
  if (peak < 1) {  // expm1 and log1p keep the digits of small logits
    double excess = 0;
    for (int64_t k = 0; k < classes; ++k) {
      const double e = std::expm1(logits[k]);
      p[k] = 1 + e;
      excess += e;
      sum += p[k];
      weighted += p[k] * logits[k];
    }
    log_mean_exp = std::log1p(excess / static_cast<double>(classes));
    log_sum = log_mean_exp + log_classes;
  } else {
    for (int64_t k = 0; k < classes; ++k) {
      p[k] = std::exp(logits[k] - peak);
      sum += p[k];
      weighted += p[k] * logits[k];
    }
    log_sum = peak + std::log(sum);
    log_mean_exp = log_sum - log_classes;
  }
  for (int64_t k = 0; k < classes; ++k) {
    logits[k] -= log_sum;
    p[k] /= sum;
  }
  return at_most(at_least(weighted / sum - log_mean_exp, 0.0), log_classes);
}

template <typename T>
double value(const T* x, int64_t i) {
  return static_cast<double>(to_float(x[i]));
}

template <typename T>
T rounded(double x) {
  return from_float<T>(static_cast<float>(x));
}

template <typename T>
void margin_loss_of(const T* teacher, const T* student, const int64_t* labels, float* losses,
                    float* h_prime, T* grad_teacher, T* grad_student, int64_t batch,
                    int64_t classes, const MarginLossOptions& o, int threads) {
  const int64_t n = batch * classes;
  const double rows = static_cast<double>(batch);
  const double log_classes = std::log(static_cast<double>(classes));
  std::vector<double> log_p_ds(n), p_ds(n), log_p_as(n), p_as(n), deficit(batch), h(batch);

  parallel_for(batch, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = b * classes; i < (b + 1) * classes; ++i) {
        log_p_ds[i] = value(teacher, i) - value(student, i);
        log_p_as[i] = value(teacher, i) + value(student, i);
      }
      deficit[b] = entropy_deficit(&log_p_ds[b * classes], &p_ds[b * classes], classes);
      log_softmax(&log_p_as[b * classes], &p_as[b * classes], classes);
    }
  });

  const double largest = largest_of(deficit.data(), batch);
  const double largest_floor = at_least(largest, kFullAgreement);
  double margin = 0, disagreement = 0, agreement = 0, through_largest = 0;
  int64_t ties = 0;
  std::vector<double> grad_deficit(batch);
  for (int64_t b = 0; b < batch; ++b) {
    h[b] = 1 - deficit[b] / largest_floor;
    h_prime[b] = static_cast<float>(h[b]);
    margin += at_least(o.lambda_l - h[b], 0.0) + at_least(h[b] - o.lambda_u, 0.0);
    disagreement -= log_p_ds[b * classes + labels[b]];
    agreement -= log_p_as[b * classes + labels[b]];
    const double grad_h = (double(h[b] > o.lambda_u) - double(h[b] < o.lambda_l)) / rows;
    grad_deficit[b] = -grad_h / largest_floor;
    through_largest += grad_h * deficit[b];
    ties += deficit[b] == largest;
  }
  if (!o.detach_min && largest >= kFullAgreement) {
    // The batch minimum of H is the maximum of D; ties share its gradient evenly.
    through_largest /= largest_floor * largest_floor * static_cast<double>(ties);
    for (int64_t b = 0; b < batch; ++b) {
      if (deficit[b] == largest) grad_deficit[b] += through_largest;
    }
  }
  margin /= rows;
  disagreement /= rows;
  agreement /= rows;
  losses[0] =
      static_cast<float>(margin + o.beta * (o.alpha_ds * disagreement + o.alpha_as * agreement));
  losses[1] = static_cast<float>(margin);
  losses[2] = static_cast<float>(disagreement);
  losses[3] = static_cast<float>(agreement);

  const double weight_ds = o.beta * o.alpha_ds / rows, weight_as = o.beta * o.alpha_as / rows;
  parallel_for(batch, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t k = 0; k < classes; ++k) {
        const int64_t i = b * classes + k;
        const double one_hot = k == labels[b] ? 1.0 : 0.0;
        const double slope = p_ds[i] * (log_p_ds[i] + log_classes - deficit[b]);
        const double ds = grad_deficit[b] * slope + weight_ds * (p_ds[i] - one_hot);
        const double as = weight_as * (p_as[i] - one_hot);
        grad_teacher[i] = rounded<T>(as + ds);
        grad_student[i] = rounded<T>(as - ds);
      }
    }
  });
}

template <typename T>
void entropy_distillation_of(const T* teacher, const T* student, float* loss, T* grad_student,
                             int64_t batch, int64_t classes, double temperature, int threads) {
  const double log_classes = std::log(static_cast<double>(classes));
  const double weight = -temperature / static_cast<double>(batch);
  std::vector<double> log_p(batch * classes), p(batch * classes), deficit(batch);
  parallel_for(batch, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * classes, last = first + classes;
      for (int64_t i = first; i < last; ++i) {
        log_p[i] = (value(teacher, i) - value(student, i)) / temperature;
      }
      deficit[b] = entropy_deficit(&log_p[first], &p[first], classes);
      for (int64_t i = first; i < last; ++i) {
        grad_student[i] = rounded<T>(weight * p[i] * (log_p[i] + log_classes - deficit[b]));
      }
    }
  });
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b) sum += deficit[b];
  *loss = static_cast<float>(temperature * temperature *
                             (sum / static_cast<double>(batch) - log_classes));
}

}  // namespace

int64_t first_bad_label(const int64_t* labels, int64_t batch, int64_t classes) {
  for (int64_t b = 0; b < batch; ++b) {
    if (labels[b] < 0 || labels[b] >= classes) return b;
  }
  return -1;
}

void margin_loss(const void* teacher, const void* student, const int64_t* labels, float* losses,
                 float* h_prime, void* grad_teacher, void* grad_student, int64_t batch,
                 int64_t classes, const MarginLossOptions& options, DType dtype, int threads) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    margin_loss_of(static_cast<const T*>(teacher), static_cast<const T*>(student), labels, losses,
                   h_prime, static_cast<T*>(grad_teacher), static_cast<T*>(grad_student), batch,
                   classes, options, useful_threads(batch * classes * kElementCost, threads));
  });
}

void entropy_distillation(const void* teacher, const void* student, float* loss, void* grad_student,
                          int64_t batch, int64_t classes, double temperature, DType dtype,
                          int threads) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    entropy_distillation_of(static_cast<const T*>(teacher), static_cast<const T*>(student), loss,
                            static_cast<T*>(grad_student), batch, classes, temperature,
                            useful_threads(batch * classes * kElementCost, threads));
  });
}

}  // namespace adadfq
