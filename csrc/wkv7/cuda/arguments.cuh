// From the untyped arguments of a launch to those of the block programs.
#pragma once

#include "chunk.cuh"
#include "launch.h"

namespace megaforge::wkv7 {

template <class Scalar>
View<Scalar> view(const Tensor& x) {
  return {static_cast<const Scalar*>(x.data), x.token, x.batch, x.head};
}

template <class Scalar>
Inputs<Scalar> inputs(const Problem& p) {
  return {p.tokens,          p.batch,         p.heads,         view<Scalar>(p.r),     view<Scalar>(p.k),
      view<Scalar>(p.v), view<Scalar>(p.a), view<Scalar>(p.b), view<float>(p.log_w), p.document_start};
}

template <bool kFew, class Scalar, class Run>
auto dispatch_channels(const Problem& problem, Scalar scalar, Run run) {
  const std::bool_constant<kFew> few;
  return problem.channels == 64 ? run(scalar, std::integral_constant<int, 64>{}, few)
                                : run(scalar, std::integral_constant<int, 32>{}, few);
}

// Calls run(a value of the scalar type, an integral constant N, whether few states are kept) as the problem asks.
template <class Run>
auto dispatch(const Problem& problem, Run run) {
  const bool bf16 = problem.type == Type::kBf16;
  if (problem.tokens_per_state == kFewTokens)
    return bf16 ? dispatch_channels<true>(problem, Bf16{}, run) : dispatch_channels<true>(problem, 0.0f, run);
  return bf16 ? dispatch_channels<false>(problem, Bf16{}, run) : dispatch_channels<false>(problem, 0.0f, run);
}

}  // namespace megaforge::wkv7
