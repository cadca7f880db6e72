#include <type_traits>

#include "arguments.cuh"
#include "forward.cuh"
#include "start.cuh"

namespace megaforge::wkv7 {
namespace {

template <class Scalar, int kN>
__global__ void __launch_bounds__(Plan<kN>::kThreads, 2) forward_kernel(const ForwardArguments<Scalar> args) {
  extern __shared__ __align__(16) unsigned char memory[];
  forward_block(Block<Plan<kN>::kThreads>{}, *reinterpret_cast<ForwardShared<Scalar, kN>*>(memory), args,
                static_cast<int>(blockIdx.x));
}

}  // namespace

bool supports(int channels) { return channels == 32 || channels == 64; }

const char* forward(const Problem& problem, const float* initial_state, const ForwardOutputs& to, void* stream) {
  const cudaError_t error = dispatch(problem, [&](auto scalar, auto channels) {
      using Scalar = decltype(scalar);
      constexpr int kN = decltype(channels)::value;
      const ForwardArguments<Scalar> args{inputs<Scalar>(problem), initial_state, static_cast<Scalar*>(to.y),
                                          to.states, to.final_state};
      return start<Plan<kN>::kThreads, sizeof(ForwardShared<Scalar, kN>)>(forward_kernel<Scalar, kN>, args, problem,
                                                                          stream);
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megaforge::wkv7
