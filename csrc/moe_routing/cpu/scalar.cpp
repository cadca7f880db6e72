// Routing for any CPU, and for doubles.
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "moe_routing.h"

#define MF_ISA scalar
#define MF_PIECE 4
#include "lanes.h"
#include "pieces.h"
#include "compress.h"
#include "route_vec.h"
#include "rows.h"

namespace megaforge::moe {
namespace {

std::int64_t scratch_f64(std::int64_t experts, const Rule& rule) {
  return 8 * (3 * experts + rule.topk + 2 * rule.num_groups) + 4 * (rule.topk + rule.num_groups);
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

constexpr double kTiny = 1e-20;

// (Renormalised) weights of the chosen experts, before the scaling factor; `total`: of all scores. Returns what they
// were divided by.
double choose_weights(const Rule& rule, const double* score, const std::int32_t* chosen, double total, double* weights) {
  double whole = rule.sigmoid ? kTiny : 0.0;
  for (std::int64_t j = 0; j < rule.topk; ++j) whole += score[chosen[j]];
  if (!rule.sigmoid && rule.pre_softmax) whole = total;
  if (rule.sigmoid && rule.topk == 1) whole = 1.0;
  for (std::int64_t j = 0; j < rule.topk; ++j) weights[j] = score[chosen[j]] / whole;
  return whole;
}

// Scores of one token's logits and their sum; exp(logit - peak) for softmax.
double scores_of(const Rule& rule, const double* logits, std::int64_t experts, double peak, double* score) {
  double total = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    score[e] = rule.sigmoid ? sigmoid(logits[e]) : std::exp(logits[e] - peak);
    total += score[e];
  }
  return rule.sigmoid ? total + kTiny : total;
}

void route_f64(const Route<double>& a, const Part<double>& part, void* scratch) {
  auto* const score = static_cast<double*>(scratch);
  double* const choice = score + a.experts;
  double* const values = choice + a.experts;
  auto* const order = reinterpret_cast<std::int32_t*>(values + a.experts + a.rule.topk + 2 * a.rule.num_groups);
  for (std::int64_t row = part.first; row < part.last; ++row) {
    const std::int64_t token = row * a.sequences + part.sequence;
    const double* const logits = a.logits + token * a.experts;
    std::int32_t* const chosen = a.chosen + token * a.rule.topk;
    double* const weights = a.weights + token * a.rule.topk;
    double peak = logits[0], whole = 0;
    for (std::int64_t e = 1; e < a.experts; ++e) peak = logits[e] > peak ? logits[e] : peak;
    for (std::int64_t e = 0; e < a.experts; ++e) whole += std::exp(logits[e] - peak);
    const double total = scores_of(a.rule, logits, a.experts, peak, score);
    for (std::int64_t e = 0; e < a.experts; ++e) {
      choice[e] = (a.rule.sigmoid ? score[e] : logits[e]) + (a.expert_bias == nullptr ? 0.0 : a.expert_bias[e]);
      part.probability_sum[e] += score[e] / total;
    }
    if (a.rule.num_groups > 0) {
      const bool by_probability = a.rule.pre_softmax && !a.rule.sigmoid;  // but for a factor
      scalar::keep_best_groups(choice, by_probability ? score : choice, a.experts, a.rule, values, order);
    }
    scalar::select_any(choice, a.experts, a.rule.topk, chosen, values);
    choose_weights(a.rule, score, chosen, total, weights);
    for (std::int64_t j = 0; j < a.rule.topk; ++j) {
      weights[j] *= a.rule.scaling_factor;
      ++part.counts[chosen[j]];
    }
    a.lse[token] = peak + std::log(whole);
    *part.z_sum += a.lse[token] * a.lse[token];
  }
}

void backward_f64(const RouteBackward<double>& a, std::int64_t first, std::int64_t last, void* scratch) {
  auto* const score = static_cast<double*>(scratch);
  double* const weights = score + a.experts;
  const std::int64_t topk = a.rule.topk;
  for (std::int64_t token = first; token < last; ++token) {
    const double* const logits = a.logits + token * a.experts;
    const double* const upstream =
        a.dprobability_sum == nullptr ? nullptr : a.dprobability_sum + token % a.sequences * a.experts;
    double* const out = a.dlogits + token * a.experts;
    const std::int32_t* const chosen = a.chosen + token * topk;
    const double lse = a.lse[token];
    const double total = scores_of(a.rule, logits, a.experts, lse, score);  // 1 but for rounding, for softmax
    const double along =
        2 * lse * (a.dz_sum == nullptr ? 0.0 : *a.dz_sum) + (a.dlse == nullptr ? 0.0 : a.dlse[token]);
    double dot = 0, whole = 0;
    for (std::int64_t e = 0; e < a.experts && upstream != nullptr; ++e) dot += upstream[e] * score[e] / total;
    for (std::int64_t e = 0; e < a.experts; ++e) {
      const double slope = a.rule.sigmoid ? score[e] * (1 - score[e]) / total : score[e];
      out[e] = std::exp(logits[e] - lse) * along + (upstream == nullptr ? 0.0 : slope * (upstream[e] - dot));
    }
    if (a.dweights == nullptr) continue;
    const double* const dweights = a.dweights + token * topk;
    if (!a.rule.sigmoid && !a.rule.pre_softmax) {  // relative to the largest of the chosen, which may be tiny among all
      double peak = logits[chosen[0]];
      for (std::int64_t j = 1; j < topk; ++j) peak = logits[chosen[j]] > peak ? logits[chosen[j]] : peak;
      for (std::int64_t j = 0; j < topk; ++j) score[chosen[j]] = std::exp(logits[chosen[j]] - peak);
    }
    const double divisor = choose_weights(a.rule, score, chosen, 1.0, weights);
    for (std::int64_t j = 0; j < topk; ++j) whole += dweights[j] * weights[j];
    const double factor = a.rule.scaling_factor;
    if (!a.rule.sigmoid && a.rule.pre_softmax) {
      for (std::int64_t e = 0; e < a.experts; ++e) out[e] -= factor * whole * score[e];
      whole = 0;
    }
    if (a.rule.sigmoid && topk == 1) whole = 0;
    for (std::int64_t j = 0; j < topk; ++j) {
      const double s = score[chosen[j]];
      const double slope = a.rule.sigmoid ? s * (1 - s) / divisor : weights[j];
      out[chosen[j]] += factor * slope * (dweights[j] - whole);
    }
  }
}

void unpermute_f64(const Rows& r, const double* y, const double* weights, double* out, std::int64_t first,
                   std::int64_t last) {
  for (std::int64_t t = first; t < last; ++t) {
    for (std::int64_t i = 0; i < r.width; ++i) out[t * r.width + i] = 0;
    for (std::int64_t a = t * r.topk; a < (t + 1) * r.topk; ++a) {
      if (r.position[a] < 0) continue;
      const double w = weights == nullptr ? 1.0 : weights[a];
      const double* const from = y + r.position[a] * r.width;
      for (std::int64_t i = 0; i < r.width; ++i) out[t * r.width + i] += w * from[i];
    }
  }
}

void unpermute_backward_f64(const Rows& r, const double* grad, const double* y, const double* weights, double* dy,
                            double* dweights, std::int64_t first, std::int64_t last) {
  for (std::int64_t t = first; t < last; ++t) {
    for (std::int64_t a = t * r.topk; a < (t + 1) * r.topk; ++a) {
      dweights[a] = 0;
      if (r.position[a] < 0) continue;
      const std::int64_t row = r.position[a] * r.width;
      for (std::int64_t i = 0; i < r.width; ++i) {
        dweights[a] += grad[t * r.width + i] * y[row + i];
        dy[row + i] = weights[a] * grad[t * r.width + i];
      }
    }
  }
}

void unpermute(const Rows& r, const void* y, const void* weights, void* out, std::int64_t first, std::int64_t last) {
  if (r.type != Type::f64) return scalar::unpermute(r, y, weights, out, first, last);
  unpermute_f64(r, static_cast<const double*>(y), static_cast<const double*>(weights), static_cast<double*>(out), first,
                last);
}

void unpermute_backward(const Rows& r, const void* grad, const void* y, const void* weights, void* dy, void* dweights,
                        std::int64_t first, std::int64_t last) {
  if (r.type != Type::f64) return scalar::unpermute_backward(r, grad, y, weights, dy, dweights, first, last);
  unpermute_backward_f64(r, static_cast<const double*>(grad), static_cast<const double*>(y),
                         static_cast<const double*>(weights), static_cast<double*>(dy), static_cast<double*>(dweights),
                         first, last);
}

}  // namespace

const RouteKernels<float> scalar_route_f32 = {scalar::scratch_bytes, scalar::route_part, scalar::backward_part};
const RouteKernels<double> scalar_route_f64 = {scratch_f64, route_f64, backward_f64};
const RowKernels scalar_rows = {scalar::permute, unpermute, unpermute_backward};

}  // namespace megaforge::moe
