// The CUDA implementations of megaforge::moe_*; megaforge/kernels/moe_routing.py defines the operators. Positions are
// trusted: to check them would make the host wait.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <Python.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "launch.h"

namespace megaforge::moe::cuda {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

void check(int status) { C10_CUDA_CHECK(static_cast<cudaError_t>(status)); }

Maybe contiguous(const Maybe& x, at::ScalarType type) { return x ? Maybe(x->to(type).contiguous()) : std::nullopt; }

template <typename T>
const T* data(const Maybe& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

Rule make_rule(int64_t topk, bool sigmoid, bool pre_softmax, int64_t num_groups, int64_t group_topk,
               double scaling_factor, const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && (logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble),
              "megaforge::moe_route: routes [T, E] in float32 or float64, not ", logits.scalar_type(), logits.sizes());
  const int64_t experts = logits.size(1);
  TORCH_CHECK(experts <= kMostExperts && num_groups <= kMostGroups && topk >= 1 && topk <= experts,
              "megaforge::moe_route: topk ", topk, " of ", experts, " experts in ", num_groups, " groups; at most ",
              kMostExperts, " experts and ", kMostGroups, " groups");
  if (num_groups > 0) {
    TORCH_CHECK(experts % num_groups == 0 && group_topk >= 1 && group_topk <= num_groups && topk % group_topk == 0 &&
                    topk / group_topk <= experts / num_groups,
                "megaforge::moe_route: topk ", topk, " from ", group_topk, " of ", num_groups, " groups of ", experts);
  }
  return {topk, sigmoid, pre_softmax, num_groups, group_topk, scaling_factor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(
    const Tensor& logits_any, const Maybe& expert_bias, int64_t sequences, int64_t topk, bool sigmoid, bool pre_softmax,
    int64_t num_groups, int64_t group_topk, double scaling_factor) {
  const c10::cuda::CUDAGuard guard(logits_any.device());
  const Rule rule = make_rule(topk, sigmoid, pre_softmax, num_groups, group_topk, scaling_factor, logits_any);
  const Tensor logits = logits_any.contiguous();
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  TORCH_CHECK(sequences >= 1 && tokens % sequences == 0, "megaforge::moe_route: ", tokens, " tokens of ", sequences);
  const Maybe bias = contiguous(expert_bias, logits.scalar_type());
  const auto options = logits.options();
  const auto ints = options.dtype(at::kInt), doubles = options.dtype(at::kDouble);
  Tensor weights = at::empty({tokens, topk}, options), chosen = at::empty({tokens, topk}, ints);
  Tensor lse = at::empty({tokens}, options), position = at::empty({tokens, topk}, ints);
  Tensor counts = at::zeros({sequences, experts}, options.dtype(at::kLong));
  Tensor probability = at::zeros({sequences, experts}, doubles), z_sum = at::zeros({}, doubles);
  if (tokens == 0) return {weights, chosen, lse, position, counts, probability, z_sum};
  const int64_t rows = tokens / sequences, blocks = routing_blocks(rows, sequences), tiles = pieces(rows, kRows);
  Tensor sums = at::empty({blocks, experts}, doubles), z_sums = at::empty({blocks}, doubles);
  Tensor tile_counts = at::empty({blocks, experts}, ints), starts = at::empty({tiles, experts}, ints);
  Tensor totals = at::empty({experts}, options.dtype(at::kLong));
  const Partial partial = {sums.mutable_data_ptr<double>(), tile_counts.mutable_data_ptr<int32_t>(),
                           z_sums.mutable_data_ptr<double>()};
  const auto run = [&]<typename T>(T) {
    check(launch_route<T>({logits.const_data_ptr<T>(), data<T>(bias), tokens, sequences, experts, rule,
                           weights.mutable_data_ptr<T>(), chosen.mutable_data_ptr<int32_t>(), lse.mutable_data_ptr<T>(),
                           nullptr, nullptr, nullptr, nullptr},
                          partial, stream()));
  };
  logits.scalar_type() == at::kDouble ? run(double{}) : run(float{});
  check(launch_sums(partial, blocks, sequences, experts, counts.mutable_data_ptr<int64_t>(),
                    probability.mutable_data_ptr<double>(), z_sum.mutable_data_ptr<double>(), stream()));
  check(launch_starts(partial.counts, tiles, sequences, experts, starts.mutable_data_ptr<int32_t>(),
                      totals.mutable_data_ptr<int64_t>(), stream()));
  check(launch_place(chosen.const_data_ptr<int32_t>(), nullptr, tokens * topk, kRows * sequences * topk, experts,
                     starts.const_data_ptr<int32_t>(), position.mutable_data_ptr<int32_t>(), stream()));
  return {weights, chosen, lse, position, counts, probability, z_sum};
}

Tensor moe_route_backward(const Tensor& logits_any, const Tensor& chosen_any, const Tensor& lse_any,
                          const Maybe& dweights_any, const Maybe& dlse_any, const Maybe& dprobability_any,
                          const Maybe& dz_any, int64_t topk, bool sigmoid, bool pre_softmax, int64_t num_groups,
                          int64_t group_topk, double scaling_factor) {
  const c10::cuda::CUDAGuard guard(logits_any.device());
  const Rule rule = make_rule(topk, sigmoid, pre_softmax, num_groups, group_topk, scaling_factor, logits_any);
  const Tensor logits = logits_any.contiguous(), chosen = chosen_any.contiguous(), lse = lse_any.contiguous();
  const auto type = logits.scalar_type();
  const Maybe dweights = contiguous(dweights_any, type), dlse = contiguous(dlse_any, type);
  const Maybe dprobability = contiguous(dprobability_any, type), dz = contiguous(dz_any, at::kDouble);
  Tensor dlogits = at::empty_like(logits);
  if (logits.size(0) == 0) return dlogits;
  const auto run = [&]<typename T>(T) {
    check(launch_route_backward<T>(
        {logits.const_data_ptr<T>(), chosen.const_data_ptr<int32_t>(), lse.const_data_ptr<T>(), data<T>(dweights),
         data<T>(dlse), data<T>(dprobability), data<double>(dz), logits.size(0),
         dprobability ? dprobability->size(0) : 1, logits.size(1), rule, dlogits.mutable_data_ptr<T>()},
        stream()));
  };
  type == at::kDouble ? run(double{}) : run(float{});
  return dlogits;
}

std::tuple<Tensor, Tensor> moe_permutation(const Tensor& experts, int64_t num_experts, const Maybe& kept_any) {
  const c10::cuda::CUDAGuard guard(experts.device());
  const Tensor chosen = experts.to(at::kInt).contiguous();
  const Maybe kept = contiguous(kept_any, at::kBool);
  TORCH_CHECK(num_experts <= kMostExperts, "megaforge::moe_permutation: at most ", kMostExperts, " experts");
  Tensor position = at::empty_like(chosen), counts = at::zeros({num_experts}, chosen.options().dtype(at::kLong));
  const int64_t assignments = chosen.numel(), tiles = pieces(assignments, kAssignments);
  if (assignments == 0) return {position, counts};
  Tensor tile_counts = at::empty({tiles, num_experts}, chosen.options()), starts = at::empty_like(tile_counts);
  check(launch_count(chosen.const_data_ptr<int32_t>(), data<bool>(kept), assignments, kAssignments, num_experts,
                     tile_counts.mutable_data_ptr<int32_t>(), stream()));
  check(launch_starts(tile_counts.const_data_ptr<int32_t>(), tiles, 1, num_experts, starts.mutable_data_ptr<int32_t>(),
                      counts.mutable_data_ptr<int64_t>(), stream()));
  check(launch_place(chosen.const_data_ptr<int32_t>(), data<bool>(kept), assignments, kAssignments, num_experts,
                     starts.const_data_ptr<int32_t>(), position.mutable_data_ptr<int32_t>(), stream()));
  return {position, counts};
}

// Half goes by way of float: models of ours train in bfloat16.
Tensor computable(const Tensor& x) { return (x.scalar_type() == at::kHalf ? x.to(at::kFloat) : x).contiguous(); }

Rows make_rows(const Tensor& x, const Tensor& position, int64_t rows) {
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kDouble, "megaforge::moe_*: rows of ", type,
              "; use float32, bfloat16, float16 or float64");
  TORCH_CHECK(x.dim() == 2 && position.dim() == 2 && position.scalar_type() == at::kInt,
              "megaforge::moe_*: expected rows [n, h] and int32 positions [T, k], got ", x.sizes(), position.sizes());
  return {type == at::kFloat ? Type::f32 : type == at::kDouble ? Type::f64 : Type::bf16,
          type == at::kDouble ? Type::f64 : Type::f32,
          position.size(0), x.size(1), position.size(1), rows, position.const_data_ptr<int32_t>(), false};
}

std::tuple<Tensor, Tensor> moe_permute(const Tensor& x_any, const Maybe& weights_any, const Tensor& position_any,
                                       int64_t rows) {
  const c10::cuda::CUDAGuard guard(x_any.device());
  const Tensor position = position_any.contiguous(), x = computable(x_any);
  const Rows args = make_rows(x, position, rows);
  Tensor out = at::empty({rows, x.size(1)}, x.options());
  if (rows > 0) check(launch_permute(args, x.const_data_ptr(), out.mutable_data_ptr(), stream()));
  Tensor row_weights = at::empty({0}, x_any.options());
  if (weights_any) {
    const Tensor weights = weights_any->contiguous();
    row_weights = at::empty({rows}, weights.options());
    if (rows > 0) {
      check(launch_permute_values(args, weights.const_data_ptr(), row_weights.mutable_data_ptr(),
                                  static_cast<int>(weights.element_size()), stream()));
    }
  }
  return {out.to(x_any.scalar_type()), row_weights};
}

Tensor moe_unpermute(const Tensor& y_any, const Maybe& weights_any, const Tensor& position_any) {
  const c10::cuda::CUDAGuard guard(y_any.device());
  const Tensor position = position_any.contiguous(), y = computable(y_any);
  const Rows args = make_rows(y, position, y.size(0));
  const Maybe weights = contiguous(weights_any, y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Tensor out = at::empty({position.size(0), y.size(1)}, y.options());
  if (position.size(0) > 0) {
    check(launch_unpermute(args, y.const_data_ptr(), weights ? weights->const_data_ptr() : nullptr,
                           out.mutable_data_ptr(), stream()));
  }
  return out.to(y_any.scalar_type());
}

std::tuple<Tensor, Tensor> moe_unpermute_backward(const Tensor& grad_any, const Maybe& y_any, const Maybe& weights_any,
                                                  const Tensor& position_any, int64_t rows) {
  if (!weights_any) {
    return {std::get<0>(moe_permute(grad_any, std::nullopt, position_any, rows)), at::empty({0}, grad_any.options())};
  }
  const c10::cuda::CUDAGuard guard(grad_any.device());
  TORCH_CHECK(y_any && y_any->size(0) == rows, "megaforge::moe_unpermute_backward: y must be [rows, h]");
  const Tensor position = position_any.contiguous(), grad = computable(grad_any), y = computable(*y_any);
  const Rows args = make_rows(y, position, rows);
  const Maybe weights = contiguous(weights_any, y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Tensor dy = at::empty_like(y), dweights = at::empty_like(*weights);
  if (position.size(0) > 0) {
    check(launch_unpermute_backward(args, grad.const_data_ptr(), y.const_data_ptr(), weights->const_data_ptr(),
                                    dy.mutable_data_ptr(), dweights.mutable_data_ptr(), stream()));
  }
  return {dy.to(grad_any.scalar_type()), dweights.to(weights_any->scalar_type())};
}

TORCH_LIBRARY_IMPL(megaforge, CUDA, library) {
  library.impl("moe_route", &moe_route);
  library.impl("moe_route_backward", &moe_route_backward);
  library.impl("moe_permutation", &moe_permutation);
  library.impl("moe_permute", &moe_permute);
  library.impl("moe_unpermute", &moe_unpermute);
  library.impl("moe_unpermute_backward", &moe_unpermute_backward);
}

}  // namespace
}  // namespace megaforge::moe::cuda

// Importing the module registers the operators; it has no functions of its own.
PyMODINIT_FUNC PyInit__moe_routing_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_moe_routing_cuda", nullptr, -1, nullptr, nullptr, nullptr,
                               nullptr, nullptr};
  return PyModule_Create(&module);
}
