// Losses on the disagreement d = t - q and the agreement a = t + q of two [B, K] tensors of logits.
//
//   p = softmax(d), D = log K - H(p)          how far row b is from agreement, 0 <= D <= log K
//   y = log(K p) - D, dD/dd = p y
//   H' = 1 - D / max_b D                      (H - min H) / (log K - min H)
//   margin_loss:           mean max(lambda_l - H', 0) + mean max(H' - lambda_u, 0)
//                          + beta (alpha_ds mean CE(d, label) + alpha_as mean CE(a, label))
//   entropy_distillation:  -T^2 mean_b H(softmax(d / T)) = T^2 (mean_b D - log K)
//
// With x = d - max d, D is sum e^x x / sum e^x - log(sum e^x / K), in double: near agreement both
// terms are small and D keeps an absolute error of about 1e-15, where 1e-6 counts as agreement. A
// gradient needs float only, once the logits are subtracted, which may all be large and alike. A
// row is summed in fixed lanes and the batch in order, so the result does not depend on the number
// of threads.
//
// margin_loss takes two passes, as max_b D enters every gradient. The second computes p anew from
// the row's log sum exp, which takes no memory of the tensor's size.
//
// Bytes an element, float32: 24 (two logits in, twice; two gradients out), distillation 12 (its
// second look at a row comes from the cache). Two exp in double and two in float, distillation one
// of each, take most of the time.
//
// Test: python -m pytest tests/test_native_cpu.py -k "margin or distillation"
// Time: python -m benchmarks ops --ops margin_loss,entropy_distillation
#include "logit_losses.h"

#include <cmath>
#include <limits>
#include <vector>

#include "dispatch_dtype.h"
#include "parallel.h"
#include "target_clones.h"
#include "vector_exp.h"

namespace adadfq {
namespace {

// Where every D is below this many nats the batch agrees completely: H' is 1 and its gradient
// bounded.
constexpr double kFullAgreement = 1e-6;
// An element costs about as much as this many elements of an elementwise kernel.
constexpr int64_t kElementCost = 4;
constexpr int kLanes = 32;         // sums of a row; more than GCC unrolls before it vectorises
constexpr int64_t kVector = 16;    // short rows are padded to a multiple
constexpr int64_t kTile = 256;     // gradients of a row; buffers that stay in the L1 cache
constexpr double kAbsent = -1000;  // pads logits relative to their peak: e^kAbsent is 0

// A NaN on the left stays, unlike with std::max and std::min.
template <typename V>
ADADFQ_INLINE V at_least(V v, V lo) {
  return v < lo ? lo : v;
}
template <typename V>
ADADFQ_INLINE V at_most(V v, V hi) {
  return v > hi ? hi : v;
}

ADADFQ_INLINE double sum_of(double* lanes) {
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int j = 0; j < n; ++j) lanes[j] += lanes[j + n];
  }
  return lanes[0];
}

ADADFQ_INLINE double largest_of(float* lanes) {
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int j = 0; j < n; ++j) lanes[j] = at_least(lanes[j], lanes[j + n]);
  }
  return static_cast<double>(lanes[0]);
}

ADADFQ_INLINE const float* as_floats(const float* x, int64_t, float*) { return x; }

template <typename T>
ADADFQ_INLINE const float* as_floats(const T* ADADFQ_RESTRICT x, int64_t n,
                                     float* ADADFQ_RESTRICT buffer) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(x[i]);
  return buffer;
}

// Where 16-bit rows are converted, once a pass.
template <typename T>
std::vector<float> row_buffer(int64_t classes) {
  return std::vector<float>(sizeof(T) == sizeof(float) ? 0 : 2 * classes);
}

// A row of logits and how its d and a are scaled and shifted.
struct Logits {
  const float* ADADFQ_RESTRICT teacher;
  const float* ADADFQ_RESTRICT student;
  double slope_ds, shift_ds, shift_as;

  template <typename T>
  ADADFQ_INLINE Logits(const T* t, const T* q, int64_t classes, std::vector<float>& buffer,
                       double slope = 1, double ds = 0, double as = 0)
      : teacher(as_floats(t, classes, buffer.data())),
        student(as_floats(q, classes, buffer.data() + buffer.size() / 2)),
        slope_ds(slope),
        shift_ds(ds),
        shift_as(as) {}

  ADADFQ_INLINE double ds(int64_t i) const {
    return (static_cast<double>(teacher[i]) - static_cast<double>(student[i])) * slope_ds -
           shift_ds;
  }
  ADADFQ_INLINE double as(int64_t i) const {
    return static_cast<double>(teacher[i]) + static_cast<double>(student[i]) - shift_as;
  }
};

// What the batch and the gradient need of a row.
struct Row {
  double deficit;             // D
  double shift_ds;            // y = d / T - shift_ds
  double scale_ds;            // p = scale_ds e^y
  double shift_as;            // softmax(a) = e^(a - shift_as)
  double log_p_ds, log_p_as;  // of the label
};

ADADFQ_INLINE void raise_peaks(const Logits& row, int64_t i, int64_t n, float* ADADFQ_RESTRICT ds,
                               float* ADADFQ_RESTRICT as) {
  for (int64_t j = 0; j < n; ++j) {
    const float t = row.teacher[i + j], q = row.student[i + j];
    ds[j] = t - q > ds[j] ? t - q : ds[j];
    as[j] = t + q > as[j] ? t + q : as[j];
  }
}

// Shifts d and a by their peak rounded to float, which is as good. NaN is passed over: the sums
// take it in.
ADADFQ_INLINE void shift_by_peaks(Logits& row, int64_t classes) {
  float ds[kLanes], as[kLanes];
  for (int j = 0; j < kLanes; ++j) ds[j] = as[j] = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes) raise_peaks(row, i, kLanes, ds, as);
  raise_peaks(row, i, classes - i, ds, as);
  row.shift_ds = largest_of(ds) * row.slope_ds;
  row.shift_as = largest_of(as);
}

// d and a of elements i..i + n, padded to whole vectors; returns that length.
template <bool kAgreement, typename Value>
ADADFQ_INLINE int64_t load(const Logits& row, int64_t i, int64_t n, Value* ADADFQ_RESTRICT ds,
                           Value* ADADFQ_RESTRICT as) {
  for (int64_t j = 0; j < n; ++j) {
    ds[j] = static_cast<Value>(row.ds(i + j));
    if (kAgreement) as[j] = static_cast<Value>(row.as(i + j));
  }
  const int64_t padded = (n + kVector - 1) / kVector * kVector;
  for (int64_t j = n; j < padded; ++j) ds[j] = as[j] = static_cast<Value>(kAbsent);
  return padded;
}

struct Sums {
  double ds[kLanes] = {0};        // e^x
  double weighted[kLanes] = {0};  // e^x x
  double as[kLanes] = {0};
};

template <bool kAgreement>
ADADFQ_INLINE void add(const double* ADADFQ_RESTRICT ds, const double* ADADFQ_RESTRICT as,
                       int64_t n, Sums& sums) {
  for (int64_t j = 0; j < n; ++j) {
    const double e = vector_exp(ds[j]);
    sums.ds[j] += e;
    sums.weighted[j] += e * ds[j];  // 0 * -infinity is NaN, as it should be
  }
  if (kAgreement) {
    for (int64_t j = 0; j < n; ++j) sums.as[j] += vector_exp(as[j]);
  }
}

// Leaves the row shifted for its gradient: row.ds() is y, e^row.as() is softmax(a).
template <bool kAgreement>
ADADFQ_INLINE Row summarise(Logits& row, int64_t classes, double log_classes, int64_t label) {
  shift_by_peaks(row, classes);
  Sums sums;
  double ds[kLanes], as[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes) {
    load<kAgreement>(row, i, kLanes, ds, as);
    add<kAgreement>(ds, as, kLanes, sums);
  }
  if (i < classes) {
    const int64_t n = load<kAgreement>(row, i, classes - i, ds, as);
    add<kAgreement>(ds, as, n, sums);
  }
  Row out{};
  const double sum = sum_of(sums.ds), log_sum = std::log(sum);
  const double log_mean = log_sum - log_classes;
  out.deficit = at_most(at_least(sum_of(sums.weighted) / sum - log_mean, 0.0), log_classes);
  if (kAgreement) {
    const double log_sum_as = std::log(sum_of(sums.as));
    // -infinity in d makes D NaN but might leave this a number: no loss is to look sound then.
    out.log_p_ds = row.ds(label) - log_sum + 0 * out.deficit;
    out.log_p_as = row.as(label) - log_sum_as;
    out.shift_as = row.shift_as += log_sum_as;
  }
  out.shift_ds = row.shift_ds += log_mean + out.deficit;
  out.scale_ds = vector_exp(out.deficit - log_classes);
  return out;
}

// The gradient is p_ds (deficit y + ds) with respect to d and p_as as with respect to a, less ds
// and as at the label.
struct Weights {
  double deficit, ds, as;
};

template <bool kAgreement, typename T>
ADADFQ_INLINE void gradient_but_label(const Logits& row, int64_t classes, double scale_ds,
                                      const Weights& weights, T* ADADFQ_RESTRICT grad_teacher,
                                      T* ADADFQ_RESTRICT grad_student) {
  const float deficit_weight = static_cast<float>(scale_ds * weights.deficit);
  const float ds_weight = static_cast<float>(scale_ds * weights.ds);
  const float as_weight = static_cast<float>(weights.as);
  float ds[kTile], as[kTile];
  for (int64_t first = 0; first < classes; first += kTile) {
    const int64_t n = at_most(classes - first, kTile);
    const int64_t padded = load<kAgreement>(row, first, n, ds, as);
    for (int64_t i = 0; i < padded; ++i) {
      ds[i] = vector_exp(ds[i]) * (deficit_weight * ds[i] + ds_weight);
      if (kAgreement) as[i] = as_weight * vector_exp(as[i]);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (kAgreement) {
        grad_teacher[first + i] = from_float<T>(as[i] + ds[i]);
        grad_student[first + i] = from_float<T>(as[i] - ds[i]);
      } else {
        grad_student[first + i] = from_float<T>(-ds[i]);
      }
    }
  }
}

template <typename T>
ADADFQ_INLINE void margin_rows_of(const T* teacher, const T* student, const int64_t* labels,
                                  int64_t batch, int64_t classes, Row* rows) {
  const double log_classes = std::log(static_cast<double>(classes));
  std::vector<float> buffer = row_buffer<T>(classes);
  for (int64_t b = 0; b < batch; ++b) {
    Logits row(teacher + b * classes, student + b * classes, classes, buffer);
    rows[b] = summarise<true>(row, classes, log_classes, labels[b]);
  }
}

template <typename T>
ADADFQ_INLINE void margin_gradients_of(const T* teacher, const T* student, const int64_t* labels,
                                       int64_t batch, int64_t classes, const Row* rows,
                                       const double* grad_deficit, double weight_ds,
                                       double weight_as, T* grad_teacher, T* grad_student) {
  std::vector<float> buffer = row_buffer<T>(classes);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t i = b * classes, label = labels[b];
    const Weights weights{grad_deficit[b], weight_ds, weight_as};
    const Logits row(teacher + i, student + i, classes, buffer, 1, rows[b].shift_ds,
                     rows[b].shift_as);
    gradient_but_label<true>(row, classes, rows[b].scale_ds, weights, grad_teacher + i,
                             grad_student + i);
    // In double: p - 1 cancels where the label's class is all but certain.
    const double y = row.ds(label);
    const double p_ds = rows[b].scale_ds * vector_exp(y), p_as = vector_exp(row.as(label));
    const double ds = weights.deficit * p_ds * y + weights.ds * (p_ds - 1);
    const double as = weights.as * (p_as - 1);
    grad_teacher[i + label] = from_float<T>(static_cast<float>(as + ds));
    grad_student[i + label] = from_float<T>(static_cast<float>(as - ds));
  }
}

template <typename T>
ADADFQ_INLINE void distillation_rows_of(const T* teacher, const T* student, int64_t batch,
                                        int64_t classes, double temperature, double weight,
                                        double* deficit, T* grad_student) {
  const double log_classes = std::log(static_cast<double>(classes));
  std::vector<float> buffer = row_buffer<T>(classes);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t i = b * classes;
    Logits row(teacher + i, student + i, classes, buffer, 1 / temperature);
    const Row summary = summarise<false>(row, classes, log_classes, 0);
    gradient_but_label<false>(row, classes, summary.scale_ds, {weight, 0, 0},
                              static_cast<T*>(nullptr), grad_student + i);
    deficit[b] = summary.deficit;
  }
}

}  // namespace

#define ADADFQ_DEFINE(T)                                                                         \
  ADADFQ_CLONES void margin_rows(const T* teacher, const T* student, const int64_t* labels,      \
                                 int64_t batch, int64_t classes, Row* rows) {                    \
    margin_rows_of(teacher, student, labels, batch, classes, rows);                              \
  }                                                                                              \
  ADADFQ_CLONES void margin_gradients(const T* teacher, const T* student, const int64_t* labels, \
                                      int64_t batch, int64_t classes, const Row* rows,           \
                                      const double* grad_deficit, double weight_ds,              \
                                      double weight_as, T* grad_teacher, T* grad_student) {      \
    margin_gradients_of(teacher, student, labels, batch, classes, rows, grad_deficit, weight_ds, \
                        weight_as, grad_teacher, grad_student);                                  \
  }                                                                                              \
  ADADFQ_CLONES void distillation_rows(const T* teacher, const T* student, int64_t batch,        \
                                       int64_t classes, double temperature, double weight,       \
                                       double* deficit, T* grad_student) {                       \
    distillation_rows_of(teacher, student, batch, classes, temperature, weight, deficit,         \
                         grad_student);                                                          \
  }

ADADFQ_DEFINE(float)
ADADFQ_DEFINE(BFloat16)
ADADFQ_DEFINE(Float16)

#undef ADADFQ_DEFINE

namespace {

double largest_deficit(const std::vector<Row>& rows) {
  double largest = rows[0].deficit;
  for (const Row& row : rows) {
    if (row.deficit > largest || std::isnan(row.deficit)) largest = row.deficit;
    if (std::isnan(largest)) break;
  }
  return largest;
}

template <typename T>
void margin_loss_of(const T* teacher, const T* student, const int64_t* labels,
                    const MarginLosses& losses, T* grad_teacher, T* grad_student, int64_t batch,
                    int64_t classes, const MarginLossOptions& o, int threads) {
  const double count = static_cast<double>(batch);
  std::vector<Row> rows(batch);
  parallel_for(batch, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t i = begin * classes;
    margin_rows(teacher + i, student + i, labels + begin, end - begin, classes, &rows[begin]);
  });

  const double largest = largest_deficit(rows);
  const double largest_floor = at_least(largest, kFullAgreement);
  double margin = 0, disagreement = 0, agreement = 0, through_largest = 0;
  int64_t ties = 0;
  std::vector<double> grad_deficit(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const double deficit = rows[b].deficit, h = 1 - deficit / largest_floor;
    losses.h_prime[b] = static_cast<float>(h);
    margin += at_least(o.lambda_l - h, 0.0) + at_least(h - o.lambda_u, 0.0);
    disagreement -= rows[b].log_p_ds;
    agreement -= rows[b].log_p_as;
    const double grad_h = (double(h > o.lambda_u) - double(h < o.lambda_l)) / count;
    grad_deficit[b] = -grad_h / largest_floor;
    through_largest += grad_h * deficit;
    ties += deficit == largest;
  }
  if (!o.detach_min && largest >= kFullAgreement) {
    // The batch minimum of H is the maximum of D; ties share its gradient evenly.
    through_largest /= largest_floor * largest_floor * static_cast<double>(ties);
    for (int64_t b = 0; b < batch; ++b) {
      if (rows[b].deficit == largest) grad_deficit[b] += through_largest;
    }
  }
  margin /= count;
  disagreement /= count;
  agreement /= count;
  *losses.total =
      static_cast<float>(margin + o.beta * (o.alpha_ds * disagreement + o.alpha_as * agreement));
  *losses.margin = static_cast<float>(margin);
  *losses.disagreement = static_cast<float>(disagreement);
  *losses.agreement = static_cast<float>(agreement);

  const double weight_ds = o.beta * o.alpha_ds / count, weight_as = o.beta * o.alpha_as / count;
  parallel_for(batch, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t i = begin * classes;
    margin_gradients(teacher + i, student + i, labels + begin, end - begin, classes, &rows[begin],
                     &grad_deficit[begin], weight_ds, weight_as, grad_teacher + i,
                     grad_student + i);
  });
}

template <typename T>
void entropy_distillation_of(const T* teacher, const T* student, float* loss, T* grad_student,
                             int64_t batch, int64_t classes, double temperature, int threads) {
  // d grows as q falls, and the loss as D grows: gradient_row turns the sign for the student.
  const double weight = temperature / static_cast<double>(batch);
  std::vector<double> deficit(batch);
  parallel_for(batch, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t i = begin * classes;
    distillation_rows(teacher + i, student + i, end - begin, classes, temperature, weight,
                      &deficit[begin], grad_student + i);
  });
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b) sum += deficit[b];
  *loss = static_cast<float>(
      temperature * temperature *
      (sum / static_cast<double>(batch) - std::log(static_cast<double>(classes))));
}

}  // namespace

int64_t first_bad_label(const int64_t* labels, int64_t batch, int64_t classes) {
  for (int64_t b = 0; b < batch; ++b) {
    if (labels[b] < 0 || labels[b] >= classes) return b;
  }
  return -1;
}

void margin_loss(const void* teacher, const void* student, const int64_t* labels,
                 const MarginLosses& losses, void* grad_teacher, void* grad_student, int64_t batch,
                 int64_t classes, const MarginLossOptions& options, DType dtype, int threads) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    margin_loss_of(static_cast<const T*>(teacher), static_cast<const T*>(student), labels, losses,
                   static_cast<T*>(grad_teacher), static_cast<T*>(grad_student), batch, classes,
                   options, useful_threads(batch * classes * kElementCost, threads));
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
