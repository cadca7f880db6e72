// WKV-7's CPU code against its equations in double precision, over random shapes, for every instruction set of this CPU.
#include <cstdlib>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/testing.h"
#include "cpu/convert.h"
#include "cpu/wkv7.h"

using namespace megaforge::wkv7;
using megaforge::Isa;
using megaforge::testing::expect;
using megaforge::testing::expect_close;
using megaforge::testing::Random;
using Doubles = std::vector<double>;

struct Case {
  Shape shape;
  std::int64_t interval;
  bool has_starts, has_initial, has_dfinal;
  std::int64_t channels() const { return shape.s * shape.b * shape.h * shape.n; }
  std::int64_t states() const { return shape.b * shape.h * shape.n * shape.n; }
  std::string name() const {
    std::string out;
    for (auto x : {shape.s, shape.b, shape.h, shape.n, interval}) out += std::to_string(x) + " ";
    return out + (has_starts ? "starts " : "") + (has_initial ? "initial " : "") + (has_dfinal ? "dfinal" : "");
  }
};

struct Problem {
  Doubles r, log_w, k, v, a, b, initial, dy, dfinal;
  std::vector<char> starts;
};

struct Answer {
  Doubles y, final_state, dr, dlog_w, dk, dv, da, db, dinitial;
};

// Rounded to `type`, so that every implementation starts from the same numbers.
void round_to(Doubles& x, Type type) {
  for (double& value : x) {
    if (type == Type::f32) value = static_cast<float>(value);
    if (type == Type::bf16) value = from_bf16(to_bf16(static_cast<float>(value)));
  }
}

Problem make_problem(const Case& c, Random& random, Type type) {
  const auto channels = static_cast<std::size_t>(c.channels());
  Problem p;
  p.r = random.normal(channels), p.k = random.normal(channels), p.v = random.normal(channels);
  p.log_w = random.normal(channels, 2), p.dy = random.normal(channels);
  for (double& x : p.log_w) x = -0.6065306597126334 / (1 + std::exp(-x));
  p.a = random.normal(channels);
  p.b.resize(channels);
  const auto n = static_cast<std::size_t>(c.shape.n);
  for (std::size_t head = 0; head < channels; head += n) {
    double norm = 1e-6;
    for (std::size_t j = 0; j < n; ++j) norm += p.a[head + j] * p.a[head + j];
    for (std::size_t j = 0; j < n; ++j) p.a[head + j] /= std::sqrt(norm), p.b[head + j] = -0.5 * p.a[head + j];
  }
  const auto states = static_cast<std::size_t>(c.states());
  p.initial = c.has_initial ? random.normal(states) : Doubles(states);
  p.dfinal = c.has_dfinal ? random.normal(states) : Doubles(states);
  p.starts.resize(static_cast<std::size_t>(c.shape.s * c.shape.b));
  for (char& start : p.starts) start = c.has_starts && random.whole(0, 9) == 0;
  for (Doubles* x : {&p.r, &p.k, &p.v, &p.a, &p.b, &p.dy}) round_to(*x, type);
  for (Doubles* x : {&p.log_w, &p.initial, &p.dfinal}) round_to(*x, type == Type::bf16 ? Type::f32 : type);
  return p;
}

// The equations, one element after the other; every state is kept.
Answer reference(const Case& c, const Problem& p) {
  const auto [s, batches, heads, n] = c.shape;
  const auto channels = static_cast<std::size_t>(c.channels()), states = static_cast<std::size_t>(c.states());
  Answer out{Doubles(channels), Doubles(states), Doubles(channels), Doubles(channels), Doubles(channels),
             Doubles(channels), Doubles(channels), Doubles(channels), Doubles(states)};
  for (std::int64_t row = 0; row < batches * heads; ++row) {
    const auto at = [&](std::int64_t t, std::int64_t j) { return static_cast<std::size_t>((t * batches * heads + row) * n + j); };
    const auto cell = [&](std::int64_t i, std::int64_t j) { return static_cast<std::size_t>((row * n + i) * n + j); };
    const auto start = [&](std::int64_t t) { return p.starts[static_cast<std::size_t>(t * batches + row / heads)] != 0; };
    std::vector<Doubles> before, after;  // [n * n] for each token; before: after the reset
    Doubles state(p.initial.begin() + row * n * n, p.initial.begin() + (row + 1) * n * n), removed(channels);
    for (std::int64_t t = 0; t < s; ++t) {
      if (start(t)) state.assign(state.size(), 0);
      before.push_back(state);
      for (std::int64_t i = 0; i < n; ++i) {
        double* line = &state[static_cast<std::size_t>(i * n)];
        double sum = 0, y = 0;
        for (std::int64_t j = 0; j < n; ++j) sum += line[j] * p.a[at(t, j)];
        removed[at(t, i)] = sum;
        for (std::int64_t j = 0; j < n; ++j) {
          line[j] = line[j] * std::exp(p.log_w[at(t, j)]) + sum * p.b[at(t, j)] + p.v[at(t, i)] * p.k[at(t, j)];
          y += line[j] * p.r[at(t, j)];
        }
        out.y[at(t, i)] = y;
      }
      after.push_back(state);
    }
    Doubles grad(p.dfinal.begin() + row * n * n, p.dfinal.begin() + (row + 1) * n * n);
    for (std::int64_t i = 0; i < n * n; ++i) out.final_state[static_cast<std::size_t>(row * n * n + i)] = state[static_cast<std::size_t>(i)];
    for (std::int64_t t = s - 1; t >= 0; --t) {
      const Doubles &old = before[static_cast<std::size_t>(t)], &now = after[static_cast<std::size_t>(t)];
      for (std::int64_t i = 0; i < n; ++i) {
        const auto line = static_cast<std::size_t>(i * n);
        double dremoved = 0;
        for (std::int64_t j = 0; j < n; ++j) {
          double& g = grad[line + static_cast<std::size_t>(j)];
          g += p.dy[at(t, i)] * p.r[at(t, j)];
          out.dr[at(t, j)] += p.dy[at(t, i)] * now[line + static_cast<std::size_t>(j)];
          out.dv[at(t, i)] += g * p.k[at(t, j)];
          out.dk[at(t, j)] += g * p.v[at(t, i)];
          out.db[at(t, j)] += g * removed[at(t, i)];
          out.dlog_w[at(t, j)] += g * old[line + static_cast<std::size_t>(j)] * std::exp(p.log_w[at(t, j)]);
          dremoved += g * p.b[at(t, j)];
        }
        for (std::int64_t j = 0; j < n; ++j) {
          double& g = grad[line + static_cast<std::size_t>(j)];
          out.da[at(t, j)] += dremoved * old[line + static_cast<std::size_t>(j)];
          g = start(t) ? 0 : g * std::exp(p.log_w[at(t, j)]) + dremoved * p.a[at(t, j)];
        }
      }
    }
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < n; ++j) out.dinitial[cell(i, j)] = grad[static_cast<std::size_t>(i * n + j)];
  }
  return out;
}

// A tensor of `type`, and back.
struct Tensor {
  Type type;
  std::vector<unsigned char> bytes;

  Tensor(Type type, std::size_t count) : type(type), bytes(count * size_of(type)) {}
  Tensor(Type type, const Doubles& x) : Tensor(type, x.size()) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (type == Type::f64) reinterpret_cast<double*>(bytes.data())[i] = x[i];
      if (type == Type::f32) reinterpret_cast<float*>(bytes.data())[i] = static_cast<float>(x[i]);
      if (type == Type::bf16) reinterpret_cast<std::uint16_t*>(bytes.data())[i] = to_bf16(static_cast<float>(x[i]));
    }
  }
  Doubles values() const {
    Doubles out(bytes.size() / size_of(type));
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (type == Type::f64) out[i] = reinterpret_cast<const double*>(bytes.data())[i];
      if (type == Type::f32) out[i] = static_cast<double>(reinterpret_cast<const float*>(bytes.data())[i]);
      if (type == Type::bf16) out[i] = static_cast<double>(from_bf16(reinterpret_cast<const std::uint16_t*>(bytes.data())[i]));
    }
    return out;
  }
};

Answer run(const Case& c, const Problem& p, Type type, int threads) {
  const auto [s, batches, heads, n] = c.shape;
  const Type wide = type == Type::f64 ? Type::f64 : Type::f32;
  const auto channels = static_cast<std::size_t>(c.channels()), states = static_cast<std::size_t>(c.states());
  Tensor r(type, p.r), log_w(wide, p.log_w), k(type, p.k), v(type, p.v), a(type, p.a), b(type, p.b), dy(type, p.dy);
  Tensor initial(wide, p.initial), dfinal(wide, p.dfinal);
  Tensor y(type, channels), removed(wide, channels), final_state(wide, states),
      saved(wide, states * static_cast<std::size_t>((s + c.interval - 1) / c.interval));
  const auto view = [&](const Tensor& x) { return View{x.bytes.data(), x.type, batches * heads * n, heads * n, n}; };
  std::vector<unsigned char> starts(p.starts.begin(), p.starts.end());
  const Inputs in{c.shape, view(r), view(log_w), view(k), view(v), view(a), view(b),
                  c.has_starts ? reinterpret_cast<const bool*>(starts.data()) : nullptr, c.interval};
  forward(Forward{in, c.has_initial ? initial.bytes.data() : nullptr, y.bytes.data(), type, final_state.bytes.data(),
                  saved.bytes.data(), removed.bytes.data()},
          threads);
  Tensor dr(type, channels), dlog_w(wide, channels), dk(type, channels), dv(type, channels), da(type, channels),
      db(type, channels), dinitial(wide, states);
  const auto gradient = [](Tensor& x) { return Gradient{x.bytes.data(), x.type}; };
  backward(Backward{in, saved.bytes.data(), removed.bytes.data(), view(dy), c.has_dfinal ? dfinal.bytes.data() : nullptr,
                    gradient(dr), gradient(dlog_w), gradient(dk), gradient(dv), gradient(da), gradient(db),
                    dinitial.bytes.data()},
           threads);
  return {y.values(), final_state.values(), dr.values(), dlog_w.values(), dk.values(),
          dv.values(), da.values(), db.values(), dinitial.values()};
}

void check(const Case& c, Random& random, Type type, const std::string& isa) {
  const Problem p = make_problem(c, random, type);
  const Answer expected = reference(c, p), got = run(c, p, type, 2), again = run(c, p, type, 1);
  const std::string name = isa + (type == Type::f64 ? " f64 " : type == Type::f32 ? " f32 " : " bf16 ") + c.name() + " ";
  const double exact = type == Type::f64 ? 1e-12 : 5e-6, rounded = type == Type::bf16 ? 4e-3 : exact;
  expect_close(got.y, expected.y, rounded, name + "y");
  expect_close(got.final_state, expected.final_state, exact, name + "final state");
  expect_close(got.dr, expected.dr, rounded, name + "dr");
  expect_close(got.dlog_w, expected.dlog_w, exact, name + "dlog_w");
  expect_close(got.dk, expected.dk, rounded, name + "dk");
  expect_close(got.dv, expected.dv, rounded, name + "dv");
  expect_close(got.da, expected.da, rounded, name + "da");
  expect_close(got.db, expected.db, rounded, name + "db");
  expect_close(got.dinitial, expected.dinitial, exact, name + "dinitial");
  expect(got.y == again.y && got.dr == again.dr && got.db == again.db && got.dinitial == again.dinitial,
         name + "one thread and two differ");
}

int main() {
  Random random(7);
  for (auto [isa, name] : {std::pair{Isa::avx512, "avx512"}, {Isa::avx2, "avx2"}, {Isa::scalar, "scalar"}}) {
    if (!megaforge::cpu_has(isa)) continue;
    setenv("MEGAFORGE_CPU_ISA", name, 1);
    for (Type type : {Type::f32, Type::bf16, Type::f64}) {
      if (type == Type::f64 && isa != Isa::scalar) continue;
      for (std::int64_t n : {1, 3, 16, 20, 32, 48, 64, 65, 128, 130}) {
        const bool small = n <= 64;
        for (int repeat = 0; repeat < (small ? 3 : 1); ++repeat) {
          const Case c{{random.whole(1, small ? 80 : 20), random.whole(1, 2), random.whole(1, 3), n},
                       random.whole(1, 40), random.whole(0, 1) == 1, random.whole(0, 1) == 1, random.whole(0, 1) == 1};
          check(c, random, type, name);
        }
      }
    }
  }
  return megaforge::testing::finish("wkv7");
}
