// margin_loss and entropy_distillation, each with its gradients in one launch.
//
// The arithmetic is csrc/common/logit_losses.h; build with --fmad=false.
//
// A row of up to 256 classes belongs to the lanes of a warp or of a part of it, a longer one to a
// block. A thread takes kEach elements of a row at a time. Where one turn is enough for a row, its
// peak is known before the first exponential; a longer row is summed turn by turn, each thread
// lowering what it has when its own peak rises.
//
// margin_loss has two phases, as max_b D enters every gradient: values of the rows to scratch; then
// the batch's largest D, the losses and the gradients. Between them the whole grid waits: a
// cooperative launch, whose blocks all run at once, no more of them than fit the device; a few
// rows are one block's. Every block sums the batch itself, in one order, and how a row is split
// depends on its length, type and alignment alone: the results depend neither on the grid nor on
// the device. Logits stay in shared memory over the wait where every row has its threads to itself,
// else they are read again. entropy_distillation does not wait: its last block sums the rows'
// losses.
//
// Bytes an element, float32: 24 (two logits in, twice, the second time from the chip as a rule; two
// gradients out), distillation 12; 16-bit types half of that. Every block reads 8 B bytes twice in
// addition, from the second-level cache. Float64 instructions an element: about 40, distillation
// 30; 18 of them are the one exponential. With 64 float64 lanes a multiprocessor (sm_80: 32) that
// is less than the memory accesses take or about as much; with two, as consumer GPUs have, it is
// all that counts: 20 cycles an element and multiprocessor, hence 16 us for [256, 1000] logits on
// 128 multiprocessors of 2.5 GHz.
//
// Test: ADADFQ_TEST_EMULATED_CUDA=1 python -m pytest tests/test_cuda_kernels.py -k "loss or distil"
//
// On a GPU: python -m pytest -m gpu tests
//
// Time: python -m benchmarks ops --device cuda --suite gpu --ops margin_loss,entropy_distillation
//
// Alone: nvcc -std=c++17 -O3 --fmad=false -c csrc/cuda/logit_losses.cu
#include "logit_losses.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "dispatch_dtype.h"
#include "last_block.h"
#include "launch.h"
#include "pack.h"

namespace adadfq {
namespace cuda {
namespace {

// Elements of a row that a thread takes at a time.
constexpr int kEach = 8;
// Blocks of a multiprocessor; the more, the longer they wait for each other.
constexpr int kMarginBlocks = 2, kDistillationBlocks = 3;
// What would be this many blocks is one, which takes its rows in turns: a turn takes less time than
// waiting for other blocks.
constexpr int64_t kAlone = 2;

struct Shape {
  int64_t batch, classes;
  int threads;  // of a row: a power of two up to a warp, or the block
  int shift;    // log2 of that
  bool packed;  // 16 bytes at a time
  double log_classes, per_row;

  __device__ int rows_of_block() const { return kThreads >> shift; }
  __device__ int row_of_block() const { return static_cast<int>(threadIdx.x) >> shift; }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) & (threads - 1); }
  __device__ int turn() const { return threads * kEach; }
  __device__ bool one_turn() const { return classes <= turn(); }
};

Shape shape_of(int64_t batch, int64_t classes, int pack, bool is_aligned) {
  Shape shape{batch,
              classes,
              kThreads,
              0,
              is_aligned && classes % pack == 0,
              std::log(static_cast<double>(classes)),
              1.0 / static_cast<double>(batch)};
  if (classes <= kWarp * kEach) {
    const int64_t packs = shape.packed ? classes / pack : classes;
    shape.threads = 1;
    while (shape.threads < std::min<int64_t>(packs, kWarp)) shape.threads *= 2;
  }
  while (1 << shape.shift < shape.threads) ++shape.shift;
  return shape;
}

int64_t blocks_of(const Shape& shape) {
  const int64_t rows = kThreads / shape.threads;
  return (shape.batch + rows - 1) / rows;
}

bool is_for_one_block(const Shape& shape) { return blocks_of(shape) <= kAlone; }

// Combines the values of groups of `lanes` neighbouring lanes; each gets its group's result.
template <int n, class Combine>
__device__ __forceinline__ void combine_lanes(int lanes, double (&values)[n], Combine combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    if (offset >= lanes) continue;
#pragma unroll
    for (int i = 0; i < n; ++i)
      values[i] = combine(values[i], __shfl_xor_sync(kAllLanes, values[i], offset));
  }
}

// The same for the threads of a row, or for all of the block; all of the block call it.
template <int n, class Combine>
__device__ __forceinline__ void combine_threads(int threads, double (&values)[n], Combine combine) {
  combine_lanes(threads, values, combine);
  if (threads <= kWarp) return;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double of_warps[kWarps][n];
  if (threadIdx.x % kWarp == 0)
    for (int i = 0; i < n; ++i) of_warps[threadIdx.x / kWarp][i] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) values[i] = of_warps[threadIdx.x % kWarps][i];
  combine_lanes(kWarps, values, combine);
  __syncthreads();
}

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// Passes over NaN, which no peak is.
struct Larger {
  __device__ double operator()(double a, double b) const { return b > a ? b : a; }
};

struct LargerOrNaN {
  __device__ double operator()(double a, double b) const { return larger_or_nan(a, b); }
};

// The logits of a turn, [kEach, kThreads]: each thread has a column of its own. In shared memory,
// for margin_loss keeps them over the wait, and registers are short.
struct Logits {
  float teacher[kEach * kThreads], student[kEach * kThreads];
};

// A thread's part of one turn over a row: element j is column first + at(j).
template <typename T>
struct Elements {
  static constexpr int n = kPackOf<T>;

  float *teacher, *student;  // element j at j * kThreads
  unsigned present;          // bit j: element j exists
  int count;                 // the first that no thread has

  __device__ explicit Elements(Logits& logits)
      : teacher(logits.teacher + threadIdx.x),
        student(logits.student + threadIdx.x),
        present(0),
        count(0) {}

  __device__ static int at(const Shape& shape, int j) {
    return shape.packed ? ((j / n << shape.shift) + shape.lane()) * n + j % n
                        : (j << shape.shift) + shape.lane();
  }

  // row: where the row begins, in elements; absent rows have no elements.
  __device__ void load(const T* teachers, const T* students, int64_t row, int64_t first,
                       const Shape& shape, bool is_row) {
    const int64_t rest = shape.classes - first;
    const int columns = rest < shape.turn() ? static_cast<int>(rest) : shape.turn();
    const int left = is_row ? columns : 0;
    present = 0;
    teachers += row + first;
    students += row + first;
    if (shape.packed) {
      count = ((columns / n + shape.threads - 1) >> shape.shift) * n;
#pragma unroll
      for (int j = 0; j < kEach; j += n) {
        const int i = at(shape, j);
        if (i >= left) continue;
        const Pack<T, n> t = cuda::load<n>(teachers + i), q = cuda::load<n>(students + i);
#pragma unroll
        for (int u = 0; u < n; ++u) set(j + u, t.values[u], q.values[u]);
      }
    } else {
      count = (columns + shape.threads - 1) >> shape.shift;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int i = at(shape, j);
        if (i < left) set(j, teachers[i], students[i]);
      }
    }
  }

  __device__ void set(int j, T t, T q) {
    teacher[j * kThreads] = to_float(t);
    student[j * kThreads] = to_float(q);
    present |= 1u << j;
  }

  __device__ bool exists(int j) const { return present >> j & 1u; }

  __device__ double ds(int j) const {
    return static_cast<double>(teacher[j * kThreads]) - static_cast<double>(student[j * kThreads]);
  }

  __device__ double as(int j) const {
    return static_cast<double>(teacher[j * kThreads]) + static_cast<double>(student[j * kThreads]);
  }

  // Which element `column` is; -1 where it is another thread's or in another turn.
  __device__ static int element_of(int64_t column, int64_t first, const Shape& shape) {
    if (column < first || column >= first + shape.turn()) return -1;
    const int offset = static_cast<int>(column - first), width = shape.packed ? n : 1;
    const int pack = shape.packed ? offset / n : offset;
    if ((pack & (shape.threads - 1)) != shape.lane()) return -1;
    return (pack >> shape.shift) * width + (offset & (width - 1));
  }

  // Elements j to j + n - 1, as far as they exist.
  __device__ void store(T* out, int j, const float (&values)[n], const Shape& shape) const {
    if (shape.packed) {
      if (exists(j)) cuda::store(out + at(shape, j), to_pack<T>(values));
      return;
    }
#pragma unroll
    for (int u = 0; u < n; ++u)
      if (exists(j + u)) out[at(shape, j + u)] = from_float<T>(values[u]);
  }
};

// -------------------------------------------------------------------------------------------------
// margin_loss

template <typename T>
struct MarginLoss {
  const T *teacher, *student;
  const int64_t* labels;
  MarginLosses losses;
  T *grad_teacher, *grad_student;
  double* scratch;
  Shape shape;
  MarginLossSettings settings;

  __device__ double* values(int which) const { return scratch + which * shape.batch; }
};

// Where scratch has what of the rows.
enum : int { kDeficit, kShiftDs, kShiftAs, kLabelDs, kLabelAs };

template <typename T>
__device__ RowValues values_of_row(const MarginLoss<T>& call, int64_t row, bool is_row,
                                   int64_t label, Elements<T>& elements) {
  const Shape& shape = call.shape;
  const int64_t start = row * shape.classes;
  // At once, so that they are there when the sums are.
  const bool has_label = is_row && label >= 0 && label < shape.classes;
  const double nan = static_cast<double>(NAN);
  const double teacher = has_label ? to_float(call.teacher[start + label]) : nan;
  const double student = has_label ? to_float(call.student[start + label]) : nan;

  DisagreementSums ds;
  AgreementSums as;
  for (int64_t first = 0; first < shape.classes; first += shape.turn()) {
    elements.load(call.teacher, call.student, start, first, shape, is_row);
    double peaks[2] = {ds.peak, as.peak};
#pragma unroll 4
    for (int j = 0; j < elements.count; ++j) {
      if (!elements.exists(j)) continue;
      peaks[0] = Larger()(peaks[0], elements.ds(j));
      peaks[1] = Larger()(peaks[1], elements.as(j));
    }
    if (shape.one_turn()) {
      combine_threads(shape.threads, peaks, Larger());
      ds.peak = peaks[0];  // of nothing yet
      as.peak = peaks[1];
    } else {
      ds.raise_peak(peaks[0]);
      as.raise_peak(peaks[1]);
    }
#pragma unroll 4
    for (int j = 0; j < elements.count; ++j) {
      ds.add(elements.ds(j), elements.exists(j));
      as.add(elements.as(j), elements.exists(j));
    }
  }
  if (!shape.one_turn()) {
    double peaks[2] = {ds.peak, as.peak};
    combine_threads(shape.threads, peaks, Larger());
    ds.raise_peak(peaks[0]);
    as.raise_peak(peaks[1]);
  }
  double sums[3] = {ds.total, ds.weighted, as.total};
  combine_threads(shape.threads, sums, Sum());
  ds.total = sums[0];
  ds.weighted = sums[1];
  as.total = sums[2];
  return row_values(ds, as, shape.log_classes, teacher, student);
}

template <typename T>
__device__ void write_values(const MarginLoss<T>& call, int64_t row, const RowValues& values) {
  call.values(kDeficit)[row] = values.deficit;
  call.values(kShiftDs)[row] = values.shift_ds;
  call.values(kShiftAs)[row] = values.shift_as;
  call.values(kLabelDs)[row] = values.label_ds;
  call.values(kLabelAs)[row] = values.label_as;
}

template <typename T>
__device__ double read_value(const MarginLoss<T>& call, int which, int64_t row) {
  return load_shared_result(call.values(which) + row);
}

template <typename T>
__device__ RowValues read_values(const MarginLoss<T>& call, int64_t row) {
  return {read_value(call, kDeficit, row), read_value(call, kShiftDs, row),
          read_value(call, kShiftAs, row), read_value(call, kLabelDs, row),
          read_value(call, kLabelAs, row)};
}

struct BatchValues {
  LargestDeficit largest;
  double through_largest;
};

// The same in every block. The first one writes the losses.
template <typename T>
__device__ BatchValues values_of_batch(const MarginLoss<T>& call) {
  const Shape& shape = call.shape;
  double largest_of_all[1] = {0};
  for (int64_t row = threadIdx.x; row < shape.batch; row += kThreads)
    largest_of_all[0] = larger_or_nan(largest_of_all[0], read_value(call, kDeficit, row));
  combine_threads(kThreads, largest_of_all, LargerOrNaN());
  const LargestDeficit largest = largest_deficit(largest_of_all[0]);

  const bool is_first = blockIdx.x == 0;
  if (call.settings.detach_min && !is_first) return {largest, 0.0};
  BatchSums sums;
  for (int64_t row = threadIdx.x; row < shape.batch; row += kThreads) {
    sums.add_deficit(read_value(call, kDeficit, row), largest, call.settings, shape.per_row);
    if (!is_first) continue;
    sums.label_ds += read_value(call, kLabelDs, row);
    sums.label_as += read_value(call, kLabelAs, row);
  }
  double all[5] = {sums.through_largest, sums.ties, sums.margin, sums.label_ds, sums.label_as};
  combine_threads(kThreads, all, Sum());
  sums.through_largest = all[0];
  sums.ties = all[1];
  sums.margin = all[2];
  sums.label_ds = all[3];
  sums.label_as = all[4];
  if (is_first && threadIdx.x == 0) {
    const LossValues values = loss_values(sums, call.settings, shape.per_row, shape.log_classes);
    *call.losses.total = static_cast<float>(values.total);
    *call.losses.margin = static_cast<float>(values.margin);
    *call.losses.disagreement = static_cast<float>(values.disagreement);
    *call.losses.agreement = static_cast<float>(values.agreement);
  }
  return {largest, gradient_through_largest(sums, largest, call.settings)};
}

// elements: the row's, where `has_elements`.
template <typename T>
__device__ void gradients_of_row(const MarginLoss<T>& call, int64_t row, int64_t label,
                                 const RowGradient& gradient, Elements<T>& elements,
                                 bool has_elements) {
  constexpr int n = kPackOf<T>;
  const Shape& shape = call.shape;
  const int64_t start = row * shape.classes;
  for (int64_t first = 0; first < shape.classes; first += shape.turn()) {
    if (!has_elements) elements.load(call.teacher, call.student, start, first, shape, true);
    const int label_element = Elements<T>::element_of(label, first, shape);
#pragma unroll 1
    for (int j = 0; j < elements.count; j += n) {
      float teacher[n], student[n];
#pragma unroll
      for (int u = 0; u < n; ++u) {
        const Gradients gradients = element_gradients(elements.ds(j + u), elements.as(j + u),
                                                      j + u == label_element, gradient);
        teacher[u] = gradients.teacher;
        student[u] = gradients.student;
      }
      elements.store(call.grad_teacher + start + first, j, teacher, shape);
      elements.store(call.grad_student + start + first, j, student, shape);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kMarginBlocks)
    margin_loss_kernel(const MarginLoss<T> call) {
  const Shape& shape = call.shape;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * shape.rows_of_block();
  const int64_t step = static_cast<int64_t>(gridDim.x) * shape.rows_of_block();
  const bool keeps = shape.one_turn() && step >= shape.batch;
  __shared__ Logits logits;
  Elements<T> elements(logits);
  RowValues values{};
  int64_t label = 0;

  for (int64_t first = begin; first < shape.batch; first += step) {
    const int64_t row = first + shape.row_of_block();
    const bool is_row = row < shape.batch;
    label = is_row ? call.labels[row] : 0;
    values = values_of_row(call, row, is_row, label, elements);
    if (is_row && shape.lane() == 0) write_values(call, row, values);
  }

  if (gridDim.x > 1)
    cooperative_groups::this_grid().sync();
  else
    __syncthreads();

  const BatchValues batch = values_of_batch(call);
  const double weight = call.settings.beta * shape.per_row;
  for (int64_t first = begin; first < shape.batch; first += step) {
    const int64_t row = first + shape.row_of_block();
    if (row >= shape.batch) continue;
    if (!keeps) {
      values = read_values(call, row);
      label = call.labels[row];
    }
    const double h = h_prime_of(values.deficit, batch.largest);
    if (shape.lane() == 0) call.losses.h_prime[row] = static_cast<float>(h);
    double grad_deficit =
        deficit_gradient(values.deficit, h_prime_gradient(h, call.settings, shape.per_row),
                         batch.largest, batch.through_largest);
    if (label < 0 || label >= shape.classes) grad_deficit = static_cast<double>(NAN);
    const RowGradient gradient = row_gradient(values, grad_deficit, weight * call.settings.alpha_ds,
                                              weight * call.settings.alpha_as, shape.log_classes);
    gradients_of_row(call, row, label, gradient, elements, keeps);
  }
}

// Blocks of a launch of `kernel` that can wait for each other.
template <auto kernel>
cudaError_t blocks_at_once(int64_t* blocks) {
  constexpr int kDevices = 64;
  static std::atomic<int>
      known[kDevices];  // of a multiprocessor; asking takes longer than a launch
  int device = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device < kDevices) each = known[device].load(std::memory_order_relaxed);
  if (each == 0) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
    if (error != cudaSuccess) return error;
    if (device < kDevices) known[device].store(each, std::memory_order_relaxed);
  }
  *blocks = int64_t{std::min(each, kMarginBlocks)} * multiprocessors();
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_margin_loss(const MarginLoss<T>& call, cudaStream_t stream) {
  const dim3 threads(kThreads);
  if (is_for_one_block(call.shape))
    return launch(margin_loss_kernel<T>, dim3(1), threads, stream, call);
  int64_t at_once = 0;
  const cudaError_t error = blocks_at_once<&margin_loss_kernel<T>>(&at_once);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min(blocks_of(call.shape), at_once);
  return launch_cooperative(margin_loss_kernel<T>, dim3(static_cast<unsigned>(blocks)), threads,
                            stream, call);
}

// -------------------------------------------------------------------------------------------------
// entropy_distillation

template <typename T>
struct Distillation {
  const T *teacher, *student;
  float* loss;
  T* grad_student;
  double* deficits;   // [batch]
  unsigned* counter;  // of blocks that have ended; null for one block
  Shape shape;
  double temperature, slope;  // and 1 / temperature
};

template <typename T>
__device__ Deficit deficit_of_row(const Distillation<T>& call, int64_t row, bool is_row,
                                  Elements<T>& elements) {
  const Shape& shape = call.shape;
  DisagreementSums ds;
  for (int64_t first = 0; first < shape.classes; first += shape.turn()) {
    elements.load(call.teacher, call.student, row * shape.classes, first, shape, is_row);
    double peak[1] = {ds.peak};
#pragma unroll 4
    for (int j = 0; j < elements.count; ++j)
      if (elements.exists(j)) peak[0] = Larger()(peak[0], elements.ds(j) * call.slope);
    if (shape.one_turn()) {
      combine_threads(shape.threads, peak, Larger());
      ds.peak = peak[0];  // of nothing yet
    } else {
      ds.raise_peak(peak[0]);
    }
#pragma unroll 4
    for (int j = 0; j < elements.count; ++j)
      ds.add(elements.ds(j) * call.slope, elements.exists(j));
  }
  if (!shape.one_turn()) {
    double peak[1] = {ds.peak};
    combine_threads(shape.threads, peak, Larger());
    ds.raise_peak(peak[0]);
  }
  double sums[2] = {ds.total, ds.weighted};
  combine_threads(shape.threads, sums, Sum());
  ds.total = sums[0];
  ds.weighted = sums[1];
  return deficit_of(ds, shape.log_classes);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kDistillationBlocks)
    entropy_distillation_kernel(const Distillation<T> call) {
  constexpr int n = kPackOf<T>;
  const Shape& shape = call.shape;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * shape.rows_of_block();
  const int64_t step = static_cast<int64_t>(gridDim.x) * shape.rows_of_block();
  __shared__ Logits logits;
  Elements<T> elements(logits);
  for (int64_t first_row = begin; first_row < shape.batch; first_row += step) {
    const int64_t row = first_row + shape.row_of_block();
    const bool is_row = row < shape.batch;
    const Deficit deficit = deficit_of_row(call, row, is_row, elements);
    if (!is_row) continue;
    if (shape.lane() == 0) call.deficits[row] = deficit.value;
    // The loss rises with d, which falls as q grows.
    const float weight = static_cast<float>(-call.temperature * shape.per_row *
                                            exp(deficit.value - shape.log_classes));
    const double shift = deficit.shift + deficit.value;
    const int64_t start = row * shape.classes;
    for (int64_t first = 0; first < shape.classes; first += shape.turn()) {
      if (!shape.one_turn()) elements.load(call.teacher, call.student, start, first, shape, true);
#pragma unroll 1
      for (int j = 0; j < elements.count; j += n) {
        float gradients[n];
#pragma unroll
        for (int u = 0; u < n; ++u)
          gradients[u] = distillation_gradient(elements.ds(j + u) * call.slope, shift, weight);
        elements.store(call.grad_student + start + first, j, gradients, shape);
      }
    }
  }

  if (call.counter == nullptr)
    __syncthreads();
  else if (!is_last_block(call.counter))
    return;
  double sum[1] = {0};
  for (int64_t row = threadIdx.x; row < shape.batch; row += kThreads)
    sum[0] += load_shared_result(call.deficits + row);
  combine_threads(kThreads, sum, Sum());
  if (threadIdx.x == 0)
    *call.loss = static_cast<float>(call.temperature * call.temperature *
                                    (sum[0] * shape.per_row - shape.log_classes));
}

}  // namespace

cudaError_t margin_loss(const void* teacher, const void* student, const int64_t* labels,
                        const MarginLosses& losses, void* grad_teacher, void* grad_student,
                        double* scratch, int64_t batch, int64_t classes,
                        const MarginLossSettings& settings, DType dtype, cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const bool is_aligned = aligned(teacher, student, grad_teacher, grad_student);
    return launch_margin_loss(
        MarginLoss<T>{static_cast<const T*>(teacher), static_cast<const T*>(student), labels,
                      losses, static_cast<T*>(grad_teacher), static_cast<T*>(grad_student), scratch,
                      shape_of(batch, classes, kPackOf<T>, is_aligned), settings},
        stream);
  });
}

cudaError_t entropy_distillation(const void* teacher, const void* student, float* loss,
                                 void* grad_student, double* scratch, int64_t batch,
                                 int64_t classes, double temperature, DType dtype,
                                 cudaStream_t stream) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Shape shape =
        shape_of(batch, classes, kPackOf<T>, aligned(teacher, student, grad_student));
    int64_t blocks = 1;
    unsigned* counter = nullptr;
    if (!is_for_one_block(shape)) {
      blocks = persistent_blocks(blocks_of(shape), kDistillationBlocks);
      const cudaError_t error = block_counter(stream, &counter);
      if (error != cudaSuccess) return error;
    }
    const Distillation<T> call{static_cast<const T*>(teacher),
                               static_cast<const T*>(student),
                               loss,
                               static_cast<T*>(grad_student),
                               scratch,
                               counter,
                               shape,
                               temperature,
                               1.0 / temperature};
    return launch(entropy_distillation_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                  dim3(kThreads), stream, call);
  });
}

}  // namespace cuda
}  // namespace adadfq
