// Steps of blocks, experts and the head against their definition in double precision, for every instruction set of this
// CPU: sizes that no vector divides, one to eight tokens, several numbers of threads; buffers of exactly their sizes.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <list>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/testing.h"
#include "cpu/decode.h"

using namespace megaforge::decode;
using megaforge::Bf16;
using megaforge::Isa;
using megaforge::testing::expect;
using megaforge::testing::expect_close;
using megaforge::testing::Random;
using Row = std::vector<double>;

namespace {

constexpr long kHidden = 21, kHeads = 3, kSize = 9, kWide = kHeads * kSize;

Bf16 narrow(double x, Bf16) {
  const float value = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
float narrow(double x, float) { return static_cast<float>(x); }

double wide(Bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
double wide(float x) { return x; }

template <class T>
Row doubles(const std::vector<T>& values) {
  Row out;
  for (T value : values) out.push_back(wide(value));
  return out;
}

// Tensors of random values that live as long as their maker.
template <class T>
class Make {
 public:
  explicit Make(unsigned seed) : random_(seed) {}

  std::vector<T>& values(long count, double scale = 1) { return fill(rows_, count, scale); }
  std::vector<float>& floats(long count, double scale = 1) { return fill(floats_, count, scale); }
  const float* share(long count) {
    auto& out = floats(count);
    for (float& x : out) x = 1 / (1 + std::exp(-x));
    return out.data();
  }
  Matrix<T> matrix(long n, long k, bool turned = false, bool bias = false) {
    const double scale = 1 / std::sqrt(static_cast<double>(k));
    return {n, k, turned ? n : k, values(n * k, scale).data(), turned, bias ? values(n).data() : nullptr};
  }
  Norm norm(long count, bool bias) { return {floats(count).data(), bias ? floats(count).data() : nullptr, 1e-5f}; }

 private:
  template <class U>
  std::vector<U>& fill(std::list<std::vector<U>>& kept, long count, double scale) {
    auto& out = kept.emplace_back();
    for (double x : random_.normal(static_cast<std::size_t>(count), scale)) out.push_back(narrow(x, U{}));
    return out;
  }
  Random random_;
  std::list<std::vector<T>> rows_;
  std::list<std::vector<float>> floats_;
};

template <class T>
Row product(const Matrix<T>& m, const Row& x) {
  Row out;
  for (long i = 0; i < m.n; ++i) {
    double sum = m.bias == nullptr ? 0 : wide(m.bias[i]);
    for (long j = 0; j < m.k; ++j) sum += x[j] * wide(m.data[m.turned ? j * m.stride + i : i * m.stride + j]);
    out.push_back(sum);
  }
  return out;
}

Row normed(const Norm& norm, const double* x, long count) {
  double mean = 0, square = 0;
  for (long i = 0; i < count && norm.bias != nullptr; ++i) mean += x[i] / count;
  for (long i = 0; i < count; ++i) square += (x[i] - mean) * (x[i] - mean) / count;
  Row out;
  for (long i = 0; i < count; ++i) {
    out.push_back((x[i] - mean) / std::sqrt(square + norm.epsilon) * norm.weight[i] + (norm.bias == nullptr ? 0 : norm.bias[i]));
  }
  return out;
}

Row mixed(const Row& now, const double* before, const float* mix) {
  Row out;
  for (std::size_t i = 0; i < now.size(); ++i) out.push_back(now[i] + (before[i] - now[i]) * mix[i]);
  return out;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

Row activated(Activation kind, const Row& x) {
  Row out;
  const std::size_t count = is_gated(kind) ? x.size() / 2 : x.size();
  for (std::size_t i = 0; i < count; ++i) {
    double y = std::fmax(x[i], 0) * std::fmax(x[i], 0);
    if (kind == Activation::swiglu) y = x[i] * sigmoid(x[i]);
    if (kind == Activation::gelu) y = x[i] / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x[i] + 0.044715 * x[i] * x[i] * x[i])));
    if (kind == Activation::gelu_exact) y = x[i] / 2 * (1 + std::erf(x[i] / std::sqrt(2.0)));
    out.push_back(is_gated(kind) ? y * x[count + i] : y);
  }
  return out;
}

void add(double* x, const Row& update, double share = 1) {
  for (std::size_t i = 0; i < update.size(); ++i) x[i] += share * update[i];
}

// One token of one sequence; what it changes are its arguments.
template <class T>
void time_mix(const TimeMix<T>& l, double* x, double* shift, double* wkv, double* v_first) {
  const Row now = normed(l.norm, x, kHidden);
  Row in[6];
  for (int i = 0; i < 6; ++i) in[i] = mixed(now, shift, l.mix[i]);
  Row r = product(l.receptance, in[0]), key = product(l.key, in[2]), v = product(l.value, in[3]), outer[4];
  const int of_map[] = {1, 4, 5, 3};
  for (int i = 0; i < l.maps(); ++i) {
    Row inner = product(l.first[i], in[of_map[i]]);
    for (double& y : inner) y = i == 0 ? std::tanh(y) : i == 2 ? sigmoid(y) : y;
    outer[i] = product(l.second[i], inner);
  }
  Row gated(kWide);
  for (long c = 0; c < kWide; ++c) {
    if (l.makes_v_first) v_first[c] = v[c];
    else v[c] += (v_first[c] - v[c]) * sigmoid(l.v0[c] + outer[3][c]);
  }
  for (long at = 0; at < kWide; at += kSize) {
    double length = 0, bonus = 0;
    Row y(kSize);
    for (long i = at; i < at + kSize; ++i) length += std::pow(key[i] * l.k_k[i], 2);
    for (long i = 0; i < kSize; ++i) {
      double* row = wkv + (at + i) * kSize;
      double removed = 0;
      for (long j = 0; j < kSize; ++j) removed -= row[j] * key[at + j] * l.k_k[at + j] / std::sqrt(length);
      for (long j = 0; j < kSize; ++j) {
        const long c = at + j;
        const double rate = sigmoid(l.a0[c] + outer[1][c]), k = key[c] * (1 + (rate - 1) * l.k_a[c]);
        const double back = key[c] * l.k_k[c] / std::sqrt(length) * rate;
        row[j] = row[j] * std::exp(-std::exp(-0.5) * sigmoid(l.w0[c] + outer[0][c])) + removed * back + v[at + i] * k;
        y[i] += row[j] * r[c];
        if (i == 0) bonus += r[c] * k * l.r_k[c];
      }
    }
    const Norm part = {l.head_norm.weight + at, l.head_norm.bias + at, l.head_norm.epsilon};
    const Row normal = normed(part, y.data(), kSize);
    for (long i = 0; i < kSize; ++i) gated[at + i] = (normal[i] + bonus * v[at + i]) * outer[2][at + i];
  }
  add(x, product(l.output, gated));
  std::copy(now.begin(), now.end(), shift);
}

template <class T>
void attention(const Attention<T>& l, double* x, long token, Row& keys, Row& values) {
  const long width = l.width, each = l.heads / l.groups, unused = l.unused == nullptr ? 0 : l.unused[token];
  const Row fused = product(l.qkv, normed(l.norm, x, kHidden));
  const auto head = [&](const Norm& norm, long at) {
    Row out(fused.begin() + at * width, fused.begin() + (at + 1) * width);
    if (norm.weight != nullptr) out = normed(norm, out.data(), width);
    const Row old = out;
    for (long i = 0; i < l.pairs; ++i) {
      const double c = l.cosine[token * l.pairs + i], s = l.sine[token * l.pairs + i];
      const double a = old[l.interleaved ? 2 * i : i], b = old[l.interleaved ? 2 * i + 1 : l.pairs + i];
      out[i] = a * c - b * s;
      out[l.pairs + i] = b * c + a * s;
    }
    return out;
  };
  Row context;
  for (long g = 0; g < l.groups; ++g) {
    const long base = (token * l.groups + g) * l.capacity * width;
    const Row key = head(l.key_norm, l.heads + g);
    for (long i = 0; i < width; ++i) {
      keys[base + l.place * width + i] = key[i];
      values[base + l.place * width + i] = fused[(l.heads + l.groups + g) * width + i];
    }
    for (long q = 0; q < each; ++q) {
      const Row query = head(l.query_norm, g * each + q);
      Row sums(width);
      double total = 0;
      for (long j = unused; j <= l.place; ++j) {
        double score = 0;
        for (long i = 0; i < width; ++i) score += query[i] * keys[base + j * width + i] / std::sqrt(static_cast<double>(width));
        total += std::exp(score);
        for (long i = 0; i < width; ++i) sums[i] += std::exp(score) * values[base + j * width + i];
      }
      for (double y : sums) context.push_back(y / total);
    }
  }
  if (l.sub_norm.weight != nullptr) context = normed(l.sub_norm, context.data(), static_cast<long>(context.size()));
  add(x, product(l.output, context));
}

Row between(const Norm& norm, const Row& inner) {
  return norm.weight == nullptr ? inner : normed(norm, inner.data(), static_cast<long>(inner.size()));
}

// A problem runs again from the same values with another number of threads: no bit may differ.
template <class Problem>
void same_for_threads(const std::string& what, const std::vector<std::vector<float>*>& changed, const Problem& compute) {
  std::vector<std::vector<float>> start, first;
  for (auto* values : changed) start.push_back(*values);
  for (int threads : {3, 2, 1}) {
    for (std::size_t i = 0; i < changed.size(); ++i) *changed[i] = start[i];
    compute(threads);
    if (first.empty()) {
      for (auto* values : changed) first.push_back(*values);
    }
    for (std::size_t i = 0; i < changed.size(); ++i) {
      expect(std::memcmp(first[i].data(), changed[i]->data(), 4 * first[i].size()) == 0,
             what + ": " + std::to_string(threads) + " threads differ");
    }
  }
}

template <class T>
void check_recurrent(long tokens, bool first, const std::string& isa) {
  Make<T> make(static_cast<unsigned>(tokens));
  TimeMix<T> l;
  l.norm = make.norm(kHidden, true);
  for (const float*& mix : l.mix) mix = make.share(kHidden);
  for (Matrix<T>* each : {&l.receptance, &l.key, &l.value}) *each = make.matrix(kWide, kHidden);
  l.output = make.matrix(kHidden, kWide);
  l.makes_v_first = first;
  for (int i = 0; i < 4; ++i) {
    l.first[i] = make.matrix(5 + 30 * i, kHidden, true);
    l.second[i] = make.matrix(kWide, 5 + 30 * i, true);
  }
  for (const float** each : {&l.w0, &l.a0, &l.v0, &l.k_k, &l.k_a, &l.r_k}) *each = make.floats(kWide).data();
  l.head_norm = make.norm(kWide, true);
  l.heads = kHeads;
  l.size = kSize;
  const FFN<T> ffn = {{make.norm(kHidden, true), make.share(kHidden), make.values(tokens * kHidden).data()},
                      make.matrix(33, kHidden), make.matrix(kHidden, 33), make.norm(33, false), Activation::squared_relu};
  auto &x = make.floats(tokens * kHidden), &wkv = make.floats(tokens * kWide * kSize), &v_first = make.floats(tokens * kWide);
  auto& shift = make.values(tokens * kHidden);
  std::vector<T> ffn_shift(ffn.entry.shift, ffn.entry.shift + tokens * kHidden);
  const std::vector<T> old_shift = shift, old_ffn_shift = ffn_shift;
  Row want = doubles(x), want_wkv = doubles(wkv), want_first = doubles(v_first), want_shift = doubles(shift);
  Row want_ffn = doubles(ffn_shift);
  for (long m = 0; m < tokens; ++m) {
    double* row = want.data() + m * kHidden;
    time_mix(l, row, want_shift.data() + m * kHidden, want_wkv.data() + m * kWide * kSize, want_first.data() + m * kWide);
    const Row now = normed(ffn.entry.norm, row, kHidden);
    const Row in = mixed(now, want_ffn.data() + m * kHidden, ffn.entry.mix);
    std::copy(now.begin(), now.end(), want_ffn.begin() + m * kHidden);
    add(row, product(ffn.down, between(ffn.sub_norm, activated(ffn.activation, product(ffn.up, in)))));
  }
  const std::string what = isa + (sizeof(T) == 2 ? " bf16" : " fp32") + " recurrent " + std::to_string(tokens);
  FFN<T> own = ffn;
  own.entry.shift = ffn_shift.data();
  same_for_threads(what, {&x, &wkv, &v_first}, [&](int threads) {
    shift = old_shift;
    ffn_shift = old_ffn_shift;
    l.v_first = v_first.data();
    l.shift = shift.data();
    l.wkv = wkv.data();
    Block<T> block{tokens, kHidden, x.data()};
    block.time_mix = &l;
    block.ffn = &own;
    run(block, threads);
  });
  const double within = sizeof(T) == 2 ? 2e-2 : 1e-5;
  expect_close(x, want, within, what);
  expect_close(wkv, want_wkv, within, what + " state");
  expect_close(v_first, want_first, within, what + " v_first");
  expect_close(doubles(shift), want_shift, within, what + " shift");
  expect_close(doubles(ffn_shift), want_ffn, within, what + " shift of the FFN");
}

template <class T>
void check_attention(long tokens, long groups, Activation kind, const std::string& isa) {
  Make<T> make(static_cast<unsigned>(tokens + groups));
  const long heads = 4, width = 7, inner = 19, parts = is_gated(kind) ? 2 : 1;
  Attention<T> l;
  l.norm = make.norm(kHidden, false);
  l.qkv = make.matrix((heads + 2 * groups) * width, kHidden, false, true);
  l.output = make.matrix(kHidden, heads * width, false, true);
  if (groups != 1) l.query_norm = make.norm(width, true), l.key_norm = make.norm(width, false);
  if (groups == 2) l.sub_norm = make.norm(heads * width, false);
  l.heads = heads, l.groups = groups, l.width = width, l.interleaved = groups == 4, l.capacity = 6, l.place = 5;
  l.pairs = groups == 1 ? 0 : 3;
  auto &cosine = make.floats(tokens * l.pairs), &sine = make.floats(tokens * l.pairs);
  l.cosine = cosine.data(), l.sine = sine.data();
  std::vector<std::int64_t> unused;
  for (long m = 0; m < tokens; ++m) unused.push_back(m % (l.place + 1));
  l.unused = groups == 2 ? unused.data() : nullptr;
  const FFN<T> ffn = {{make.norm(kHidden, false)}, make.matrix(parts * inner, kHidden, false, true),
                      make.matrix(kHidden, inner, false, true), groups == 2 ? make.norm(inner, false) : Norm(), kind};
  auto& x = make.floats(tokens * kHidden);
  auto &keys = make.values(tokens * groups * l.capacity * width), &values = make.values(tokens * groups * l.capacity * width);
  Row want = doubles(x), want_keys = doubles(keys), want_values = doubles(values);
  for (long m = 0; m < tokens; ++m) {
    double* row = want.data() + m * kHidden;
    attention(l, row, m, want_keys, want_values);
    const Row in = normed(ffn.entry.norm, row, kHidden);
    add(row, product(ffn.down, between(ffn.sub_norm, activated(kind, product(ffn.up, in)))));
  }
  const std::string what = isa + (sizeof(T) == 2 ? " bf16" : " fp32") + " attention " + std::to_string(tokens);
  same_for_threads(what, {&x}, [&](int threads) {
    l.keys = keys.data(), l.values = values.data();
    Block<T> block{tokens, kHidden, x.data()};
    block.attention = &l;
    block.ffn = &ffn;
    run(block, threads);
  });
  const double within = sizeof(T) == 2 ? 2e-2 : 1e-5;
  expect_close(x, want, within, what);
  expect_close(doubles(keys), want_keys, within, what + " keys");
  expect_close(doubles(values), want_values, within, what + " values");
}

template <class T>
void check_experts(long tokens, bool norms, const std::string& isa) {
  Make<T> make(static_cast<unsigned>(tokens));
  const long width = 35;
  std::vector<Expert<T>> all(2);
  for (Expert<T>& expert : all) {
    expert = {make.matrix(2 * width, kHidden), make.matrix(kHidden, width), norms ? make.norm(width, false) : Norm(), 0, {}, {}};
    for (long m = &expert == all.data() ? 0 : 1; m < tokens; ++m) {
      expert.token[expert.count] = m;
      expert.weight[expert.count++] = 0.25f * static_cast<float>(m + 1);
    }
  }
  auto &x = make.floats(tokens * kHidden), &scores = make.floats(tokens * 4);
  std::vector<T> inside(static_cast<std::size_t>(tokens * kHidden));
  Make<float> wide_make(3);
  const Router<T> router = {{make.norm(kHidden, false), nullptr, nullptr}, wide_make.matrix(4, kHidden), inside.data(), scores.data()};
  Row want = doubles(x), want_inside, want_scores;
  for (long m = 0; m < tokens; ++m) {
    const Row in = normed(router.entry.norm, want.data() + m * kHidden, kHidden);
    want_inside.insert(want_inside.end(), in.begin(), in.end());
    const Row own = product(router.scores, in);
    want_scores.insert(want_scores.end(), own.begin(), own.end());
  }
  for (const Expert<T>& expert : all) {
    for (long i = 0; i < expert.count; ++i) {
      const double* from = want_inside.data() + expert.token[i] * kHidden;
      const Row inner = activated(Activation::swiglu, product(expert.up, Row(from, from + kHidden)));
      add(want.data() + expert.token[i] * kHidden, product(expert.down, between(expert.sub_norm, inner)), expert.weight[i]);
    }
  }
  const std::string what = isa + (sizeof(T) == 2 ? " bf16" : " fp32") + " experts " + std::to_string(tokens);
  same_for_threads(what, {&x, &scores}, [&](int threads) {
    Block<T> block{tokens, kHidden, x.data()};
    block.router = &router;
    run(block, threads);
    run(Experts<T>{tokens, kHidden, x.data(), inside.data(), Activation::swiglu, all.data(), 2}, threads);
  });
  const double within = sizeof(T) == 2 ? 2e-2 : 1e-5;
  expect_close(x, want, within, what);
  expect_close(scores, want_scores, within, what + " scores");
  const Matrix<T> matrix = make.matrix(70, kHidden);
  std::vector<T> logits(static_cast<std::size_t>(tokens * matrix.n));
  run(Head<T>{tokens, kHidden, x.data(), router.entry.norm, matrix, logits.data()}, 2);
  Row heads;
  for (long m = 0; m < tokens; ++m) {
    const Row own = product(matrix, normed(router.entry.norm, want.data() + m * kHidden, kHidden));
    heads.insert(heads.end(), own.begin(), own.end());
  }
  expect_close(doubles(logits), heads, 2 * within, what + " head");
}

template <class T>
void check_all(const std::string& isa) {
  for (long tokens : {1l, 2l, 7l, 8l}) check_recurrent<T>(tokens, tokens % 2 == 0, isa);
  const Activation kinds[] = {Activation::squared_relu, Activation::gated_squared_relu, Activation::swiglu, Activation::gelu,
                              Activation::gelu_exact};
  for (Activation kind : kinds) check_attention<T>(3, 2, kind, isa);
  for (long groups : {1l, 4l}) check_attention<T>(groups == 1 ? 8 : 1, groups, Activation::swiglu, isa);
  for (long tokens : {1l, 8l}) check_experts<T>(tokens, tokens == 8, isa);
}

}  // namespace

int main() {
  for (auto [name, isa] : {std::pair{"scalar", Isa::scalar}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}}) {
    if (!megaforge::cpu_has(isa)) continue;
    setenv("MEGAFORGE_CPU_ISA", name, 1);
    check_all<float>(name);
    check_all<Bf16>(name);
  }
  return megaforge::testing::finish("decode");
}
