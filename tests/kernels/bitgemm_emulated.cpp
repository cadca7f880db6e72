// Runs the block programs of csrc/bitgemm/cuda on the host, for test_bitgemm_cuda_emulated.py.
#include <memory>
#include <type_traits>
#include <vector>

#include "../../csrc/bitgemm/cuda/gemv.cuh"
#include "../../csrc/bitgemm/cuda/mma.cuh"
#include "../../csrc/bitgemm/cuda/prepare.cuh"
#include "../../csrc/bitgemm/cuda/quantize.cuh"
#include "../../csrc/bitgemm/cuda/stream.cuh"
#include "../../csrc/bitgemm/cuda/wgmma.cuh"

using namespace megaforge;
using namespace megaforge::bitgemm;

namespace {

// Memory as a block finds it: what it does not write first shows.
template <class T>
std::unique_ptr<T> found() {
    static_assert(std::is_trivially_copyable_v<T>);
    auto memory = std::make_unique<T>();
    std::memset(static_cast<void*>(memory.get()), 0x7b, sizeof(T));
    return memory;
}

template <class Sums>
void run_tiles(const Product& p, bool reversed) {
    constexpr int kBits = Sums::kBits;
    const std::int64_t high = (p.rows + kTileRows - 1) / kTileRows, wide = (p.tokens + Sums::kTokens - 1) / Sums::kTokens;
    for (std::int64_t index = 0; index < high * wide * p.parts; ++index) {
        const auto shared = found<Shared<Sums::kTokens>>();
        shared_memory = reinterpret_cast<const unsigned char*>(shared.get());
        product_block<Sums>(Block<kThreads>(reversed), *shared, p, index / p.parts, static_cast<int>(index % p.parts));
    }
    const std::int64_t results = p.parts > 1 ? std::int64_t{p.tokens} * p.rows : 0;
    for (std::int64_t i = 0; i * kPrepareThreads < results; ++i)
        finish_block<kBits>(Block<kPrepareThreads>(reversed), p, i);
}

template <int kBits, int kTiles>
void run_stream(const Product& p, bool reversed) {
    for (int index = 0; index * kStreamRows < p.rows; ++index) {
        for (int token = 0; token < p.tokens; token += 8 * kTiles) {
            const auto shared = found<StreamShared<kTiles>>();
            stream_block<kBits, kTiles>(Block<kStreamThreads>(reversed), *shared, p, index, token);
        }
    }
}

template <int kBits, int kTokens>
void run_gemv(const Product& p, bool reversed) {
    for (int panel = 0; panel < panels_of(p.rows); ++panel) {
        for (int token = 0; token < p.tokens; token += kTokens) {
            const auto shared = found<GemvShared<kTokens>>();
            gemv_block<kBits, kTokens>(Block<kGemvThreads>(reversed), *shared, p, panel, token);
        }
    }
}

template <int kBits>
void run(const Product& p, int form, int tile_tokens, bool reversed) {
    if (form == static_cast<int>(Form::kPlain)) {
        const std::int64_t results = std::int64_t{p.tokens} * p.rows;
        for (std::int64_t i = 0; i * kPrepareThreads < results; ++i) plain_block(Block<kPrepareThreads>(reversed), p, i);
    } else if (form == static_cast<int>(Form::kGemv)) {
        if (tile_tokens == 1) run_gemv<kBits, 1>(p, reversed);
        else if (tile_tokens == 2) run_gemv<kBits, 2>(p, reversed);
        else run_gemv<kBits, kMostTokens>(p, reversed);
    } else if (form == static_cast<int>(Form::kStream)) {
        if (tile_tokens == 8) run_stream<kBits, 1>(p, reversed);
        else if (tile_tokens == 16) run_stream<kBits, 2>(p, reversed);
        else run_stream<kBits, 4>(p, reversed);
    } else if (form == static_cast<int>(Form::kWgmma)) {
        run_tiles<WgmmaSums<kBits>>(p, reversed);
    } else if (p.groups > 0) {
        if (tile_tokens == 32) run_tiles<MmaSums<kBits, 32, true>>(p, reversed);
        else run_tiles<MmaSums<kBits, 128, true>>(p, reversed);
    } else {
        if (tile_tokens == 32) run_tiles<MmaSums<kBits, 32, false>>(p, reversed);
        else run_tiles<MmaSums<kBits, 128, false>>(p, reversed);
    }
}

}  // namespace

// sizes: bits, rows, columns.
extern "C" std::int64_t count_panel_words(const int* sizes) {
    return panels_of(sizes[1]) * panel_words(sizes[0], padded_depth(sizes[0], sizes[2]));
}

extern "C" int depth_of(const int* sizes) { return padded_depth(sizes[0], sizes[2]); }

extern "C" void emulate_prepare(int reversed, const int* sizes, const std::uint8_t* packed, std::uint32_t* panels) {
    const Preparation p{packed, panels, sizes[0], sizes[1], sizes[2], depth_of(sizes)};
    for (std::int64_t i = 0; i * kPrepareThreads < count_panel_words(sizes); ++i)
        prepare_block(Block<kPrepareThreads>(reversed != 0), p, i);
}

// kind: 0 to 2 as Type, 3 codes. shape: tokens, columns, depth.
extern "C" void emulate_quantize(int reversed, int kind, int gemv_order, const int* shape, const void* x, float most,
                                 std::int8_t* codes, float* worth, std::int32_t* sums) {
    const Quantization q{x, codes, worth, sums, static_cast<Type>(kind < 3 ? kind : 0), kind == 3, gemv_order != 0,
                         shape[0], shape[1], shape[2], most};
    for (int token = 0; token < q.tokens; ++token) {
        const auto shared = found<QuantizeShared>();
        const Block<kQuantizeThreads> block(reversed != 0);
        if (q.given) arrange_block(block, *shared, q, token);
        else if (q.type == Type::kFloat) quantize_block<float>(block, *shared, q, token);
        else if (q.type == Type::kBf16) quantize_block<Bf16>(block, *shared, q, token);
        else quantize_block<Fp16>(block, *shared, q, token);
    }
}

// sizes: bits, rows, columns, tokens, whether scales are of rows, groups, the type of `out`, parts.
extern "C" void emulate_product(int form, int tile_tokens, int reversed, int eager, const int* sizes,
                                const std::uint32_t* panels, const std::int8_t* codes, const float* worth,
                                const std::int32_t* sums, const float* scale, const float* bias, void* out) {
    AsyncCopies::eager = eager != 0;
    std::vector<std::int32_t> partial(static_cast<std::size_t>(sizes[7]) * sizes[3] * sizes[1], 0x7b7b7b7b);
    const Product p{panels, codes, worth, sums, scale, bias, out, static_cast<Type>(sizes[6]), sizes[0], sizes[3],
                    sizes[1], sizes[2], depth_of(sizes), sizes[4] != 0, sizes[5], sizes[7], partial.data()};
    if (p.bits == 1) run<1>(p, form, tile_tokens, reversed != 0);
    else if (p.bits == 2) run<2>(p, form, tile_tokens, reversed != 0);
    else run<4>(p, form, tile_tokens, reversed != 0);
}

extern "C" int count_parts(int form, int tokens, int rows, int depth, int groups, int processors) {
    return parts_for(static_cast<Form>(form), tokens, rows, depth, groups, processors);
}

// Which entry of the tile each of a thread's sums is: [threads][count][2] of row, token; the count.
template <class Sums>
int places_of(int* places) {
    for (int thread = 0; thread < kThreads; ++thread) {
        for (int i = 0; i < Sums::kCount; ++i, places += 2)
            places[0] = Sums::row(thread, i), places[1] = Sums::token(thread, i);
    }
    return Sums::kCount;
}

extern "C" int sum_places(int form, int tile_tokens, int* places) {
    if (form == static_cast<int>(Form::kWgmma)) return places_of<WgmmaSums<2>>(places);
    return tile_tokens == 32 ? places_of<MmaSums<2, 32, false>>(places) : places_of<MmaSums<2, 128, false>>(places);
}
