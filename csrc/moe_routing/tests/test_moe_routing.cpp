// Routing's CPU code against its definition in double precision, over random shapes, for every instruction set of this
// CPU, and for several numbers of threads.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/testing.h"
#include "cpu/moe_routing.h"
#include "cuda/tiles.h"

using namespace megaforge::moe;
using megaforge::Isa;
using megaforge::testing::expect;
using megaforge::testing::expect_close;
using megaforge::testing::Random;

template <typename T>
struct Results {
  std::vector<T> weights, lse, dlogits;
  std::vector<std::int32_t> chosen, position;
  std::vector<std::int64_t> counts;
  std::vector<double> probability_sum, z_sum;
  bool operator==(const Results&) const = default;
};

struct Problem {
  std::int64_t tokens, sequences, experts;
  Rule rule;
  std::vector<double> logits, bias, dweights, dprobability;
};

template <typename T>
std::vector<T> as(const std::vector<double>& x) {
  return {x.begin(), x.end()};
}

template <typename T>
Results<T> run(const Problem& p, int threads) {
  const auto assignments = static_cast<std::size_t>(p.tokens * p.rule.topk);
  const auto sums = static_cast<std::size_t>(p.sequences * p.experts);
  Results<T> out;
  out.weights.resize(assignments), out.lse.resize(static_cast<std::size_t>(p.tokens));
  out.chosen.resize(assignments), out.position.resize(assignments);
  out.counts.resize(sums), out.probability_sum.resize(sums), out.z_sum.resize(1);
  out.dlogits.resize(p.logits.size());
  const auto logits = as<T>(p.logits), bias = as<T>(p.bias), dweights = as<T>(p.dweights);
  const auto dprobability = as<T>(p.dprobability);
  const double dz = 0.01;
  route<T>({logits.data(), bias.empty() ? nullptr : bias.data(), p.tokens, p.sequences, p.experts, p.rule,
            out.weights.data(), out.chosen.data(), out.lse.data(), out.position.data(), out.counts.data(),
            out.probability_sum.data(), out.z_sum.data()},
           threads);
  route_backward<T>({logits.data(), out.chosen.data(), out.lse.data(), dweights.data(), nullptr, dprobability.data(),
                     &dz, p.tokens, p.sequences, p.experts, p.rule, out.dlogits.data()},
                    threads);
  return out;
}

template <typename T>
std::vector<double> wide(const std::vector<T>& x) {
  return {x.begin(), x.end()};
}

void check_route(Random& random, int round) {
  const std::int64_t shapes[][3] = {{1, 1, 1}, {40, 8, 2}, {300, 8, 2}, {64, 33, 7}, {50, 64, 8}, {260, 24, 24}, {0, 8, 2}};
  for (const auto& [rows, experts, topk] : shapes) {
    for (int kind = 0; kind < 5; ++kind) {
      Problem p{rows * 2, 2, experts, {topk, kind % 2 == 1, kind % 2 == 0 && kind > 0, 0, 0, 1.5}, {}, {}, {}, {}};
      if (kind >= 3 && experts % 8 == 0 && topk % 2 == 0 && topk / 2 <= experts / 4) {
        p.rule.num_groups = 4, p.rule.group_topk = 2;
      }
      p.logits = random.normal(static_cast<std::size_t>(p.tokens * experts), 2);
      for (double& x : p.logits) x = std::round(x * 64) / 64;  // some are equal, none nearly
      if (kind == 1) p.bias = random.normal(static_cast<std::size_t>(experts), 0.3);
      p.dweights = random.normal(static_cast<std::size_t>(p.tokens * topk));
      p.dprobability = random.normal(static_cast<std::size_t>(2 * experts));
      for (double& x : p.bias) x = static_cast<float>(x);
      const std::string name = std::to_string(rows) + " x " + std::to_string(experts) + ", " + std::to_string(topk) +
                               " of kind " + std::to_string(kind) + ", round " + std::to_string(round);
      const auto expected = run<double>(p, 1);
      const auto got = run<float>(p, 1);
      expect(got.chosen == expected.chosen && got.position == expected.position && got.counts == expected.counts,
             name + ": choices");
      expect_close(wide(got.weights), expected.weights, 3e-6, name + ": weights");
      expect_close(wide(got.lse), expected.lse, 3e-6, name + ": lse");
      expect_close(got.probability_sum, expected.probability_sum, 3e-6, name + ": sums");
      expect_close(wide(got.dlogits), expected.dlogits, 3e-6, name + ": gradient");
      expect(run<float>(p, 3) == got, name + ": threads");
      std::vector<char> seen(got.position.size());
      for (const std::int32_t row : got.position) seen.at(static_cast<std::size_t>(row)) = 1;
      expect(std::count(seen.begin(), seen.end(), 1) == static_cast<std::ptrdiff_t>(seen.size()), name + ": rows");
    }
  }
}

void check_rows(Random& random) {
  for (const auto& [tokens, topk, width] : {std::tuple{1, 1, 1}, {30, 2, 100}, {70, 3, 64}, {600, 4, 1024}}) {
    const std::int64_t experts = 5, all = std::int64_t{tokens} * topk;
    std::vector<std::int32_t> chosen(static_cast<std::size_t>(all)), position(chosen.size());
    std::vector<char> kept(chosen.size());
    for (std::size_t a = 0; a < chosen.size(); ++a) {
      chosen[a] = static_cast<std::int32_t>((a * 7 + a / 3) % experts);
      kept[a] = a % 5 != 3;
    }
    std::vector<std::int64_t> counts(experts);
    permutation(chosen.data(), reinterpret_cast<const bool*>(kept.data()), tokens, topk, experts, position.data(),
                counts.data(), 2);
    std::int64_t rows = 0;
    for (const std::int64_t count : counts) rows += count;
    const Rows args = {Type::f32, Type::f32, tokens, width, topk, rows, position.data(), false};
    const auto x = as<float>(random.normal(static_cast<std::size_t>(tokens * width)));
    auto weights = as<float>(random.normal(chosen.size()));
    std::vector<float> copies(static_cast<std::size_t>(rows * width)), out(x.size()), dy(copies.size());
    std::vector<float> dweights(weights.size()), row_weights(static_cast<std::size_t>(rows));
    permute(args, x.data(), copies.data(), 2);
    permute_values(args, weights.data(), row_weights.data(), 4, 2);
    unpermute(args, copies.data(), weights.data(), out.data(), 2);
    unpermute_backward(args, x.data(), copies.data(), weights.data(), dy.data(), dweights.data(), 2);
    std::vector<double> sums(x.size()), dots(weights.size());
    bool copied = true, scaled = true;
    for (std::size_t a = 0; a < chosen.size(); ++a) {
      const std::size_t t = a / static_cast<std::size_t>(topk);
      expect((position[a] >= 0) == (kept[a] != 0), "dropped");
      if (position[a] < 0) continue;
      expect(row_weights[static_cast<std::size_t>(position[a])] == weights[a], "row weights");
      for (std::size_t i = 0; i < static_cast<std::size_t>(width); ++i) {
        const float value = x[t * width + i];
        const std::size_t row = static_cast<std::size_t>(position[a]) * width + i;
        copied &= copies[row] == value;
        scaled &= dy[row] == weights[a] * value;
        sums[t * width + i] += double{weights[a]} * value;
        dots[a] += double{value} * value;
      }
    }
    expect(copied && scaled, "copies and their gradients");
    expect_close(wide(out), sums, 1e-6, "sums");
    expect_close(wide(dweights), dots, 1e-6, "gradient of weights");
  }
}

// Every token is one routing block's, every expert one lane's: the CUDA kernels' cut, which needs no GPU to be walked.
void check_tiles() {
  using namespace megaforge::moe::cuda;
  for (const std::int64_t sequences : {1, 3, 8}) {
    for (const std::int64_t rows : {1, 127, 128, 129, 1000}) {
      std::vector<int> seen(static_cast<std::size_t>(rows * sequences));
      for (std::int64_t block = 0; block < routing_blocks(rows, sequences); ++block) {
        const Share share = share_of(block, rows, sequences);
        expect(share.first / kRows == block / sequences && share.last > share.first, "rows of a block");
        for (std::int64_t row = share.first; row < share.last; ++row) {
          ++seen.at(static_cast<std::size_t>(row * sequences + share.sequence));
        }
      }
      expect(std::count(seen.begin(), seen.end(), 1) == rows * sequences, "tokens of blocks");
    }
  }
  for (std::int64_t experts = 1; experts <= kMostExperts; ++experts) {
    for (const std::int64_t groups : {0, 4}) {
      const int lanes = lanes_for(experts, groups), held = held_by_lane(experts, lanes);
      expect(lanes * held >= experts && held <= 32 && (held == 1 || lanes == 32), "experts of lanes");
    }
  }
}

int main() {
  check_tiles();
  for (const auto& [name, isa] : {std::pair{"scalar", Isa::scalar}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}}) {
    if (!megaforge::cpu_has(isa)) continue;
    setenv("MEGAFORGE_CPU_ISA", name, 1);
    Random random(7);
    for (int round = 0; round < 2; ++round) check_route(random, round);
    check_rows(random);
  }
  return megaforge::testing::finish("moe_routing");
}
