// Runs the block programs of csrc/wkv7/cuda on the host, for test_wkv7_cuda_emulated.py.
#include <memory>
#include <type_traits>

#include "../../csrc/wkv7/cuda/arguments.cuh"
#include "../../csrc/wkv7/cuda/backward.cuh"
#include "../../csrc/wkv7/cuda/forward.cuh"

using namespace megaforge;
using namespace megaforge::wkv7;

namespace {

// Shared memory as a block finds it: whatever it does not write first shows as NaN.
template <class Shared>
void poison(Shared& shared) {
    static_assert(std::is_trivially_copyable_v<Shared>);
    std::memset(&shared, 0xff, sizeof(shared));
}

Problem problem_of(bool bf16, const int* shape, const void* const* x, const std::int64_t* strides,
                   const std::uint8_t* document_start, int tokens_per_state) {
    const auto tensor = [&](int i) { return Tensor{x[i], strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]}; };
    return {bf16 ? Type::kBf16 : Type::kFloat, shape[0], shape[1], shape[2], shape[3], tensor(0), tensor(1), tensor(2),
            tensor(3), tensor(4), tensor(5), document_start, tokens_per_state};
}

void multiply_by_lanes(const float* a, const float* b, float* c) {
    // mma.m16n8k8 as the PTX manual defines it: a lane holds a[i] at row (lane >> 2) + 8 (i & 1), column (lane & 3) +
    // 4 (i >> 1); b[i] at row (lane & 3) + 4 i, column lane >> 2; c[i] at row (lane >> 2) + 8 (i >> 1), column
    // 2 (lane & 3) + (i & 1).
    float whole_a[16][8], whole_b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i)
            whole_a[(lane >> 2) + 8 * (i & 1)][(lane & 3) + 4 * (i >> 1)] =
                a[left_row(lane, i) * 8 + left_column(lane, i)];
        for (int i = 0; i < 2; ++i)
            whole_b[(lane & 3) + 4 * i][lane >> 2] = b[right_row(lane, i) * 8 + right_column(lane)];
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            float sum = 0.0f;
            for (int k = 0; k < 8; ++k)
                sum += whole_a[(lane >> 2) + 8 * (i >> 1)][k] * whole_b[k][2 * (lane & 3) + (i & 1)];
            c[tile_row(lane, i) * 8 + tile_column(lane, i)] = sum;
        }
    }
}

}  // namespace

// shape: s, b, H, N. x, strides: r, log_w, k, v, a, b (and dy) with their strides of token, sequence and head.
extern "C" void emulate_forward(int bf16, int reversed, int tokens_per_state, const int* shape, const void* const* x,
                                const std::int64_t* strides, const std::uint8_t* document_start,
                                const float* initial_state, void* y, void* states, float* final_state) {
    const Problem problem = problem_of(bf16 != 0, shape, x, strides, document_start, tokens_per_state);
    dispatch(problem, [&](auto scalar, auto channels, auto few) {
        using Scalar = decltype(scalar);
        constexpr int kN = decltype(channels)::value;
        constexpr bool kFew = decltype(few)::value;
        using State = typename Kept<Scalar, kFew>::State;
        const ForwardArguments<Scalar, kFew> args{inputs<Scalar>(problem), initial_state, static_cast<Scalar*>(y),
                                                  static_cast<State*>(states), final_state};
        const auto shared = std::make_unique<ForwardShared<Scalar, PlanOf<kN, kFew>>>();
        for (int row = 0; row < problem.batch * problem.heads; ++row) {
            poison(*shared);
            forward_block(Block<PlanOf<kN, kFew>::kThreads>(reversed != 0), *shared, args, row);
        }
        return 0;
    });
}

// dx: dr, dlog_w, dk, dv, da, db.
extern "C" void emulate_backward(int bf16, int reversed, int tokens_per_state, const int* shape, const void* const* x,
                                 const std::int64_t* strides, const std::uint8_t* document_start, const void* states,
                                 float* between, const float* dfinal_state, void* const* dx, float* dinitial_state) {
    const Problem problem = problem_of(bf16 != 0, shape, x, strides, document_start, tokens_per_state);
    const Tensor dy{x[6], strides[18], strides[19], strides[20]};
    dispatch(problem, [&](auto scalar, auto channels, auto few) {
        using Scalar = decltype(scalar);
        constexpr int kN = decltype(channels)::value;
        constexpr bool kFew = decltype(few)::value;
        using State = typename Kept<Scalar, kFew>::State;
        const auto out = [&](int i) { return static_cast<Scalar*>(dx[i]); };
        const BackwardArguments<Scalar, kFew> args{inputs<Scalar>(problem), view<Scalar>(dy),
                                             static_cast<const State*>(states), between, dfinal_state,
                                             out(0), out(2), out(3), out(4), out(5), static_cast<float*>(dx[1]),
                                             dinitial_state};
        const auto shared = std::make_unique<BackwardShared<Scalar, PlanOf<kN, kFew>>>();
        for (int row = 0; row < problem.batch * problem.heads; ++row) {
            poison(*shared);
            backward_block(Block<PlanOf<kN, kFew>::kThreads>(reversed != 0), *shared, args, row);
        }
        return 0;
    });
}

// c [16, 8] = a [16, 8] b [8, 8] by the lanes' fragments, and by the host's twin of the warp's product.
extern "C" void fragment_products(const float* a, const float* b, float* by_lanes, float* by_twin) {
    multiply_by_lanes(a, b, by_lanes);
    for (int lane = 0; lane < 32; ++lane) {
        Tiles<1> sums;
        sums.clear();
        multiply<Precision::kThreeTf32, 8>(
            sums, lane, [&](int i, int k) { return a[i * 8 + k]; }, [&](int k, int j) { return b[k * 8 + j]; });
        for (int i = 0; i < 4; ++i) by_twin[tile_row(lane, i) * 8 + tile_column(lane, i)] = sums.at[0][0][i];
    }
}
