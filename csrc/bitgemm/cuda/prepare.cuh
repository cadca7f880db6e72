// Rows as files hold them become panels, and panels are read weight by weight.
#pragma once

#include "values.cuh"

namespace megaforge::bitgemm {

constexpr int kPrepareThreads = 256;

// The stored code of a row and a column: 0 beyond them.
MF_DEVICE std::uint32_t stored_code(const Preparation& p, int row, int column) {
  if (row >= p.rows || column >= p.columns) return 0;
  const std::int64_t pitch = (static_cast<std::int64_t>(p.columns) * p.bits + 7) / 8;
  const int bit = column * p.bits;
  const std::uint32_t code = p.packed[row * pitch + bit / 8] >> bit % 8 & ((1u << p.bits) - 1);
  return p.bits == 4 ? code ^ 8u : code;
}

// One thread a word.
MF_DEVICE void prepare_block(const Block<kPrepareThreads>& block, const Preparation& p, std::int64_t index) {
  block.phase([&](int thread) {
    const std::int64_t word = index * kPrepareThreads + thread, in_panel = panel_words(p.bits, p.depth);
    if (word >= in_panel * panels_of(p.rows)) return;
    const int panel = static_cast<int>(word / in_panel), rest = static_cast<int>(word % in_panel);
    const int from = rest / (4 * kLanes) * block_depth(p.bits), lane = rest / 4 % kLanes;
    std::uint32_t value = 0;
    for (int position = 0; position < positions(p.bits); ++position) {
      const int reg = rest % 4 * positions(p.bits) + position;
      const Spot spot = spot_of(lane, reg % 4);
      for (int byte = 0; byte < 4; ++byte) {
        const int column = from + reg / 4 * kStep + spot.depth + byte;
        value |= stored_code(p, panel * kPanelRows + spot.row, column) << (8 * byte + p.bits * position);
      }
    }
    p.panels[word] = value;
  });
}

// The weight of a row and a depth.
MF_DEVICE int weight_at(const Product& p, int row, int depth) {
  const int in_block = depth % block_depth(p.bits), in_step = in_block % kStep, in_panel = row % kPanelRows;
  const int lane = in_panel % 8 * 4 + in_step % 16 / 4;
  const int reg = in_block / kStep * 4 + in_panel / 8 + in_step / 16 * 2;
  const std::int64_t first = row / kPanelRows * panel_words(p.bits, p.depth) +
                             static_cast<std::int64_t>(depth / block_depth(p.bits)) * kLanes * 4;
  const std::uint32_t word = p.panels[first + lane * 4 + reg / positions(p.bits)];
  const int shift = 8 * (depth % 4) + p.bits * (reg % positions(p.bits));
  return slope(p.bits) * static_cast<int>(word >> shift & ((1u << p.bits) - 1)) + offset(p.bits);
}

// One thread a result, group after group.
MF_DEVICE void plain_block(const Block<kPrepareThreads>& block, const Product& p, std::int64_t index) {
  block.phase([&](int thread) {
    const std::int64_t result = index * kPrepareThreads + thread;
    if (result >= static_cast<std::int64_t>(p.tokens) * p.rows) return;
    const int token = static_cast<int>(result / p.rows), row = static_cast<int>(result % p.rows);
    const std::int8_t* codes = p.codes + static_cast<std::int64_t>(token) * p.depth;
    const int groups = p.groups > 0 ? p.groups : 1, size = p.columns / groups;
    float scaled = 0.0f;
    for (int group = 0; group < groups; ++group) {
      int sum = 0;
      for (int k = group * size; k < (group + 1) * size; ++k) sum += codes[k] * weight_at(p, row, k);
      const std::int64_t at = p.groups > 0 ? static_cast<std::int64_t>(row) * groups + group : p.scale_of_rows ? row : 0;
      const float part = times(static_cast<float>(sum), p.scale[at]);
      scaled = p.groups > 0 ? plus(scaled, part) : part;
    }
    finish(p, token, row, scaled);
  });
}

// One thread a result, whose parts it adds up.
template <int kBits>
MF_DEVICE void finish_block(const Block<kPrepareThreads>& block, const Product& p, std::int64_t index) {
  block.phase([&](int thread) {
    const std::int64_t result = index * kPrepareThreads + thread, results = static_cast<std::int64_t>(p.tokens) * p.rows;
    if (result >= results) return;
    int sum = 0;
    for (int part = 0; part < p.parts; ++part) sum += p.partial[part * results + result];
    finish_stored<kBits>(p, static_cast<int>(result / p.rows), static_cast<int>(result % p.rows), sum);
  });
}

}  // namespace megaforge::bitgemm
