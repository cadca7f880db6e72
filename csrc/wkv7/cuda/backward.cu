#include <type_traits>

#include "arguments.cuh"
#include "backward.cuh"
#include "start.cuh"

namespace megaforge::wkv7 {
namespace {

template <class Scalar, int kN, bool kFew>
__global__ void __launch_bounds__(PlanOf<kN, kFew>::kThreads, 2)
    backward_kernel(const BackwardArguments<Scalar, kFew> args) {
  using P = PlanOf<kN, kFew>;
  extern __shared__ __align__(16) unsigned char memory[];
  backward_block(Block<P::kThreads>{}, *reinterpret_cast<BackwardShared<Scalar, P>*>(memory), args,
                 static_cast<int>(blockIdx.x));
}

}  // namespace

const char* backward(const Problem& problem, const Tensor& dy, const void* states, float* between,
                     const float* dfinal_state, const BackwardOutputs& to, void* stream) {
  const cudaError_t error = dispatch(problem, [&](auto scalar, auto channels, auto few) {
      using Scalar = decltype(scalar);
      constexpr int kN = decltype(channels)::value;
      constexpr bool kFew = decltype(few)::value;
      using P = PlanOf<kN, kFew>;
      using State = typename Kept<Scalar, kFew>::State;
      static_assert(!kFew || Kept<Scalar, kFew>::kChunks - 2 == kStatesBetween);
      const auto out = [](void* data) { return static_cast<Scalar*>(data); };
      const BackwardArguments<Scalar, kFew> args{inputs<Scalar>(problem), view<Scalar>(dy),
                                                 static_cast<const State*>(states), between, dfinal_state,
                                                 out(to.dr), out(to.dk), out(to.dv), out(to.da), out(to.db),
                                                 to.dlog_w, to.dinitial_state};
      return start<P::kThreads, sizeof(BackwardShared<Scalar, P>)>(backward_kernel<Scalar, kN, kFew>, args, problem,
                                                                   stream);
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megaforge::wkv7
