// Launchers of the CUDA kernels. No torch here. A stream is a cudaStream_t. Each returns a cudaError_t as int.
#pragma once

#include <cstdint>

#include "../cpu/moe_routing.h"
#include "tiles.h"

namespace megaforge::moe::cuda {

// What a routing block leaves for later kernels: [blocks, experts], [blocks, experts], [blocks].
struct Partial {
  double* probability_sum;
  std::int32_t* counts;
  double* z_sum;
};

// Chooses, weighs and counts: everything of Route<T> but position, counts, probability_sum and z_sum.
template <typename T>
int launch_route(const Route<T>& args, const Partial& partial, void* stream);

// Adds up what routing blocks left, in order.
int launch_sums(const Partial& partial, std::int64_t blocks, std::int64_t sequences, std::int64_t experts,
                std::int64_t* counts, double* probability_sum, double* z_sum, void* stream);

template <typename T>
int launch_route_backward(const RouteBackward<T>& args, void* stream);

// Assignments of each piece of `each` of them to each expert: tile_counts [pieces, experts].
int launch_count(const std::int32_t* chosen, const bool* kept, std::int64_t assignments, std::int64_t each,
                 std::int64_t experts, std::int32_t* tile_counts, void* stream);

// tile_counts [tiles * parts, experts], neighbours `parts` at a time -> starts [tiles, experts] and totals [experts].
int launch_starts(const std::int32_t* tile_counts, std::int64_t tiles, std::int64_t parts, std::int64_t experts,
                  std::int32_t* starts, std::int64_t* totals, void* stream);

// Positions of the assignments, tile by tile of `each` of them.
int launch_place(const std::int32_t* chosen, const bool* kept, std::int64_t assignments, std::int64_t each,
                 std::int64_t experts, const std::int32_t* starts, std::int32_t* position, void* stream);

int launch_permute(const Rows& rows, const void* x, void* out, void* stream);
int launch_permute_values(const Rows& rows, const void* values, void* out, int bytes, void* stream);
int launch_unpermute(const Rows& rows, const void* y, const void* weights, void* out, void* stream);
int launch_unpermute_backward(const Rows& rows, const void* grad, const void* y, const void* weights, void* dy,
                              void* dweights, void* stream);

}  // namespace megaforge::moe::cuda
