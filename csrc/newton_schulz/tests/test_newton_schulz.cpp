// Newton-Schulz iterations against their definition in double precision, for every instruction set of this CPU, sides
// that are multiples of nothing, and several numbers of threads.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/testing.h"
#include "cpu/newton_schulz.h"

using namespace megaforge::newton_schulz;
using megaforge::Isa;
using megaforge::testing::expect;
using megaforge::testing::expect_close;
using megaforge::testing::Random;

namespace {

using Doubles = std::vector<double>;

// a [rows, depth] times b [depth, columns], or its transpose [columns, depth].
Doubles multiply(const Doubles& a, const Doubles& b, long rows, long depth, long columns, bool turned) {
  Doubles c(static_cast<std::size_t>(rows * columns));
  for (long i = 0; i < rows; ++i) {
    for (long j = 0; j < columns; ++j) {
      double sum = 0;
      for (long k = 0; k < depth; ++k) sum += a[i * depth + k] * (turned ? b[j * depth + k] : b[k * columns + j]);
      c[i * columns + j] = sum;
    }
  }
  return c;
}

Doubles defined(Doubles x, long m, long n, const std::vector<Step>& steps) {
  double square = 0;
  for (double value : x) square += value * value;
  for (double& value : x) value /= std::max(std::sqrt(square), 1e-7);
  for (const Step& step : steps) {
    const Doubles gram = multiply(x, x, m, n, m, true), squared = multiply(gram, gram, m, m, m, false);
    Doubles polynomial(gram.size());
    for (std::size_t i = 0; i < gram.size(); ++i) polynomial[i] = double(step.b) * gram[i] + double(step.c) * squared[i];
    const Doubles moved = multiply(polynomial, x, m, m, n, false);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = double(step.a) * x[i] + moved[i];
  }
  return x;
}

void check(long batch, long m, long n, Random& random, const std::string& isa) {
  const std::vector<Step> steps = {{4.0848f, -6.8946f, 2.9270f}, {3.9505f, -6.3029f, 2.6377f}, {2.8366f, -3.0525f, 1.2012f}};
  const std::size_t one = static_cast<std::size_t>(m * n);
  const Doubles x = random.normal(static_cast<std::size_t>(batch) * one);
  const std::vector<float> narrow(x.begin(), x.end());
  Doubles want;
  for (long i = 0; i < batch; ++i) {
    const Doubles result = defined({x.begin() + static_cast<long>(one) * i, x.begin() + static_cast<long>(one) * (i + 1)}, m, n, steps);
    want.insert(want.end(), result.begin(), result.end());
  }
  for (Way way : {Way::standard_bf16, Way::standard_f32, Way::gram_f32, Way::gram_split}) {
    const std::string what = isa + " way " + std::to_string(static_cast<int>(way)) + " " + std::to_string(batch) + "x" +
                             std::to_string(m) + "x" + std::to_string(n);
    const bool bf16 = way == Way::standard_bf16 || way == Way::gram_split;
    std::vector<float> first;
    for (int threads : {1, 2, 3}) {
      std::vector<float> out(narrow.size(), -1.0f);
      newton_schulz({batch, m, n, steps, way, 1e-7}, narrow.data(), out.data(), threads);
      if (first.empty()) {
        expect_close(out, want, bf16 ? 3e-2 : 1e-4, what);
        first = out;
      }
      expect(out == first, what + ": " + std::to_string(threads) + " threads differ");
    }
  }
}

}  // namespace

int main() {
  for (auto [name, isa] : {std::pair{"scalar", Isa::scalar}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}}) {
    if (!megaforge::cpu_has(isa)) continue;
    setenv("MEGAFORGE_CPU_ISA", name, 1);
    Random random(7);
    check(1, 1, 1, random, name);
    check(2, 1, 17, random, name);
    check(3, 31, 33, random, name);
    check(1, 64, 64, random, name);
    check(1, 97, 300, random, name);
    check(1, 140, 200, random, name);
  }
  return megaforge::testing::finish("newton_schulz");
}
