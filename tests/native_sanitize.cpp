// Drives the CPU launchers through raw buffers, without Python, for AddressSanitizer and UBSan.
//
// Every buffer is its own allocation of exactly the size needed, between the sanitizer's guard
// zones. Sizes are odd on purpose, and outputs start as a value no kernel writes. Build: see
// tests/test_sanitize.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>

#include "../csrc/common/packing.h"
#include "../csrc/cpu/affine_act_fake_quantize.h"
#include "../csrc/cpu/batch_norm_act.h"
#include "../csrc/cpu/bn_match.h"
#include "../csrc/cpu/dynamic_fake_quantize.h"
#include "../csrc/cpu/fake_quantize.h"
#include "../csrc/cpu/learned_fake_quantize.h"
#include "../csrc/cpu/logit_losses.h"
#include "../csrc/cpu/observe_fake_quantize.h"
#include "../csrc/cpu/packing.h"

namespace {

using namespace adadfq;

constexpr float kUnwritten = -123456.0f;
int failures = 0;
uint32_t state = 12345;

void expect(bool condition, const char* what, const Layout& layout, DType dtype) {
  if (condition) return;
  ++failures;
  std::printf("FAILED %s at [%lld, %lld, %lld] dtype %d\n", what,
              static_cast<long long>(layout.outer), static_cast<long long>(layout.channels),
              static_cast<long long>(layout.inner), static_cast<int>(dtype));
}

float random_float() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 16777216.0f * 8.0f - 4.0f;
}

struct Values {
  Values(int64_t count, DType type)
      : n(count), dtype(type), bytes(new unsigned char[count * (type == DType::kFloat32 ? 4 : 2)]) {
    for (int64_t i = 0; i < n; ++i) set(i, kUnwritten);
  }

  void* data() { return bytes.get(); }

  void set(int64_t i, float value) {
    switch (dtype) {
      case DType::kFloat32:
        reinterpret_cast<float*>(data())[i] = value;
        break;
      case DType::kBFloat16:
        reinterpret_cast<BFloat16*>(data())[i] = from_float<BFloat16>(value);
        break;
      case DType::kFloat16:
        // Not a float16: an infinity there, which no kernel writes for finite input either.
        reinterpret_cast<Float16*>(data())[i] = from_float<Float16>(value);
        break;
    }
  }

  float get(int64_t i) {
    switch (dtype) {
      case DType::kFloat32:
        return reinterpret_cast<float*>(data())[i];
      case DType::kBFloat16:
        return to_float(reinterpret_cast<BFloat16*>(data())[i]);
      default:
        return to_float(reinterpret_cast<Float16*>(data())[i]);
    }
  }

  void fill() {
    for (int64_t i = 0; i < n; ++i) set(i, random_float());
  }

  bool written() {
    Values unwritten(1, dtype);
    for (int64_t i = 0; i < n; ++i) {
      if (get(i) == unwritten.get(0)) return false;
    }
    return true;
  }

  int64_t n;
  DType dtype;
  std::unique_ptr<unsigned char[]> bytes;
};

struct Floats : Values {
  explicit Floats(int64_t count) : Values(count, DType::kFloat32) {}

  float* floats() { return reinterpret_cast<float*>(data()); }
};

void drive_fake_quantize(const Layout& layout, DType dtype, int threads) {
  const int64_t n = layout.elements();
  const int bits = 4;
  Values x(n, dtype), grad(n, dtype), out(n, dtype), grad_x(n, dtype);
  Floats scale(layout.channels);
  std::unique_ptr<int32_t[]> zero_point(new int32_t[layout.channels]);
  x.fill();
  grad.fill();
  x.set(0, std::numeric_limits<float>::infinity());
  for (int64_t c = 0; c < layout.channels; ++c) {
    scale.set(c, 0.05f + std::fabs(random_float()) / 16);
    zero_point[c] = static_cast<int32_t>(c % 16);
  }
  fake_quantize(x.data(), scale.floats(), zero_point.get(), out.data(), layout, bits, dtype,
                threads);
  fake_quantize_backward(grad.data(), x.data(), scale.floats(), zero_point.get(), grad_x.data(),
                         layout, bits, dtype, threads);
  Values learned(n, dtype), both(n, dtype);
  Floats grad_scale(layout.channels);
  const LearnedTensor tensor{
      grad.data(), x.data(), learned.data(), scale.floats(), zero_point.get(), grad_scale.floats(),
      layout,      bits};
  learned_fake_quantize_backward(&tensor, 1, dtype, threads);
  expect(grad_scale.written(), "learned_fake_quantize_backward", layout, dtype);
  const DynamicTensor given{x.data(), both.data(), scale.floats(), zero_point.get(), layout, bits};
  foreach_fake_quantize(&given, 1, dtype, threads);
  Values want(1, dtype);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = i / layout.inner % layout.channels;
    const float lo = -static_cast<float>(zero_point[c]), hi = lo + 15;
    const float rounded = std::nearbyint(x.get(i) / scale.get(c));
    want.set(0, std::fmin(std::fmax(rounded, lo), hi) * scale.get(c));
    expect(out.get(i) == want.get(0), "fake_quantize", layout, dtype);
    const float kept = rounded >= lo && rounded <= hi ? grad.get(i) : 0;
    expect(grad_x.get(i) == kept, "fake_quantize_backward", layout, dtype);
    expect(learned.get(i) == kept, "learned_fake_quantize_backward", layout, dtype);
    expect(both.get(i) == out.get(i), "foreach_fake_quantize", layout, dtype);
    if (failures > 5) return;
  }
}

void drive_in_place(const Layout& layout, DType dtype, int threads) {
  Values x(layout.elements(), dtype), out(layout.elements(), dtype);
  Floats scale(layout.channels);
  std::unique_ptr<int32_t[]> zero_point(new int32_t[layout.channels]);
  x.fill();
  for (int64_t c = 0; c < layout.channels; ++c) {
    scale.set(c, 0.1f);
    zero_point[c] = 3;
  }
  fake_quantize(x.data(), scale.floats(), zero_point.get(), out.data(), layout, 4, dtype, threads);
  fake_quantize(x.data(), scale.floats(), zero_point.get(), x.data(), layout, 4, dtype, threads);
  for (int64_t i = 0; i < x.n; ++i) {
    expect(x.get(i) == out.get(i), "fake_quantize in place", layout, dtype);
    if (failures > 5) return;
  }
}

void drive_dynamic(const Layout& layout, DType dtype, int threads) {
  Values x(layout.elements(), dtype), out(layout.elements(), dtype), other(35, dtype),
      other_out(35, dtype);
  Floats scale(layout.channels), other_scale(5);
  std::unique_ptr<int32_t[]> zero_point(new int32_t[layout.channels]),
      other_zero_point(new int32_t[5]);
  x.fill();
  other.fill();
  const DynamicTensor tensors[] = {
      {other.data(), other_out.data(), other_scale.floats(), other_zero_point.get(), {1, 5, 7}, 3},
      {x.data(), out.data(), scale.floats(), zero_point.get(), layout, 4}};
  dynamic_fake_quantize(tensors, 2, dtype, threads);
  expect(out.written() && scale.written(), "dynamic_fake_quantize", layout, dtype);
  expect(other_out.written() && other_scale.written(), "the other tensor", layout, dtype);
  x.set(x.n - 1, std::numeric_limits<float>::quiet_NaN());
  dynamic_fake_quantize(tensors, 2, dtype, threads);
  expect(std::isnan(scale.get(layout.channels - 1)), "NaN in dynamic_fake_quantize", layout, dtype);
}

void drive_observe(const Layout& layout, DType dtype, int threads) {
  Values x(layout.elements(), dtype), out(layout.elements(), dtype);
  Floats running_min(1), running_max(1), scale(1);
  std::unique_ptr<int32_t> zero_point(new int32_t(0));
  std::unique_ptr<int64_t> num_batches(new int64_t(0));
  running_min.set(0, 0);
  running_max.set(0, 0);
  const RangeState state{running_min.floats(), running_max.floats(), num_batches.get(),
                         scale.floats(), zero_point.get()};
  for (int batch = 1; batch <= 2; ++batch) {
    x.fill();
    observe_fake_quantize(x.data(), out.data(), x.n, state, 4, 0.9, dtype, threads);
    expect(out.written() && scale.written() && *num_batches == batch, "observe_fake_quantize",
           layout, dtype);
  }
}

void drive_affine(const Layout& layout, DType dtype, int threads) {
  const int64_t n = layout.elements();
  for (const bool with_residual : {false, true}) {
    Values x(n, dtype), residual(n, dtype), grad(n, dtype), out(n, dtype), grad_x(n, dtype),
        grad_residual(n, dtype);
    Floats scale(layout.channels), shift(layout.channels), grad_scale(layout.channels),
        grad_shift(layout.channels), act_scale(1);
    std::unique_ptr<int32_t> act_zero_point(new int32_t(2));
    x.fill();
    residual.fill();
    grad.fill();
    scale.fill();
    shift.fill();
    act_scale.set(0, 0.25f);
    void* added = with_residual ? residual.data() : nullptr;
    affine_act_fake_quantize(x.data(), scale.floats(), shift.floats(), added, Act::kRelu,
                             act_scale.floats(), act_zero_point.get(), 4, out.data(), layout, dtype,
                             threads);
    affine_act_fake_quantize_backward(
        grad.data(), x.data(), scale.floats(), shift.floats(), added, Act::kRelu6, grad_x.data(),
        grad_residual.data(), grad_scale.floats(), grad_shift.floats(), layout, dtype, threads);
    expect(out.written() && grad_x.written() && grad_residual.written(), "affine", layout, dtype);
    expect(grad_scale.written() && grad_shift.written(), "affine's parameters", layout, dtype);
    Values again(n, dtype);
    affine_act_fake_quantize(x.data(), scale.floats(), shift.floats(), added, Act::kNone, nullptr,
                             nullptr, 4, again.data(), layout, dtype, threads);
    expect(again.written(), "affine without quantiser", layout, dtype);
    std::vector<uint8_t> codes(layout.elements(), 255);
    affine_act_quantize(x.data(), scale.floats(), shift.floats(), added, Act::kRelu,
                        act_scale.floats(), act_zero_point.get(), 4, codes.data(), layout, dtype,
                        threads);
    expect(std::all_of(codes.begin(), codes.end(), [](uint8_t code) { return code < 16; }),
           "affine's codes", layout, dtype);
    affine_act_fake_quantize_backward(grad.data(), x.data(), scale.floats(), shift.floats(), added,
                                      Act::kNone, again.data(), nullptr, nullptr, nullptr, layout,
                                      dtype, threads);
    Floats grad_act_scale(1);
    for (const bool all : {false, true}) {
      affine_act_learned_fake_quantize_backward(
          grad.data(), x.data(), scale.floats(), shift.floats(), added, Act::kRelu6,
          act_scale.floats(), act_zero_point.get(), 4, again.data(),
          all ? grad_residual.data() : nullptr, all ? grad_scale.floats() : nullptr,
          all ? grad_shift.floats() : nullptr, grad_act_scale.floats(), layout, dtype, threads);
      expect(again.written() && grad_act_scale.written(), "affine, learned", layout, dtype);
    }
  }
}

void drive_packing(const Layout& layout, DType dtype, int threads) {
  const int64_t n = layout.elements();
  Values x(n, dtype), want(n, dtype), out(n, dtype);
  Floats scale(layout.channels);
  std::unique_ptr<int32_t[]> zero_point(new int32_t[layout.channels]);
  x.fill();
  for (int bits = 2; bits <= 8; ++bits) {
    for (int64_t c = 0; c < layout.channels; ++c) {
      scale.set(c, 0.05f + std::fabs(random_float()) / 16);
      zero_point[c] = static_cast<int32_t>(c % (1 << bits));
    }
    const int64_t bytes = packed_bytes(n, bits);
    std::unique_ptr<uint8_t[]> packed(new uint8_t[bytes]);
    std::fill_n(packed.get(), bytes, 255);
    quantize_pack(x.data(), scale.floats(), zero_point.get(), packed.get(), layout, bits, dtype,
                  threads);
    if (const int used = static_cast<int>(n * bits % 8)) {
      expect(packed[bytes - 1] >> used == 0, "unused bits of quantize_pack", layout, dtype);
    }
    unpack_dequantize(packed.get(), scale.floats(), zero_point.get(), out.data(), layout, bits,
                      dtype, threads);
    fake_quantize(x.data(), scale.floats(), zero_point.get(), want.data(), layout, bits, dtype,
                  threads);
    for (int64_t i = 0; i < n; ++i) {
      expect(out.get(i) == want.get(i), "unpack_dequantize", layout, dtype);
      if (failures > 5) return;
    }
  }
}

void drive_bn_match(const Layout& layout, DType dtype, int threads) {
  Values x(layout.elements(), dtype), grad_y(layout.elements(), dtype),
      out(layout.elements(), dtype), y(layout.elements(), dtype);
  Floats running_mean(layout.channels), running_var(layout.channels), weight(layout.channels),
      loss(1), grad(1);
  std::unique_ptr<double[]> mean(new double[layout.channels]), var(new double[layout.channels]);
  x.fill();
  grad_y.fill();
  running_mean.fill();
  weight.fill();
  for (int64_t c = 0; c < layout.channels; ++c) running_var.set(c, 0.5f);
  grad.set(0, 0.5f);
  const BatchNorm norm{running_mean.floats(), running_var.floats(), weight.floats(), nullptr, 1e-5};
  for (const bool fused : {false, true}) {
    mean[layout.channels - 1] = var[layout.channels - 1] = -1;
    bn_match(x.data(), norm, fused ? y.data() : nullptr, loss.floats(), mean.get(), var.get(),
             layout, dtype, threads);
    expect(loss.written() && var[layout.channels - 1] >= 0, "bn_match", layout, dtype);
    bn_match_backward(fused ? grad_y.data() : nullptr, grad.floats(), x.data(), mean.get(),
                      var.get(), norm, out.data(), layout, dtype, threads);
    expect(out.written(), "bn_match_backward", layout, dtype);
  }
  expect(y.written(), "bn_match's BatchNorm", layout, dtype);
}

void drive_batch_norm_act(const Layout& layout, DType dtype, int threads) {
  const int64_t n = layout.elements();
  if (n == layout.channels) return;  // one value a channel has no variance
  for (const int64_t samples : {int64_t{1}, layout.outer}) {
    const int64_t parameters = samples * layout.channels;
    Values x(n, dtype), grad_y(n, dtype);
    Floats weight(parameters), bias(parameters);
    std::unique_ptr<double[]> mean(new double[layout.channels]), var(new double[layout.channels]);
    x.fill();
    grad_y.fill();
    weight.fill();
    bias.fill();
    for (const bool affine : {false, true}) {
      Values y(n, dtype), grad_x(n, dtype);
      Floats grad_weight(parameters), grad_bias(parameters);
      const BatchNormAct norm{affine ? weight.floats() : nullptr, affine ? bias.floats() : nullptr,
                              samples, 1e-3, 0.2f};
      mean[layout.channels - 1] = var[layout.channels - 1] = -1;
      batch_norm_act(x.data(), norm, y.data(), mean.get(), var.get(), layout, dtype, threads);
      expect(y.written() && var[layout.channels - 1] >= 0, "batch_norm_act", layout, dtype);
      batch_norm_act_backward(grad_y.data(), x.data(), mean.get(), var.get(), norm, grad_x.data(),
                              affine ? grad_weight.floats() : nullptr,
                              affine ? grad_bias.floats() : nullptr, layout, dtype, threads);
      expect(grad_x.written(), "batch_norm_act_backward", layout, dtype);
      if (affine) {
        expect(grad_weight.written() && grad_bias.written(), "batch_norm_act's parameters", layout,
               dtype);
      }
    }
  }
}

void drive_losses(int64_t batch, int64_t classes, DType dtype, int threads) {
  const Layout layout{batch, 1, classes};
  Values teacher(batch * classes, dtype), student(batch * classes, dtype),
      grad_teacher(batch * classes, dtype), grad_student(batch * classes, dtype);
  Floats total(1), margin(1), disagreement(1), agreement(1), h_prime(batch), loss(1);
  std::unique_ptr<int64_t[]> labels(new int64_t[batch]);
  teacher.fill();
  student.fill();
  for (int64_t b = 0; b < batch; ++b) labels[b] = (b + 1) % classes;
  expect(first_bad_label(labels.get(), batch, classes) == -1, "first_bad_label", layout, dtype);
  margin_loss(teacher.data(), student.data(), labels.get(),
              {total.floats(), margin.floats(), disagreement.floats(), agreement.floats(),
               h_prime.floats()},
              grad_teacher.data(), grad_student.data(), batch, classes,
              {0.3, 0.6, 0.2, 0.1, 1.0, false}, dtype, threads);
  expect(total.written() && margin.written() && disagreement.written() && agreement.written(),
         "losses of margin_loss", layout, dtype);
  expect(h_prime.written() && grad_teacher.written() && grad_student.written(), "margin_loss",
         layout, dtype);
  Values grad(batch * classes, dtype);
  entropy_distillation(teacher.data(), student.data(), loss.floats(), grad.data(), batch, classes,
                       5.0, dtype, threads);
  expect(loss.written() && grad.written(), "entropy_distillation", layout, dtype);
  labels[batch - 1] = classes;
  expect(first_bad_label(labels.get(), batch, classes) == batch - 1, "bad label", layout, dtype);
}

}  // namespace

int main() {
  const Layout layouts[] = {{1, 1, 1},     {1, 1, 17},    {3, 5, 1},     {7, 3, 7},
                            {2, 3, 31},    {1, 9, 9},     {513, 7, 1},   {40, 33, 3},
                            {1, 1, 50021}, {5, 11, 1009}, {3, 70001, 1}, {2, 30011, 3},
                            {1, 30011, 3}};
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int threads : {1, 3}) {
      for (const Layout& layout : layouts) {
        drive_fake_quantize(layout, dtype, threads);
        drive_in_place(layout, dtype, threads);
        drive_dynamic(layout, dtype, threads);
        drive_observe(layout, dtype, threads);
        drive_affine(layout, dtype, threads);
        drive_packing(layout, dtype, threads);
        drive_bn_match(layout, dtype, threads);
        drive_batch_norm_act(layout, dtype, threads);
      }
      for (const int64_t batch : {1, 7, 33}) {
        for (const int64_t classes : {1, 10, 333}) drive_losses(batch, classes, dtype, threads);
      }
    }
  }
  std::printf(failures ? "%d failures\n" : "no failures\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
