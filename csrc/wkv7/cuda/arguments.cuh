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

// Calls run(a value of the scalar type, an integral constant N) for the problem's type and head size.
template <class Run>
auto dispatch(const Problem& problem, Run run) {
  const bool bf16 = problem.type == Type::kBf16;
  if (problem.channels == 64) {
    using N = std::integral_constant<int, 64>;
    return bf16 ? run(Bf16{}, N{}) : run(0.0f, N{});
  }
  using N = std::integral_constant<int, 32>;
  return bf16 ? run(Bf16{}, N{}) : run(0.0f, N{});
}

}  // namespace megaforge::wkv7
