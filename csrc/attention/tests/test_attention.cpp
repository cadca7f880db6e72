// Attention against its definition in double precision, both passes, for every instruction set of this CPU: documents that
// are multiples of nothing, groups, heads of any size, queries that follow keys, rows that see nothing, several threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/testing.h"
#include "cpu/attention.h"

using namespace megaforge::attention;
using megaforge::Isa;
using megaforge::testing::expect;
using megaforge::testing::expect_close;
using megaforge::testing::Random;

namespace {

using Doubles = std::vector<double>;

std::uint16_t rounded(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

double widened(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// [b, heads, s, d] as numbers of `type`, and what they are exactly. Exactly as many bytes as there are, so that the
// address sanitizer sees every access beyond them.
struct Values {
  long heads, length, d;
  Type type;
  std::vector<float> wide;
  std::vector<std::uint16_t> halves;

  Values(long batch, long heads, long length, long d, Type type)
      : heads(heads), length(length), d(d), type(type), wide(type == Type::f32 ? batch * heads * length * d : 0),
        halves(type == Type::bf16 ? batch * heads * length * d : 0) {}

  Values(const Doubles& from, long batch, long heads, long length, long d, Type type) : Values(batch, heads, length, d, type) {
    for (std::size_t i = 0; i < from.size(); ++i) {
      if (type == Type::f32) wide[i] = static_cast<float>(from[i]);
      else halves[i] = rounded(static_cast<float>(from[i]));
    }
  }

  Doubles exact() const {
    Doubles out(wide.begin(), wide.end());
    for (std::uint16_t x : halves) out.push_back(widened(x));
    return out;
  }
  void* data() { return type == Type::f32 ? static_cast<void*>(wide.data()) : halves.data(); }
  View view() { return {data(), type, heads * length * d, length * d, d}; }
  Result result() { return {data(), type, heads * length * d, length * d, d}; }
};

struct Case {
  long batch, heads, groups, queries, keys, d;
  std::vector<Segment> segments;
  double scale = 1;
  long half = 0;       // channels that turn with as many others
  long threshold = 0;  // of 65536 probabilities so many are dropped
};

// SplitMix64's word of four elements.
std::uint64_t word(std::int64_t seed, long number) {
  std::uint64_t x = static_cast<std::uint64_t>(seed) + static_cast<std::uint64_t>(number + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// What a probability is multiplied by.
double factor(const Case& c, const std::vector<std::int64_t>& seeds, long row, long key) {
  if (c.threshold == 0) return 1;
  const auto bits = static_cast<std::int16_t>(word(seeds[row], key / 4) >> (16 * (key % 4)));
  return bits >= c.threshold - 32768 ? 65536.0 / (65536.0 - double(c.threshold)) : 0;
}

// Numbers [b, heads, s, d] with their channels turned by the angles [s, b, half], or by their opposites.
Doubles turned(const Case& c, Doubles x, long heads, long length, const Doubles& angles, double sign) {
  for (long b = 0; b < c.batch; ++b) {
    for (long h = 0; h < heads; ++h) {
      for (long s = 0; s < length; ++s) {
        double* row = x.data() + ((b * heads + h) * length + s) * c.d;
        for (long i = 0; i < c.half; ++i) {
          const double angle = sign * angles[(s * c.batch + b) * c.half + i], first = row[i], second = row[i + c.half];
          row[i] = first * std::cos(angle) - second * std::sin(angle);
          row[i + c.half] = second * std::cos(angle) + first * std::sin(angle);
        }
      }
    }
  }
  return x;
}

struct Results {
  Doubles out, dq, dk, dv;
};

Results defined(const Case& c, const Doubles& q, const Doubles& k, const Doubles& v, const Doubles& g,
                const std::vector<std::int64_t>& seeds) {
  Results r{Doubles(q.size()), Doubles(q.size()), Doubles(k.size()), Doubles(k.size())};
  const double scale = 1 / std::sqrt(double(c.d));
  for (const Segment& s : c.segments) {
    for (long h = 0; h < c.heads; ++h) {
      const auto of = [&](long heads, long head, long length, long i) { return ((s.batch * heads + head) * length + i) * c.d; };
      const long group = h / (c.heads / c.groups);
      for (long i = 0; i < s.queries; ++i) {
        const long seen = std::clamp<long>(i + s.ahead + 1, 0, s.keys), row = of(c.heads, h, c.queries, s.query + i);
        Doubles p(seen), dp(seen);
        double peak = -1e300, total = 0, along = 0;
        for (long j = 0; j < seen; ++j) {
          const long key = of(c.groups, group, c.keys, s.key + j);
          for (long x = 0; x < c.d; ++x) p[j] += q[row + x] * k[key + x] * scale, dp[j] += g[row + x] * v[key + x];
          peak = std::max(peak, p[j]);
        }
        for (double& x : p) x = std::exp(x - peak), total += x;
        const auto kept = [&](long j) { return factor(c, seeds, row / c.d, s.key + j); };
        for (long j = 0; j < seen; ++j) p[j] /= total, dp[j] *= kept(j), along += p[j] * dp[j];
        for (long j = 0; j < seen; ++j) {
          const long key = of(c.groups, group, c.keys, s.key + j);
          const double ds = p[j] * (dp[j] - along) * scale;
          for (long x = 0; x < c.d; ++x) {
            r.out[row + x] += p[j] * kept(j) * v[key + x];
            r.dq[row + x] += ds * k[key + x];
            r.dk[key + x] += ds * q[row + x];
            r.dv[key + x] += p[j] * kept(j) * g[row + x];
          }
        }
      }
    }
  }
  return r;
}

void check(const Kernels& kernels, const Case& c, Type type, Random& random, const std::string& isa) {
  const std::string what = isa + (type == Type::f32 ? " f32 " : " bf16 ") + std::to_string(c.queries) + "x" +
                           std::to_string(c.keys) + " d " + std::to_string(c.d);
  const auto made = [&](long heads, long length, double scale) {
    return Values(random.normal(c.batch * heads * length * c.d, scale), c.batch, heads, length, c.d, type);
  };
  Values q = made(c.heads, c.queries, c.scale), k = made(c.groups, c.keys, c.scale), v = made(c.groups, c.keys, 1);
  Values g = made(c.heads, c.queries, 1);
  const Doubles angles = random.normal(std::max(c.queries, c.keys) * c.batch * c.half, 10);
  std::vector<float> cosines, sines;
  for (double angle : angles) {
    cosines.push_back(static_cast<float>(std::cos(angle)));
    sines.push_back(static_cast<float>(std::sin(angle)));
  }
  const auto turn = [&](const Values& x, double sign) { return turned(c, x.exact(), x.heads, x.length, angles, sign); };
  std::vector<std::int64_t> seeds(c.batch * c.heads * c.queries);
  for (std::size_t i = 0; i < seeds.size(); ++i) seeds[i] = static_cast<std::int64_t>(word(7, static_cast<long>(i)));
  Results want = defined(c, turn(q, 1), turn(k, 1), v.exact(), g.exact(), seeds);
  want.dq = turned(c, want.dq, c.heads, c.queries, angles, -1), want.dk = turned(c, want.dk, c.groups, c.keys, angles, -1);
  const double most = (type == Type::f32 ? 2e-6 : 1e-2) * c.scale * c.scale;
  std::vector<Doubles> first;
  for (int threads : {1, 3, 8}) {
    Values out(c.batch, c.heads, c.queries, c.d, type), dq = out, dk(c.batch, c.groups, c.keys, c.d, type), dv = dk;
    std::vector<float> lse(c.batch * c.heads * c.queries, -std::numeric_limits<float>::infinity());
    const Problem in{c.heads, c.groups, c.queries, c.d, static_cast<float>(1 / std::sqrt(double(c.d))), c.segments.data(),
                     static_cast<long>(c.segments.size()), q.view(), k.view(), v.view(),
                     {cosines.data(), sines.data(), c.half, c.batch * c.half, c.half},
                     {c.threshold == 0 ? nullptr : seeds.data(), c.threshold}};
    forward(kernels, {in, out.result(), lse.data()}, threads);
    backward(kernels, {in, out.view(), g.view(), lse.data(), dq.result(), dk.result(), dv.result()}, threads);
    const std::vector<Doubles> got = {out.exact(), dq.exact(), dk.exact(), dv.exact(), Doubles(lse.begin(), lse.end())};
    if (first.empty()) {
      expect_close(got[0], want.out, most, what + " out");
      expect_close(got[1], want.dq, 2 * most, what + " dq");
      expect_close(got[2], want.dk, 2 * most, what + " dk");
      expect_close(got[3], want.dv, most, what + " dv");
      first = got;
    }
    expect(got == first, what + ": the number of threads changes the result");
  }
}

std::vector<Segment> documents(long batch, const std::vector<long>& lengths) {
  std::vector<Segment> found;
  for (long b = 0; b < batch; ++b) {
    long at = 0;
    for (long length : lengths) found.push_back({b, at, length, at, length, 0}), at += length;
  }
  return found;
}

void check_all(const Kernels& kernels, const std::string& name, bool bf16_alone) {
  Random random(11);
  const std::vector<Case> cases = {
      {2, 2, 1, 1, 1, 1, documents(2, {1})},
      {1, 1, 1, 64, 64, 64, documents(1, {64}), 1, 32},
      {2, 4, 2, 130, 130, 64, documents(2, {1, 16, 17, 49, 47}), 1, 20},
      {2, 4, 2, 130, 130, 64, documents(2, {1, 16, 17, 49, 47}), 1, 0, 20000},
      {1, 2, 1, 40, 301, 20, {{0, 0, 40, 3, 298, 258}}, 1, 4, 60000},
      {1, 2, 1, 300, 300, 20, documents(1, {300}), 2},
      {1, 1, 1, 70, 70, 130, documents(1, {3, 67})},
      // a cache, whose second sequence is shorter; keys that all see; queries and keys that nobody has
      {2, 2, 1, 9, 300, 16, {{0, 0, 9, 0, 300, 291}, {1, 0, 9, 33, 267, 258}}},
      {1, 2, 2, 100, 50, 17, {{0, 3, 90, 5, 40, 1000}}},
      // the first rows see nothing
      {1, 2, 1, 40, 30, 32, {{0, 0, 40, 0, 30, -10}}},
  };
  for (const Case& one : cases) {
    if (!bf16_alone) check(kernels, one, Type::f32, random, name);
    check(kernels, one, Type::bf16, random, name);
  }
}

}  // namespace

int main() {
  check_all(scalar_kernels, "scalar", false);
#if defined(__x86_64__)
  if (megaforge::cpu_has(Isa::avx2)) check_all(avx2_kernels, "avx2", false);
  if (megaforge::cpu_has(Isa::avx512)) check_all(avx512_kernels, "avx512", false);
  if (megaforge::cpu_has(Isa::avx512) && __builtin_cpu_supports("avx512bf16")) check_all(avx512_bf16_kernels, "avx512_bf16", true);
#endif
  return megaforge::testing::finish("attention");
}
