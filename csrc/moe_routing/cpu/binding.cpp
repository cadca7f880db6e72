// The CPU implementations of megaforge::moe_*; megaforge/kernels/moe_routing.py defines the operators.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <Python.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "moe_routing.h"

namespace megaforge::moe {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

Maybe contiguous(const Maybe& x, at::ScalarType type) {
  return x ? Maybe(x->to(type).contiguous()) : std::nullopt;
}

template <typename T>
const T* data(const Maybe& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

Rule make_rule(int64_t topk, bool sigmoid, bool pre_softmax, int64_t num_groups, int64_t group_topk,
               double scaling_factor, int64_t experts) {
  TORCH_CHECK(topk >= 1 && topk <= experts, "megaforge::moe_route: topk ", topk, " of ", experts, " experts");
  if (num_groups > 0) {
    TORCH_CHECK(experts % num_groups == 0 && group_topk >= 1 && group_topk <= num_groups && topk % group_topk == 0 &&
                    topk / group_topk <= experts / num_groups,
                "megaforge::moe_route: topk ", topk, " from ", group_topk, " of ", num_groups, " groups of ", experts,
                " experts");
  }
  return {topk, sigmoid, pre_softmax, num_groups, group_topk, scaling_factor};
}

void check_logits(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2, "megaforge::moe_route: expected logits [T, E], got ", logits.sizes());
  TORCH_CHECK(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble,
              "megaforge::moe_route: routes in float32 or float64, not ", logits.scalar_type());
  TORCH_CHECK(logits.numel() <= std::numeric_limits<int32_t>::max(), "megaforge::moe_route: too many logits");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(
    const Tensor& logits_any, const Maybe& expert_bias, int64_t sequences, int64_t topk, bool sigmoid, bool pre_softmax,
    int64_t num_groups, int64_t group_topk, double scaling_factor) {
  check_logits(logits_any);
  const Tensor logits = logits_any.contiguous();
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  TORCH_CHECK(sequences >= 1 && tokens % sequences == 0, "megaforge::moe_route: ", tokens, " tokens of ", sequences,
              " sequences");
  const Maybe bias = contiguous(expert_bias, logits.scalar_type());
  TORCH_CHECK(!bias || bias->numel() == experts, "megaforge::moe_route: expert_bias must be [E]");
  const Rule rule = make_rule(topk, sigmoid, pre_softmax, num_groups, group_topk, scaling_factor, experts);
  const auto ints = logits.options().dtype(at::kInt), longs = logits.options().dtype(at::kLong);
  const auto doubles = logits.options().dtype(at::kDouble);
  Tensor weights = at::empty({tokens, topk}, logits.options()), chosen = at::empty({tokens, topk}, ints);
  Tensor lse = at::empty({tokens}, logits.options()), position = at::empty({tokens, topk}, ints);
  Tensor counts = at::empty({sequences, experts}, longs), probability = at::empty({sequences, experts}, doubles);
  Tensor z_sum = at::empty({}, doubles);
  const auto run = [&]<typename T>(T) {
    route<T>({logits.const_data_ptr<T>(), data<T>(bias), tokens, sequences, experts, rule,
              weights.mutable_data_ptr<T>(), chosen.mutable_data_ptr<int32_t>(), lse.mutable_data_ptr<T>(),
              position.mutable_data_ptr<int32_t>(), counts.mutable_data_ptr<int64_t>(),
              probability.mutable_data_ptr<double>(), z_sum.mutable_data_ptr<double>()},
             at::get_num_threads());
  };
  logits.scalar_type() == at::kDouble ? run(double{}) : run(float{});
  return {weights, chosen, lse, position, counts, probability, z_sum};
}

Tensor moe_route_backward(const Tensor& logits_any, const Tensor& chosen_any, const Tensor& lse_any,
                          const Maybe& dweights_any, const Maybe& dlse_any, const Maybe& dprobability_any,
                          const Maybe& dz_any, int64_t topk, bool sigmoid, bool pre_softmax, int64_t num_groups,
                          int64_t group_topk, double scaling_factor) {
  check_logits(logits_any);
  const Tensor logits = logits_any.contiguous(), chosen = chosen_any.contiguous(), lse = lse_any.contiguous();
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Rule rule = make_rule(topk, sigmoid, pre_softmax, num_groups, group_topk, scaling_factor, experts);
  const auto type = logits.scalar_type();
  const Maybe dweights = contiguous(dweights_any, type), dlse = contiguous(dlse_any, type);
  const Maybe dprobability = contiguous(dprobability_any, type), dz = contiguous(dz_any, at::kDouble);
  TORCH_CHECK(chosen.scalar_type() == at::kInt && chosen.size(0) == tokens && chosen.size(1) == topk &&
                  lse.numel() == tokens && (!dweights || dweights->sizes() == chosen.sizes()) &&
                  (!dlse || dlse->numel() == tokens) &&
                  (!dprobability || (dprobability->dim() == 2 && dprobability->size(1) == experts)),
              "megaforge::moe_route_backward: shapes or types do not fit logits ", logits.sizes());
  Tensor dlogits = at::empty({tokens, experts}, logits.options());
  const auto run = [&]<typename T>(T) {
    route_backward<T>({logits.const_data_ptr<T>(), chosen.const_data_ptr<int32_t>(), lse.const_data_ptr<T>(),
                       data<T>(dweights), data<T>(dlse), data<T>(dprobability), data<double>(dz), tokens,
                       dprobability ? dprobability->size(0) : 1, experts, rule, dlogits.mutable_data_ptr<T>()},
                      at::get_num_threads());
  };
  type == at::kDouble ? run(double{}) : run(float{});
  return dlogits;
}

std::tuple<Tensor, Tensor> moe_permutation(const Tensor& experts, int64_t num_experts, const Maybe& kept_any) {
  const Tensor chosen = experts.to(at::kInt).contiguous();
  const Maybe kept = contiguous(kept_any, at::kBool);
  TORCH_CHECK(chosen.dim() == 2 && (!kept || kept->sizes() == chosen.sizes()),
              "megaforge::moe_permutation: expected experts and kept [T, k], got ", chosen.sizes());
  if (chosen.numel() > 0) {
    const auto [least, most] = chosen.aminmax();
    TORCH_CHECK(least.item<int>() >= 0 && most.item<int>() < num_experts, "megaforge::moe_permutation: experts from ",
                least.item<int>(), " to ", most.item<int>(), " of ", num_experts);
  }
  Tensor position = at::empty_like(chosen), counts = at::empty({num_experts}, chosen.options().dtype(at::kLong));
  permutation(chosen.const_data_ptr<int32_t>(), data<bool>(kept), chosen.size(0), chosen.size(1), num_experts,
              position.mutable_data_ptr<int32_t>(), counts.mutable_data_ptr<int64_t>(), at::get_num_threads());
  return {position, counts};
}

// Half goes by way of float: no model of ours trains in it on a CPU.
Tensor computable(const Tensor& x) { return (x.scalar_type() == at::kHalf ? x.to(at::kFloat) : x).contiguous(); }

Rows make_rows(const Tensor& x, const Tensor& position, int64_t rows) {
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kDouble, "megaforge::moe_*: rows of ", type,
              " are not supported on CPUs; use float32, bfloat16, float16 or float64");
  TORCH_CHECK(x.dim() == 2 && position.dim() == 2 && position.scalar_type() == at::kInt && position.is_contiguous(),
              "megaforge::moe_*: expected rows [n, h] and int32 positions [T, k], got ", x.sizes(), " and ",
              position.sizes());
  return {type == at::kFloat ? Type::f32 : type == at::kDouble ? Type::f64 : Type::bf16,
          type == at::kDouble ? Type::f64 : Type::f32,
          position.size(0), x.size(1), position.size(1), rows, position.const_data_ptr<int32_t>(), false};
}

// Positions name rows, so a wrong one would write anywhere.
void check_positions(const Tensor& position, int64_t rows) {
  const int32_t* const p = position.const_data_ptr<int32_t>();
  int64_t named = 0;
  bool wrong = false;
  for (int64_t a = 0; a < position.numel(); ++a) {
    named += p[a] >= 0;
    wrong |= p[a] >= rows;
  }
  TORCH_CHECK(!wrong && named == rows, "megaforge::moe_*: positions name ", named, " rows of ", rows);
}

std::tuple<Tensor, Tensor> moe_permute(const Tensor& x_any, const Maybe& weights_any, const Tensor& position_any,
                                       int64_t rows) {
  const Tensor position = position_any.contiguous(), x = computable(x_any);
  const Rows args = make_rows(x, position, rows);
  TORCH_CHECK(x.size(0) == position.size(0), "megaforge::moe_permute: ", x.size(0), " tokens, positions of ",
              position.size(0));
  check_positions(position, rows);
  Tensor out = at::empty({rows, x.size(1)}, x.options());
  permute(args, x.const_data_ptr(), out.mutable_data_ptr(), at::get_num_threads());
  Tensor row_weights = at::empty({0}, x_any.options());
  if (weights_any) {
    const Tensor weights = weights_any->contiguous();
    TORCH_CHECK(weights.sizes() == position.sizes(), "megaforge::moe_permute: weights must be [T, k]");
    row_weights = at::empty({rows}, weights.options());
    permute_values(args, weights.const_data_ptr(), row_weights.mutable_data_ptr(),
                   static_cast<int>(weights.element_size()), at::get_num_threads());
  }
  return {out.to(x_any.scalar_type()), row_weights};
}

// Weights in the precision of the arithmetic.
Maybe computable_weights(const Maybe& weights, const Tensor& y, const Tensor& position) {
  TORCH_CHECK(!weights || weights->sizes() == position.sizes(), "megaforge::moe_unpermute: weights must be [T, k]");
  return contiguous(weights, y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

Tensor moe_unpermute(const Tensor& y_any, const Maybe& weights_any, const Tensor& position_any) {
  const Tensor position = position_any.contiguous(), y = computable(y_any);
  const Rows args = make_rows(y, position, y.size(0));
  check_positions(position, y.size(0));
  const Maybe weights = computable_weights(weights_any, y, position);
  Tensor out = at::empty({position.size(0), y.size(1)}, y.options());
  unpermute(args, y.const_data_ptr(), weights ? weights->const_data_ptr() : nullptr, out.mutable_data_ptr(),
            at::get_num_threads());
  return out.to(y_any.scalar_type());
}

std::tuple<Tensor, Tensor> moe_unpermute_backward(const Tensor& grad_any, const Maybe& y_any, const Maybe& weights_any,
                                                  const Tensor& position_any, int64_t rows) {
  if (!weights_any) {
    return {std::get<0>(moe_permute(grad_any, std::nullopt, position_any, rows)), at::empty({0}, grad_any.options())};
  }
  TORCH_CHECK(y_any && y_any->size(0) == rows && y_any->size(1) == grad_any.size(1) &&
                  grad_any.size(0) == position_any.size(0) && y_any->scalar_type() == grad_any.scalar_type(),
              "megaforge::moe_unpermute_backward: y must be the [rows, h] that the weights were applied to");
  const Tensor position = position_any.contiguous(), grad = computable(grad_any), y = computable(*y_any);
  const Rows args = make_rows(y, position, rows);
  check_positions(position, rows);
  const Maybe weights = computable_weights(weights_any, y, position);
  Tensor dy = at::empty_like(y), dweights = at::empty_like(*weights);
  unpermute_backward(args, grad.const_data_ptr(), y.const_data_ptr(), weights->const_data_ptr(), dy.mutable_data_ptr(),
                     dweights.mutable_data_ptr(), at::get_num_threads());
  return {dy.to(grad_any.scalar_type()), dweights.to(weights_any->scalar_type())};
}

TORCH_LIBRARY_IMPL(megaforge, CPU, library) {
  library.impl("moe_route", &moe_route);
  library.impl("moe_route_backward", &moe_route_backward);
  library.impl("moe_permutation", &moe_permutation);
  library.impl("moe_permute", &moe_permute);
  library.impl("moe_unpermute", &moe_unpermute);
  library.impl("moe_unpermute_backward", &moe_unpermute_backward);
}

}  // namespace
}  // namespace megaforge::moe

// Importing the module registers the operators; it has no functions of its own.
PyMODINIT_FUNC PyInit__moe_routing_cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_moe_routing_cpu", nullptr, -1, nullptr, nullptr, nullptr,
                               nullptr, nullptr};
  return PyModule_Create(&module);
}
