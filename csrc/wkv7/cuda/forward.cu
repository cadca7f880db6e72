#include <type_traits>

#include "arguments.cuh"
#include "forward.cuh"
#include "start.cuh"

namespace megaforge::wkv7 {
namespace {

template <class Scalar, int kN, bool kFew>
__global__ void __launch_bounds__(Plan<kN>::kThreads, 2) forward_kernel(const ForwardArguments<Scalar, kFew> args) {
  extern __shared__ __align__(16) unsigned char memory[];
  forward_block(Block<Plan<kN>::kThreads>{}, *reinterpret_cast<ForwardShared<Scalar, kN>*>(memory), args,
                static_cast<int>(blockIdx.x));
}

}  // namespace

bool supports(int channels) { return channels == 32 || channels == 64; }

const char* forward(const Problem& problem, const float* initial_state, const ForwardOutputs& to, void* stream) {
  const cudaError_t error = dispatch(problem, [&](auto scalar, auto channels, auto few) {
      using Scalar = decltype(scalar);
      constexpr int kN = decltype(channels)::value;
      constexpr bool kFew = decltype(few)::value;
      using State = typename Kept<Scalar, kFew>::State;
      const ForwardArguments<Scalar, kFew> args{inputs<Scalar>(problem), initial_state, static_cast<Scalar*>(to.y),
                                                static_cast<State*>(to.states), to.final_state};
      return start<Plan<kN>::kThreads, sizeof(ForwardShared<Scalar, kN>)>(forward_kernel<Scalar, kN, kFew>, args,
                                                                          problem, stream);
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megaforge::wkv7
