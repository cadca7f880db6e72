#include <type_traits>

#include "arguments.cuh"
#include "forward.cuh"
#include "start.cuh"

namespace megaforge::wkv7 {
namespace {

// A multiprocessor takes this many blocks of the larger heads at once, as its shared memory has room for.
template <bool kFew>
constexpr int kBlocks = kFew ? 3 : 2;

template <class Scalar, int kN, bool kFew>
__global__ void __launch_bounds__(PlanOf<kN, kFew>::kThreads, kBlocks<kFew>)
    forward_kernel(const ForwardArguments<Scalar, kFew> args) {
  using P = PlanOf<kN, kFew>;
  extern __shared__ __align__(16) unsigned char memory[];
  forward_block(Block<P::kThreads>{}, *reinterpret_cast<ForwardShared<Scalar, P>*>(memory), args,
                static_cast<int>(blockIdx.x));
}

}  // namespace

bool supports(int channels) { return channels == 32 || channels == 64; }

const char* forward(const Problem& problem, const float* initial_state, const ForwardOutputs& to, void* stream) {
  const cudaError_t error = dispatch(problem, [&](auto scalar, auto channels, auto few) {
      using Scalar = decltype(scalar);
      constexpr int kN = decltype(channels)::value;
      constexpr bool kFew = decltype(few)::value;
      using P = PlanOf<kN, kFew>;
      using State = typename Kept<Scalar, kFew>::State;
      const ForwardArguments<Scalar, kFew> args{inputs<Scalar>(problem), initial_state, static_cast<Scalar*>(to.y),
                                                static_cast<State*>(to.states), to.final_state};
      return start<P::kThreads, sizeof(ForwardShared<Scalar, P>)>(forward_kernel<Scalar, kN, kFew>, args, problem,
                                                                  stream);
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megaforge::wkv7
