// Products with packed weights against whole numbers, for every instruction set of this CPU: all remainders of tokens,
// rows and columns, groups, both types, extreme values, several numbers of threads.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/scratch.h"
#include "common/testing.h"
#include "cpu/bitgemm.h"

using namespace megaforge::bitgemm;
using megaforge::Isa;
using megaforge::Scratch;
using megaforge::testing::expect;
using megaforge::testing::Random;

namespace {

struct Weights {
  Shape shape;
  std::vector<int> codes;
  std::vector<std::uint8_t> packed;
  std::vector<float> scale;
  Scratch panels;

  Weights(const Shape& of, Random& random, int only = 100)
      : shape(of), codes(static_cast<std::size_t>(of.rows * of.columns)), panels(1, of.bytes()) {
    const int64_t row_bytes = (of.columns * of.bits + 7) / 8;
    packed.resize(static_cast<std::size_t>(of.rows * row_bytes));
    for (int64_t r = 0; r < of.rows; ++r) {
      for (int64_t k = 0; k < of.columns; ++k) {
        int code = of.bits == 1 ? static_cast<int>(2 * random.whole(0, 1) - 1) : static_cast<int>(of.bits == 2 ? random.whole(-1, 1) : random.whole(-8, 7));
        if (only != 100) code = only;
        codes[r * of.columns + k] = code;
        const int stored = of.bits == 1 ? (code + 1) / 2 : of.bits == 2 ? code + 1 : code & 15;
        packed[r * row_bytes + k * of.bits / 8] |= static_cast<std::uint8_t>(stored << (k * of.bits % 8));
      }
    }
    for (int64_t i = 0; i < of.rows * of.groups; ++i) scale.push_back(0.25f * static_cast<float>(random.whole(1, 9)));
    prepare(shape, packed.data(), panels.of(0), 2);
  }
};

// y of codes, all of which are exact: scales are few-bit numbers.
std::vector<float> defined(const Weights& w, const std::vector<std::int8_t>& x, int64_t tokens, float worth) {
  std::vector<float> y;
  const Shape& shape = w.shape;
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      float total = 0;
      for (int64_t g = 0; g < shape.groups; ++g) {
        long sum = 0;
        for (int64_t k = g * shape.group_columns(); k < (g + 1) * shape.group_columns(); ++k) {
          sum += w.codes[r * shape.columns + k] * x[m * shape.columns + k];
        }
        total += static_cast<float>(sum) * w.scale[r * shape.groups + g];
      }
      y.push_back(total * worth);
    }
  }
  return y;
}

void check_codes(int bits, int64_t tokens, int64_t rows, int64_t columns, int64_t groups, Random& random,
                 const std::string& isa, int only = 100) {
  const Weights w({bits, rows, columns, groups, prefers_words(bits)}, random, only);
  std::vector<std::int8_t> x(static_cast<std::size_t>(tokens * columns));
  for (auto& value : x) value = static_cast<std::int8_t>(only == 100 ? random.whole(-128, 127) : 127);
  const std::vector<float> worth(static_cast<std::size_t>(tokens), 0.5f), want = defined(w, x, tokens, 0.5f);
  for (int threads : {1, 3}) {
    std::vector<float> y(want.size(), -1.0f);
    multiply({w.shape, w.panels.of(0), w.scale.data(), groups}, {tokens, Type::f32, nullptr, 8, x.data(), worth.data()},
             {Type::f32, y.data(), nullptr}, threads);
    expect(y == want, isa + " " + std::to_string(bits) + " bits " + std::to_string(tokens) + "x" + std::to_string(rows) +
                          "x" + std::to_string(columns) + "/" + std::to_string(groups));
  }
  std::vector<float> y(want.size(), -1.0f);
  for (int64_t begin = 0; begin < rows; begin += 2 * w.shape.granule()) {
    multiply_rows({w.shape, w.panels.of(0), w.scale.data(), groups}, {tokens, Type::f32, nullptr, 8, x.data(), worth.data()},
                  {Type::f32, y.data(), nullptr}, begin, std::min(rows, begin + 2 * w.shape.granule()));
  }
  expect(y == want, isa + " by parts: " + std::to_string(bits) + " bits " + std::to_string(tokens) + "x" +
                        std::to_string(rows) + "x" + std::to_string(columns));
}

void check_quantizing(Random& random, const std::string& isa) {
  const int64_t tokens = 5, columns = 37, rows = 33;
  const Weights w({2, rows, columns, 1, false}, random);
  std::vector<float> x;
  for (double value : random.normal(static_cast<std::size_t>(tokens * columns))) x.push_back(static_cast<float>(value));
  x[columns + 3] = std::numeric_limits<float>::quiet_NaN();
  x[2 * columns + 36] = -std::numeric_limits<float>::infinity();
  for (int64_t k = 0; k < columns; ++k) x[3 * columns + k] = 0;
  std::vector<float> y(static_cast<std::size_t>(tokens * rows)), bias(static_cast<std::size_t>(rows), 3.0f);
  multiply({w.shape, w.panels.of(0), w.scale.data(), 1}, {tokens, Type::f32, x.data(), 8, nullptr, nullptr},
           {Type::f32, y.data(), bias.data()}, 1);
  for (int64_t m = 0; m < tokens; ++m) {
    float largest = 1e-5f;
    for (int64_t k = 0; k < columns; ++k) largest = std::fmax(largest, std::fabs(x[m * columns + k]));
    std::vector<std::int8_t> codes;
    for (int64_t k = 0; k < columns; ++k) {
      codes.push_back(m == 1 || m == 2 ? 0 : static_cast<std::int8_t>(std::nearbyint(x[m * columns + k] * (1.0f / largest * 127.0f))));
    }
    const std::vector<float> want = defined(w, codes, 1, 1.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const float product = want[r] * (largest / 127.0f);
      const float got = y[m * rows + r];
      expect(m == 1 || m == 2 ? std::isnan(got) : got == product + 3.0f, isa + ": token " + std::to_string(m));
    }
  }
  std::vector<std::uint16_t> narrow(x.size()), short_y(y.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    std::uint32_t word;
    std::memcpy(&word, &x[i], 4);
    narrow[i] = static_cast<std::uint16_t>(word >> 16), word &= 0xffff0000u;
    std::memcpy(&x[i], &word, 4);
  }
  multiply({w.shape, w.panels.of(0), w.scale.data(), 1}, {tokens, Type::f32, x.data(), 8, nullptr, nullptr},
           {Type::f32, y.data(), nullptr}, 1);
  multiply({w.shape, w.panels.of(0), w.scale.data(), 1}, {tokens, Type::bf16, narrow.data(), 8, nullptr, nullptr},
           {Type::bf16, short_y.data(), nullptr}, 1);
  for (std::size_t i = 0; i < y.size(); ++i) {
    const std::uint32_t word = static_cast<std::uint32_t>(short_y[i]) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    expect(std::isnan(y[i]) ? std::isnan(value) : std::fabs(value - y[i]) <= std::fabs(y[i]) / 256, isa + ": bf16");
  }
}

#if defined(__x86_64__)
// The pairs of bytes, on CPUs that have better.
void check_pairs(Random& random) {
  for (int bits : {1, 2, 4}) {
    const Shape shape{bits, kPanel, 100, 1, false};
    const Weights w(shape, random);
    for (int count : {1, 2, 4, 8, 12}) {
      std::vector<std::int8_t> tokens(static_cast<std::size_t>(shape.padded_columns() * count));
      for (auto& value : tokens) value = static_cast<std::int8_t>(random.whole(-128, 127));
      std::vector<std::int32_t> got(kPanel * kMostTokens), want(kPanel * kMostTokens);
      const auto* panel = static_cast<const std::uint8_t*>(w.panels.of(0));
      avx512_kernels.tile(bits, count, panel, tokens.data(), shape.steps(), got.data());
      scalar_kernels.tile(bits, count, panel, tokens.data(), shape.steps(), want.data());
      expect(got == want, "pairs of bytes, " + std::to_string(bits) + " bits, " + std::to_string(count) + " tokens");
    }
  }
}
#endif

}  // namespace

int main() {
  for (auto [name, isa] : {std::pair{"scalar", Isa::scalar}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}}) {
    if (!megaforge::cpu_has(isa)) continue;
    setenv("MEGAFORGE_CPU_ISA", name, 1);
    Random random(11);
    for (int bits : {1, 2, 4}) {
      for (int64_t tokens = 1; tokens <= 13; ++tokens) check_codes(bits, tokens, 33, 50, 1, random, name);
      for (int64_t columns = 1; columns <= 66; ++columns) check_codes(bits, 3, 5, columns, 1, random, name);
      for (int64_t rows : {1, 31, 32, 63, 64, 65, 129}) check_codes(bits, 2, rows, 33, 1, random, name);
      check_codes(bits, 14, 70, 120, 3, random, name);
      check_codes(bits, 30, 200, 300, 1, random, name);
      check_codes(bits, 9, 40, 5000, 1, random, name, bits == 4 ? -8 : 1);
      check_codes(bits, 1, 40, 5000, 1, random, name, bits == 4 ? 7 : -1);
    }
    check_quantizing(random, name);
#if defined(__x86_64__)
    if (isa == Isa::avx512) check_pairs(random);
#endif
  }
  return megaforge::testing::finish("bitgemm");
}
