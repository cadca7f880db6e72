// From rows of codes to what the kernels read.
#include <algorithm>
#include <cstring>

#include "bitgemm.h"

namespace megaforge::bitgemm {
namespace {

// The unsigned code of a row's column.
inline unsigned code(const std::uint8_t* row, int64_t column, int bits) {
  const int64_t bit = column * bits;
  const unsigned value = (row[bit / 8] >> (bit % 8)) & ((1u << bits) - 1u);
  return bits == 4 ? value ^ 8u : value;
}

void panel_of(const Shape& shape, const std::uint8_t* packed, int64_t panel, std::uint8_t* out) {
  const int64_t row_bytes = (shape.columns * shape.bits + 7) / 8, columns = shape.group_columns();
  const int64_t apart = 4 * shape.steps();
  for (int64_t group = 0; group < shape.groups; ++group, out += shape.steps() * kPanel * 4) {
    for (int64_t r = 0; r < kPanel && panel * kPanel + r < shape.rows; ++r) {
      const std::uint8_t* row = packed + (panel * kPanel + r) * row_bytes;
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t place = k / apart, within = k % apart;
        out[(within / 4 * kPanel + r) * 4 + within % 4] |=
            static_cast<std::uint8_t>(code(row, group * columns + k, shape.bits) << (place * shape.bits));
      }
    }
  }
}

void words_of(const Shape& shape, const std::uint8_t* packed, int64_t panel, std::uint16_t* out) {
  const int64_t row_bytes = (shape.columns + 7) / 8, columns = shape.group_columns(), words = shape.group_words();
  for (int64_t group = 0; group < shape.groups; ++group, out += words * kWide * shape.panels()) {
    for (int64_t r = 0; r < kWide && panel * kWide + r < shape.rows; ++r) {
      const std::uint8_t* row = packed + (panel * kWide + r) * row_bytes;
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t word = k / kWordColumns, start = word / kBlockWords * kBlockWords;
        const int64_t in_block = std::min<int64_t>(kBlockWords, words - start);
        std::uint16_t& to = out[start * kWide * shape.panels() + (panel * in_block + word - start) * kWide + r];
        to = static_cast<std::uint16_t>(to | (code(row, group * columns + k, 1) << (k % kWordColumns)));
      }
    }
  }
}

}  // namespace

void prepare(const Shape& shape, const std::uint8_t* packed, void* panels, int threads) {
  std::memset(panels, 0, static_cast<std::size_t>(shape.bytes()));
  const int64_t panel_bytes = shape.groups * shape.steps() * kPanel * 4;
#pragma omp parallel for num_threads(threads) if (threads > 1 && shape.panels() > 1)
  for (int64_t panel = 0; panel < shape.panels(); ++panel) {
    if (shape.words) words_of(shape, packed, panel, static_cast<std::uint16_t*>(panels));
    else panel_of(shape, packed, panel, static_cast<std::uint8_t*>(panels) + panel * panel_bytes);
  }
}

}  // namespace megaforge::bitgemm
