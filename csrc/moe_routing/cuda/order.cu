// A stable sort by expert: count, scan, place. Only integers, and each is written by one thread.
#include <cuda_runtime.h>

#include "launch.h"

namespace megaforge::moe::cuda {
namespace {

__global__ void sums_kernel(const Partial partial, std::int64_t blocks, std::int64_t sequences, std::int64_t experts,
                            std::int64_t* counts, double* probability_sum, double* z_sum) {
  const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;  // sequence, expert
  if (slot < sequences * experts) {
    std::int64_t count = 0;
    double sum = 0;
    for (std::int64_t block = slot / experts; block < blocks; block += sequences) {
      count += partial.counts[block * experts + slot % experts];
      sum += partial.probability_sum[block * experts + slot % experts];
    }
    counts[slot] = count;
    probability_sum[slot] = sum;
  }
  if (slot == 0) {
    double sum = 0;
    for (std::int64_t block = 0; block < blocks; ++block) sum += partial.z_sum[block];
    *z_sum = sum;
  }
}

__global__ void count_kernel(const std::int32_t* chosen, const bool* kept, std::int64_t assignments, std::int64_t each,
                             int experts, std::int32_t* tile_counts) {
  extern __shared__ int counts[];
  for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  const std::int64_t first = blockIdx.x * each, last = first + each < assignments ? first + each : assignments;
  for (std::int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    if (kept == nullptr || kept[i]) atomicAdd(counts + chosen[i], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kThreads) tile_counts[static_cast<std::int64_t>(blockIdx.x) * experts + e] = counts[e];
}

// One block: a thread for each expert, as many as there may be.
__global__ void __launch_bounds__(kMostExperts) starts_kernel(const std::int32_t* tile_counts, std::int64_t tiles,
                                                              std::int64_t parts, int experts, std::int32_t* starts,
                                                              std::int64_t* totals) {
  __shared__ int scan[2][kMostExperts];
  const int e = threadIdx.x;
  int total = 0;
  if (e < experts) {
    for (std::int64_t i = 0; i < tiles * parts; ++i) total += tile_counts[i * experts + e];
    totals[e] = total;
  }
  int from = 0;
  scan[from][e] = total;
  __syncthreads();
  for (int step = 1; step < static_cast<int>(blockDim.x); step *= 2) {
    scan[1 - from][e] = scan[from][e] + (e >= step ? scan[from][e - step] : 0);
    from = 1 - from;
    __syncthreads();
  }
  if (e >= experts) return;
  int next = scan[from][e] - total;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    starts[tile * experts + e] = next;
    for (std::int64_t part = 0; part < parts; ++part) next += tile_counts[(tile * parts + part) * experts + e];
  }
}

// One warp a tile, 32 assignments at a time: the order among equals is that of lanes, then of steps.
__global__ void place_kernel(const std::int32_t* chosen, const bool* kept, std::int64_t assignments, std::int64_t each,
                             int experts, const std::int32_t* starts, std::int32_t* position) {
  extern __shared__ int next[];
  const int lane = threadIdx.x;
  for (int e = lane; e < experts; e += 32) next[e] = starts[static_cast<std::int64_t>(blockIdx.x) * experts + e];
  __syncwarp();
  const std::int64_t first = blockIdx.x * each, last = first + each < assignments ? first + each : assignments;
  for (std::int64_t base = first; base < last; base += 32) {
    const std::int64_t i = base + lane;
    const bool placed = i < last && (kept == nullptr || kept[i]);
    const int expert = placed ? chosen[i] : -1;
    const unsigned equals = __match_any_sync(0xffffffffu, expert);
    const int earlier = __popc(equals & ((1u << lane) - 1));
    const int at = placed ? next[expert] + earlier : -1;
    __syncwarp();
    if (placed && earlier == 0) next[expert] += __popc(equals);
    __syncwarp();
    if (i < last) position[i] = at;
  }
}

}  // namespace

int launch_sums(const Partial& partial, std::int64_t blocks, std::int64_t sequences, std::int64_t experts,
                std::int64_t* counts, double* probability_sum, double* z_sum, void* stream) {
  const auto grid = static_cast<unsigned>(pieces(sequences * experts, kThreads));
  sums_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(partial, blocks, sequences, experts, counts,
                                                                        probability_sum, z_sum);
  return cudaGetLastError();
}

int launch_count(const std::int32_t* chosen, const bool* kept, std::int64_t assignments, std::int64_t each,
                 std::int64_t experts, std::int32_t* tile_counts, void* stream) {
  const auto grid = static_cast<unsigned>(pieces(assignments, each));
  count_kernel<<<grid, kThreads, experts * sizeof(int), static_cast<cudaStream_t>(stream)>>>(
      chosen, kept, assignments, each, static_cast<int>(experts), tile_counts);
  return cudaGetLastError();
}

int launch_starts(const std::int32_t* tile_counts, std::int64_t tiles, std::int64_t parts, std::int64_t experts,
                  std::int32_t* starts, std::int64_t* totals, void* stream) {
  const auto threads = static_cast<unsigned>(pieces(experts, 32) * 32);
  starts_kernel<<<1, threads, 0, static_cast<cudaStream_t>(stream)>>>(tile_counts, tiles, parts,
                                                                      static_cast<int>(experts), starts, totals);
  return cudaGetLastError();
}

int launch_place(const std::int32_t* chosen, const bool* kept, std::int64_t assignments, std::int64_t each,
                 std::int64_t experts, const std::int32_t* starts, std::int32_t* position, void* stream) {
  const auto grid = static_cast<unsigned>(pieces(assignments, each));
  place_kernel<<<grid, 32, experts * sizeof(int), static_cast<cudaStream_t>(stream)>>>(
      chosen, kept, assignments, each, static_cast<int>(experts), starts, position);
  return cudaGetLastError();
}

}  // namespace megaforge::moe::cuda
