// Chooses the instruction set, cuts the work into units and spreads them over threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include <omp.h>

#include "attention.h"
#include "common/isa.h"
#include "common/scratch.h"

namespace megaforge::attention {
namespace {

constexpr std::int64_t kUnitsPerThread = 4;  // about as many, so that no thread waits long for another

// Pairs of a query and a key that it sees, without those that it would see of keys that are not there.
double pairs(const Segment& segment) {
  double seen = 0;
  const double queries = static_cast<double>(segment.queries), keys = static_cast<double>(segment.keys);
  // The queries before `full` see fewer than all keys.
  const double full = std::clamp(keys - 1.0 - static_cast<double>(segment.ahead), 0.0, queries);
  const double none = std::clamp(-static_cast<double>(segment.ahead) - 1.0, 0.0, full);
  const double first = none + 1.0 + static_cast<double>(segment.ahead), last = full + static_cast<double>(segment.ahead);
  if (full > none) seen += (first + last) / 2 * (full - none);
  return seen + (queries - full) * keys;
}

// The most expensive ones first.
std::vector<Unit> units(const Problem& in, int threads, bool cut) {
  double all = 0;
  for (std::int64_t i = 0; i < in.count; ++i) all += pairs(in.segments[i]) * static_cast<double>(in.groups);
  const double share = all / static_cast<double>(kUnitsPerThread * std::max(threads, 1));
  std::vector<std::pair<double, Unit>> found;
  for (const Segment* segment = in.segments; segment < in.segments + in.count; ++segment) {
    const std::int64_t blocks = query_blocks(*segment) * (in.heads / in.groups);
    if (blocks == 0 && segment->keys == 0) continue;
    const double cost = pairs(*segment);
    const auto parts = std::clamp<std::int64_t>(cut && threads > 1 ? static_cast<std::int64_t>(cost / share) : 1, 1,
                                                std::max<std::int64_t>(blocks, 1));
    for (std::int64_t group = 0; group < in.groups; ++group) {
      for (std::int64_t part = 0; part < parts; ++part) {
        found.push_back({cost / static_cast<double>(parts), {segment, group, blocks * part / parts, blocks * (part + 1) / parts}});
      }
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
  std::vector<Unit> sorted;
  for (const auto& [cost, unit] : found) sorted.push_back(unit);
  return sorted;
}

template <class Bytes, class Body>
void spread(const std::vector<Unit>& units, int threads, Bytes bytes, Body body) {
  if (units.empty()) return;
  const auto count = static_cast<std::int64_t>(units.size());
  const int used = static_cast<int>(std::clamp<std::int64_t>(threads, 1, count));
  std::int64_t largest = 0;
  for (const Unit& unit : units) largest = std::max(largest, bytes(unit));
  const Scratch scratch(used, largest);
#pragma omp parallel for schedule(dynamic, 1) num_threads(used) if (used > 1)
  for (std::int64_t i = 0; i < count; ++i) {
    body(units[static_cast<std::size_t>(i)], scratch.of(used > 1 ? omp_get_thread_num() : 0));
  }
}

// Threads that wait for each other.
class Team {
 public:
  Team(std::int64_t size, std::int64_t panels) : size_(size), done(static_cast<std::size_t>(panels)) {}

  // What all did before it is seen by all after it.
  static void meet(void* team_any) {
    Team& team = *static_cast<Team*>(team_any);
    if (team.size_ == 1) return;
    const std::int64_t turn = team.turn_.load();
    if (team.here_.fetch_add(1) + 1 == team.size_) {
      team.here_ = 0;
      team.turn_ = turn + 1;
    } else {
      while (team.turn_.load() == turn) std::this_thread::yield();
    }
  }

 private:
  const std::int64_t size_;
  std::atomic<std::int64_t> here_{0}, turn_{0};

 public:
  std::vector<std::int64_t> done;
  std::int64_t next = 0, unit = 0;
};

void yield() { std::this_thread::yield(); }

}  // namespace

const Kernels& choose([[maybe_unused]] Type type) {
  if constexpr (kX86) {
    return best_kernels(scalar_kernels, avx2_kernels, avx512_kernels,
                        type == Type::bf16 ? avx512_bf16_kernels : avx512_kernels);
  } else {
    return best_kernels(scalar_kernels);
  }
}

void forward(const Kernels& kernels, const Forward& args, int threads) {
  spread(
      units(args.in, threads, true), threads, [&](const Unit& unit) { return kernels.forward_bytes(args.in, unit); },
      [&](const Unit& unit, void* scratch) { kernels.forward(args, unit, scratch); });
}

void backward(const Kernels& kernels, const Backward& args, int threads) {
  const std::vector<Unit> work = units(args.in, threads, false);
  if (work.empty()) return;
  const auto count = static_cast<std::int64_t>(work.size());
  // A thread takes whole units where there are as many; else as many threads as there are share each.
  const std::int64_t teams = std::clamp<std::int64_t>(threads, 1, count), size = std::max<std::int64_t>(threads / teams, 1);
  Bytes bytes{};
  std::int64_t panels = 1;
  for (const Unit& unit : work) {
    const Bytes needed = kernels.backward_bytes(args.in, unit);
    bytes = {std::max(bytes.shared, needed.shared), std::max(bytes.own, needed.own)};
    panels = std::max(panels, query_panels(*unit.segment));
  }
  const Scratch shared(teams, bytes.shared), own(teams * size, bytes.own);
  std::vector<std::unique_ptr<Team>> all;
  for (std::int64_t i = 0; i < teams; ++i) all.push_back(std::make_unique<Team>(size, panels));
  Team alone(1, panels);
  std::atomic<std::int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(teams * size))
  {
    // Where there are fewer threads than asked for, one does it all.
    const bool complete = omp_get_num_threads() == teams * size;
    const std::int64_t thread = omp_get_thread_num(), together = complete ? size : 1, rank = thread % together;
    Team& team = complete ? *all[static_cast<std::size_t>(thread / size)] : alone;
    const Member member{rank, together, &team.next, team.done.data(), Team::meet, &team, yield};
    while (complete || thread == 0) {
      Team::meet(&team);
      if (rank == 0) team.unit = next.fetch_add(1);
      Team::meet(&team);
      if (team.unit >= count) break;
      kernels.backward(args, work[static_cast<std::size_t>(team.unit)], member, shared.of(thread / together), own.of(thread));
    }
  }
}

}  // namespace megaforge::attention
