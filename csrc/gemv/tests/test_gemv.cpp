// Products with a few vectors against their definition in double precision, for every instruction set of this CPU:
// remainders of all sizes, turned and strided matrices, several numbers of threads.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/testing.h"
#include "cpu/gemv.h"

using namespace megaforge::gemv;
using megaforge::Bf16;
using megaforge::Isa;
using megaforge::testing::expect;
using megaforge::testing::expect_close;
using megaforge::testing::Random;

namespace {

Bf16 narrow(float x, Bf16) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
float narrow(float x, float) { return x; }

double wide(Bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
double wide(float x) { return x; }

template <class T>
std::vector<T> random_values(std::size_t count, Random& random) {
  std::vector<T> out;
  for (double value : random.normal(count)) out.push_back(narrow(static_cast<float>(value), T{}));
  return out;
}

template <class T>
void check(long tokens, long n, long k, long gap, bool turned, bool with_bias, Random& random, const std::string& isa) {
  const long stride = (turned ? n : k) + gap, rows = turned ? k : n;
  // Exactly what the matrix takes, so that a read beyond it is found.
  const auto x = random_values<T>(static_cast<std::size_t>(tokens * k), random);
  const auto weight = random_values<T>(static_cast<std::size_t>(rows == 0 ? 0 : (rows - 1) * stride + (turned ? n : k)), random);
  const auto bias = random_values<T>(static_cast<std::size_t>(n), random);
  std::vector<double> want;
  for (long t = 0; t < tokens; ++t) {
    for (long i = 0; i < n; ++i) {
      double sum = with_bias ? wide(bias[i]) : 0;
      for (long j = 0; j < k; ++j) sum += wide(x[t * k + j]) * wide(weight[turned ? j * stride + i : i * stride + j]);
      want.push_back(sum);
    }
  }
  const std::string what = isa + (sizeof(T) == 2 ? " bf16 " : " fp32 ") + std::to_string(tokens) + "x" + std::to_string(n) +
                           "x" + std::to_string(k) + (turned ? " turned" : "");
  std::vector<double> first;
  for (int threads : {1, 2, 3}) {
    std::vector<T> y(static_cast<std::size_t>(tokens * n));
    run(Problem<T>{tokens, n, k, x.data(), weight.data(), stride, turned, with_bias ? bias.data() : nullptr, y.data()},
        threads);
    std::vector<double> got;
    for (T value : y) got.push_back(wide(value));
    if (first.empty()) {
      expect_close(got, want, sizeof(T) == 2 ? 4e-3 : 2e-6, what);
      first = got;
    }
    expect(got == first, what + ": " + std::to_string(threads) + " threads differ");
  }
}

template <class T>
void check_all(Random& random, const std::string& isa) {
  for (long tokens = 1; tokens <= 9; ++tokens) check<T>(tokens, 70, 130, 0, tokens % 2 == 0, tokens % 3 == 0, random, isa);
  for (bool turned : {false, true}) {
    for (long k : {0l, 1l, 15l, 16l, 17l, 31l, 33l, 63l, 64l, 65l, 127l, 257l}) check<T>(1, 5, k, 3, turned, true, random, isa);
    for (long n : {1l, 2l, 3l, 7l, 63l, 64l, 65l, 129l}) check<T>(3, n, 40, 1, turned, false, random, isa);
    check<T>(2, 300, 400, 0, turned, true, random, isa);
  }
}

}  // namespace

int main() {
  for (auto [name, isa] : {std::pair{"scalar", Isa::scalar}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}}) {
    if (!megaforge::cpu_has(isa)) continue;
    setenv("MEGAFORGE_CPU_ISA", name, 1);
    Random random(7);
    check_all<float>(random, name);
    check_all<Bf16>(random, name);
  }
  return megaforge::testing::finish("gemv");
}
