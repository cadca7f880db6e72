// Pointwise operators against their definitions in double precision, for every instruction set of this CPU: widths that
// are multiples of nothing, no rows, several threads, labels of other ranks.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/testing.h"
#include "cpu/pointwise.h"

using namespace megaforge::pointwise;
using megaforge::Bf16;
using megaforge::Isa;
using megaforge::testing::expect;
using megaforge::testing::expect_close;
using megaforge::testing::Random;

namespace {

using Doubles = std::vector<double>;

float value(float x) { return x; }
float value(Bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
void set(float& to, double x) { to = static_cast<float>(x); }
void set(Bf16& to, double x) {
  const float narrow = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  to.bits = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T>
std::vector<T> made(const Doubles& from) {
  std::vector<T> out(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) set(out[i], from[i]);
  return out;
}

template <class T>
Doubles exact(const std::vector<T>& x) {
  Doubles out;
  for (const T& one : x) out.push_back(value(one));
  return out;
}

template <class T>
constexpr double kMost = sizeof(T) == 2 ? 4e-3 : 2e-6;

template <class T>
void check_norm(const Kernels<T>& kernels, long rows, long width, bool centered, bool added, Random& random, const std::string& isa) {
  const std::string what = isa + (centered ? " layer norm " : " rms norm ") + std::to_string(rows) + "x" + std::to_string(width);
  const std::size_t size = rows * width;
  const auto x = made<T>(random.normal(size)), update = made<T>(random.normal(size)), grad = made<T>(random.normal(size));
  const auto weight = made<float>(random.normal(width)), bias = made<float>(random.normal(width));
  Doubles want_out(size), want_dx(size), want_dw(width), want_db(width);
  std::vector<T> want_sum(size);
  for (std::size_t i = 0; i < size; ++i) set(want_sum[i], added ? value(x[i]) + value(update[i]) : value(x[i]));
  for (long r = 0; r < rows; ++r) {
    double mean = 0, squares = 0, along = 0, whole = 0;
    for (long i = 0; i < width; ++i) mean += centered ? double(value(want_sum[r * width + i])) / width : 0;
    for (long i = 0; i < width; ++i) squares += std::pow(value(want_sum[r * width + i]) - mean, 2) / width;
    const double scale = 1 / std::sqrt(squares + 1e-5);
    for (long i = 0; i < width; ++i) {
      const long at = r * width + i;
      const double normed = (value(want_sum[at]) - mean) * scale, g = value(grad[at]);
      want_out[at] = normed * weight[i] + (centered ? bias[i] : 0);
      along += g * weight[i] * normed / width, whole += centered ? g * weight[i] / width : 0;
      want_dw[i] += g * normed, want_db[i] += g;
    }
    for (long i = 0; i < width; ++i) {
      const long at = r * width + i;
      const double normed = (value(want_sum[at]) - mean) * scale;
      want_dx[at] = (value(grad[at]) * weight[i] - whole - normed * along) * scale + (added ? value(update[at]) : 0);
    }
  }
  std::vector<float> first;
  for (int threads : {1, 3}) {
    std::vector<T> out(size), sum(added ? size : 0), dx(size);
    std::vector<float> mean(centered ? rows : 0), scale(rows), dw(width), db(centered ? width : 0);
    norm(kernels, Norm<T>{rows, width, x.data(), added ? update.data() : nullptr, weight.data(), centered ? bias.data() : nullptr,
                          1e-5f, centered, out.data(), added ? sum.data() : nullptr, mean.data(), scale.data()}, threads);
    const auto& normed = added ? sum : x;
    norm_backward(kernels, NormBackward<T>{rows, width, grad.data(), added ? update.data() : nullptr, normed.data(), weight.data(),
                                           mean.data(), scale.data(), centered, dx.data()}, dw.data(), db.data(), threads);
    if (first.empty()) {
      if (added) expect(exact(sum) == exact(want_sum), what + " sum");
      expect_close(exact(out), want_out, kMost<T>, what + " out");
      expect_close(exact(dx), want_dx, kMost<T>, what + " dx");
      expect_close(dw, want_dw, 2e-6, what + " dweight");
      if (centered) expect_close(db, want_db, 2e-6, what + " dbias");
      first = dw;
    }
    expect(dw == first, what + ": the number of threads changes the result");
  }
}

template <class T>
void check_weighted(const Kernels<T>& kernels, long rows, long width, const std::vector<T>& x, const std::vector<T>& grad,
                    Random& random, const std::string& what) {
  const auto weights = made<float>(random.normal(rows));
  for (const auto& [gate, gated] : {std::pair{Gate::silu, true}, {Gate::squared_relu, true}, {Gate::squared_relu, false}}) {
    const long wide = gated ? 2 * width : width;
    Doubles want(rows * width), want_dx(rows * wide), want_dw(rows);
    for (long r = 0; r < rows; ++r) {
      for (long i = 0; i < width; ++i) {
        const long at = r * wide + i;
        const bool silu = gate == Gate::silu;
        const double z = value(x[at]), share = 1 / (1 + std::exp(-z)), g = value(grad[r * width + i]), w = weights[r];
        const double open = silu ? z * share : std::pow(std::fmax(z, 0), 2), up = gated ? value(x[at + width]) : 1;
        want[r * width + i] = open * up * w;
        want_dx[at] = g * up * w * (silu ? share * (1 + z * (1 - share)) : 2 * std::fmax(z, 0));
        if (gated) want_dx[at + width] = g * open * w;
        want_dw[r] += g * open * up;
      }
    }
    std::vector<T> out(rows * width), dx(rows * wide);
    std::vector<float> dw(rows);
    const float* w = weights.data();
    activation(kernels, Activation<T>{rows, width, gate, gated, x.data(), w, nullptr, out.data(), nullptr}, 3);
    activation(kernels, Activation<T>{rows, width, gate, gated, x.data(), w, grad.data(), dx.data(), dw.data()}, 3);
    expect_close(exact(out), want, kMost<T>, what + " weighted");
    expect_close(exact(dx), want_dx, kMost<T>, what + " weighted gradient");
    expect_close(dw, want_dw, sizeof(T) == 2 ? 1e-4 : 1e-5, what + " gradient of the weights");
  }
}

template <class T>
void check_activations(const Kernels<T>& kernels, long rows, long width, Random& random, const std::string& isa) {
  const std::string what = isa + " " + std::to_string(rows) + "x" + std::to_string(width);
  const std::size_t size = rows * width;
  const auto x = made<T>(random.normal(2 * size, 4)), grad = made<T>(random.normal(size));
  for (Gate gate : {Gate::silu, Gate::squared_relu}) {
    Doubles want(size), want_dx(2 * size);
    for (long r = 0; r < rows; ++r) {
      for (long i = 0; i < width; ++i) {
        const long at = r * 2 * width + i;
        const double z = value(x[at]), up = value(x[at + width]), share = 1 / (1 + std::exp(-z)), g = value(grad[r * width + i]);
        const bool silu = gate == Gate::silu;
        const double open = silu ? z * share : std::pow(std::fmax(z, 0), 2);
        want[r * width + i] = open * up;
        want_dx[at] = g * up * (silu ? share * (1 + z * (1 - share)) : 2 * std::fmax(z, 0));
        want_dx[at + width] = g * open;
      }
    }
    std::vector<T> out(size), dx(2 * size);
    activation(kernels, Activation<T>{rows, width, gate, true, x.data(), nullptr, nullptr, out.data(), nullptr}, 3);
    activation(kernels, Activation<T>{rows, width, gate, true, x.data(), nullptr, grad.data(), dx.data(), nullptr}, 3);
    expect_close(exact(out), want, kMost<T>, what + " gated");
    expect_close(exact(dx), want_dx, kMost<T>, what + " gated gradient");
  }
  check_weighted(kernels, rows, width, x, grad, random, what);
  Doubles want(size), want_dx(size);
  for (std::size_t i = 0; i < size; ++i) {
    want[i] = std::pow(std::fmax(value(x[i]), 0), 2), want_dx[i] = 2 * std::fmax(value(x[i]), 0) * value(grad[i]);
  }
  std::vector<T> out(size), dx(size);
  squared_relu(kernels, static_cast<long>(size), x.data(), out.data(), 3);
  squared_relu_backward(kernels, static_cast<long>(size), grad.data(), x.data(), dx.data(), 3);
  expect_close(exact(out), want, kMost<T>, what + " squared relu");
  expect_close(exact(dx), want_dx, kMost<T>, what + " squared relu gradient");
}

template <class T>
void check_labels(const Kernels<T>& kernels, long rows, long width, long valid, double scale, Random& random, const std::string& isa) {
  const std::string what = isa + " labels " + std::to_string(rows) + "x" + std::to_string(valid) + " of " + std::to_string(width);
  const auto logits = made<T>(random.normal(rows * width, scale));
  const auto grad = made<float>(random.normal(rows)), weight = made<float>(random.normal(rows));
  std::vector<std::int64_t> labels;
  for (long r = 0; r < rows; ++r) labels.push_back(random.whole(-2, width + 1));
  std::vector<float> peak(rows), total(rows), picked(rows), log_sums(rows);
  label_scores(kernels, Labels{rows, width, valid, labels.data()}, logits.data(), peak.data(), total.data(), picked.data(), 3);
  Doubles want_total(rows), want_peak(rows, -INFINITY), want_picked(rows), want(rows * width);
  for (long r = 0; r < rows; ++r) {
    for (long i = 0; i < valid; ++i) want_peak[r] = std::fmax(want_peak[r], value(logits[r * width + i]));
    for (long i = 0; i < valid; ++i) want_total[r] += std::exp(value(logits[r * width + i]) - want_peak[r]);
    const bool mine = labels[r] >= 0 && labels[r] < valid;
    want_picked[r] = mine ? value(logits[r * width + labels[r]]) : 0;
    log_sums[r] = static_cast<float>(want_peak[r] + std::log(want_total[r]));
    for (long i = 0; i < valid; ++i) {
      want[r * width + i] = std::exp(double(value(logits[r * width + i])) - log_sums[r]) * grad[r] - (mine && labels[r] == i) * weight[r];
    }
  }
  expect(Doubles(peak.begin(), peak.end()) == want_peak, what + " peak");
  expect(Doubles(picked.begin(), picked.end()) == want_picked, what + " picked");
  expect_close(total, want_total, 2e-6, what + " total");
  auto slope = logits;
  label_gradients(kernels, Labels{rows, width, valid, labels.data()}, slope.data(), log_sums.data(), grad.data(), weight.data(), 3);
  expect_close(exact(slope), want, kMost<T> * 2, what + " gradient");
}

template <class T>
void check_all(const Kernels<T>& kernels, const std::string& isa) {
  Random random(5);
  for (bool centered : {false, true}) {
    for (bool added : {false, true}) {
      for (auto [rows, width] : {std::pair{0L, 16L}, {1L, 3L}, {7L, 64L}, {600L, 83L}}) check_norm(kernels, rows, width, centered, added, random, isa);
    }
  }
  for (auto [rows, width] : {std::pair{0L, 16L}, {1L, 1L}, {5L, 64L}, {300L, 83L}}) check_activations(kernels, rows, width, random, isa);
  for (double scale : {1.0, 30.0}) {
    check_labels(kernels, 0, 7, 5, scale, random, isa);
    check_labels(kernels, 3, 1, 1, scale, random, isa);
    check_labels(kernels, 120, 203, 203, scale, random, isa);
    check_labels(kernels, 40, 256, 191, scale, random, isa);
  }
}

void check_types(const AllKernels& kernels, const std::string& isa) {
  check_all(kernels.f32, isa + " f32");
  check_all(kernels.bf16, isa + " bf16");
}

}  // namespace

int main() {
  check_types(scalar_kernels, "scalar");
#if defined(__x86_64__)
  if (megaforge::cpu_has(Isa::avx2)) check_types(avx2_kernels, "avx2");
  if (megaforge::cpu_has(Isa::avx512)) check_types(avx512_kernels, "avx512");
  if (megaforge::cpu_has(Isa::avx512) && __builtin_cpu_supports("avx512bf16")) check_types(avx512_bf16_kernels, "avx512_bf16");
#endif
  return megaforge::testing::finish("pointwise");
}
