#include <type_traits>

#include "arguments.cuh"
#include "forward.cuh"

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
        constexpr int kShared = sizeof(ForwardShared<Scalar, kN>);
        const auto kernel = forward_kernel<Scalar, kN>;
        const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
        if (status != cudaSuccess) return status;
        const auto blocks = static_cast<unsigned>(problem.batch * problem.heads);
        kernel<<<blocks, Plan<kN>::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(args);
        return cudaGetLastError();
    });
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace megaforge::wkv7
