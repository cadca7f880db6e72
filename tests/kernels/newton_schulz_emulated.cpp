// Runs the block programs of csrc/newton_schulz/cuda on the host, for test_newton_schulz_cuda_emulated.py.
#include <memory>
#include <type_traits>
#include <vector>

#include "../../csrc/newton_schulz/cuda/mma.cuh"
#include "../../csrc/newton_schulz/cuda/steps.h"
#include "../../csrc/newton_schulz/cuda/wgmma.cuh"

using namespace megaforge;
using namespace megaforge::newton_schulz;

namespace {

template <class Sums>
void run(const Product& p, bool reversed) {
    const auto shared = std::make_unique<Shared>();
    shared_memory = reinterpret_cast<const unsigned char*>(shared.get());
    const int high = tiles_along(p.rows);
    const std::int64_t tiles = p.symmetric ? lower_tiles(high) : std::int64_t{high} * tiles_along(p.columns);
    for (std::int64_t block = 0; block < tiles * p.batch; ++block) {
        // Shared memory as a block finds it: whatever it does not write first shows as NaN.
        static_assert(std::is_trivially_copyable_v<Shared>);
        std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(Shared));
        product_block<Sums>(Block<kThreads>(reversed), *shared, p, block);
    }
}

void multiply_emulated(const Product& p, bool wgmma, bool reversed) {
    if (wgmma) run<WgmmaSums>(p, reversed);
    else run<MmaSums>(p, reversed);
}

}  // namespace

// shape: batch, rows, columns, depth.
extern "C" void emulate_product(int wgmma, int reversed, int eager, const int* shape, const Bf16* left,
                                const Bf16* right, const Bf16* add, Bf16* out, Bf16* mirror, float scale,
                                float add_scale, int symmetric) {
    AsyncCopies::eager = eager != 0;
    multiply_emulated({left, right, add, out, mirror, shape[0], shape[1], shape[2], shape[3], scale, add_scale,
                       symmetric != 0},
                      wgmma != 0, reversed != 0);
}

// shape: batch, m, n with m <= n; steps [count][3]; out [batch, m, n], or its transpose.
extern "C" void emulate_steps(int wgmma, const int* shape, const Bf16* x, const Bf16* turned, const float* steps,
                              int count, int transposed, Bf16* out) {
    const std::size_t size = std::size_t(shape[0]) * shape[1] * shape[2], square = std::size_t(shape[0]) * shape[1] * shape[1];
    AsyncCopies::eager = false;
    std::vector<Bf16> buffers[6];
    for (int i = 0; i < 6; ++i) buffers[i].assign(i < 4 ? size : square, Bf16{0xffff});
    Workspace work{{{buffers[0].data(), buffers[1].data()}, {buffers[2].data(), buffers[3].data()}},
                   buffers[4].data(), buffers[5].data()};
    std::vector<Step> all;
    for (int i = 0; i < count; ++i) all.push_back({steps[3 * i], steps[3 * i + 1], steps[3 * i + 2]});
    iterate(shape[0], shape[1], shape[2], {x, turned}, work, all, transposed != 0,
            [&](const Product& product) { multiply_emulated(product, wgmma != 0, false); });
    const Results result = work.results[(count - 1) % 2];
    std::memcpy(out, transposed != 0 ? result.transposed : result.x, size * sizeof(Bf16));
}

// Tiles [first, first + count) in their order: [count][2]. columns 0: the lower ones of rows x rows.
extern "C" void enumerate_tiles(int rows, int columns, int first, int count, int* places) {
    for (int i = 0; i < count; ++i) {
        const Place place = columns == 0 ? lower_place(first + i, rows) : grid_place(first + i, rows, columns);
        places[2 * i] = place.row, places[2 * i + 1] = place.column;
    }
}

// One stage's product c [128, 128] of a and b [128, 64] as ldmatrix and mma.m16n8k16 do it by the PTX manual: lane 8 q + r
// gives the address of row r of matrix q, of which lane l gets the values 2 (l & 3) and the next of row l >> 2. In the
// product a lane's register i holds row (l >> 2) + 8 (i & 1), depths 2 (l & 3) + 8 (i >> 1) and the next of the left
// factor, depths 2 (l & 3) + 8 i and the next of column l >> 2 of the right one; its result i is at row (l >> 2) +
// 8 (i >> 1), column 2 (l & 3) + (i & 1).
extern "C" void multiply_by_lanes(const Bf16* a, const Bf16* b, float* c) {
    Stage stage;
    for (int row = 0; row < kTile; ++row) {
        for (int k = 0; k < kDepth; ++k) {
            stage.left[place_in_stage(row, k / kPiece) + k % kPiece] = a[row * kDepth + k];
            stage.right[place_in_stage(row, k / kPiece) + k % kPiece] = b[row * kDepth + k];
        }
    }
    for (int i = 0; i < kTile * kTile; ++i) c[i] = 0.0f;
    const auto loaded = [](const Bf16* from, const auto& piece_of, int lane, int q, int which) {
        return to_float(from[piece_of(8 * q + (lane >> 2)) + 2 * (lane & 3) + which]);
    };
    for (int warp = 0; warp < kThreads / 32; ++warp) {
        for (int step = 0; step < kDepth / kStep; ++step) {
            for (int m = 0; m < kHigh; ++m) {
                for (int j = 0; j < kWide; ++j) {
                    const auto left = [&](int lane) { return left_piece(lane, warp_row(32 * warp) + 16 * m, step); };
                    const auto right = [&](int lane) {
                        return right_piece(lane, warp_column(32 * warp) + 16 * (j / 2), step);
                    };
                    float whole_a[16][16], whole_b[8][16];
                    for (int lane = 0; lane < 32; ++lane) {
                        for (int i = 0; i < 4; ++i) {
                            for (int e = 0; e < 2; ++e) {
                                whole_a[(lane >> 2) + 8 * (i & 1)][2 * (lane & 3) + 8 * (i >> 1) + e] =
                                    loaded(stage.left, left, lane, i, e);
                                if (i < 2) {
                                    whole_b[lane >> 2][2 * (lane & 3) + 8 * i + e] =
                                        loaded(stage.right, right, lane, j % 2 * 2 + i, e);
                                }
                            }
                        }
                    }
                    for (int lane = 0; lane < 32; ++lane) {
                        for (int i = 0; i < 4; ++i) {
                            const int thread = 32 * warp + lane, at = (m * kWide + j) * 4 + i;
                            float& sum = c[MmaSums::row(thread, at) * kTile + MmaSums::column(thread, at)];
                            for (int k = 0; k < 16; ++k)
                                sum += whole_a[(lane >> 2) + 8 * (i >> 1)][k] * whole_b[2 * (lane & 3) + (i & 1)][k];
                        }
                    }
                }
            }
        }
    }
}

// Which entry of the tile each of a thread's sums is: [threads][kSums][2], for mma.sync and for wgmma.
extern "C" void sum_places(int wgmma, int* places) {
    for (int thread = 0; thread < kThreads; ++thread) {
        for (int i = 0; i < kSums; ++i, places += 2) {
            places[0] = wgmma != 0 ? WgmmaSums::row(thread, i) : MmaSums::row(thread, i);
            places[1] = wgmma != 0 ? WgmmaSums::column(thread, i) : MmaSums::column(thread, i);
        }
    }
}

extern "C" std::uint64_t descriptor_at(unsigned address) { return descriptor(address); }
