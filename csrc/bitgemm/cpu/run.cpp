// Chooses the instruction set, quantizes the tokens, and spreads tiles of tokens and panels of rows over threads.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "bitgemm.h"
#include "common/isa.h"
#include "common/scratch.h"

namespace megaforge::bitgemm {
namespace {

constexpr int64_t kWorthATeam = 1 << 20;   // multiply-adds
constexpr int64_t kTokenBytes = 1 << 19;   // of the tokens that one panel after the other meets: half of an L2 cache
constexpr int64_t kChunk = 4096;           // rows whose sums are kept while tables serve them

const Kernels& kernels() {
  if constexpr (kX86) {
    return best_kernels(scalar_kernels, avx2_kernels, avx512_kernels, avx512_vnni_kernels, has_vnni());
  } else {
    return best_kernels(scalar_kernels);
  }
}

// Tokens in tiles of `most`, but for the last, which is the least of the sizes that holds the rest.
struct Tiles {
  int64_t count, tokens;
  int most;

  Tiles(int64_t tokens, int most) : count((tokens + most - 1) / most), tokens(tokens), most(most) {}

  int of(int64_t tile) const { return static_cast<int>(std::min<int64_t>(most, tokens - tile * most)); }

  int size(int64_t tile) const {
    const int held = of(tile);
    for (int size : {1, 2, 4, 8}) {
      if (held <= size) return size;
    }
    return most;
  }
};

// All tokens' codes, tile after tile, and of each token what they are worth and the sums of its groups.
struct Quantized {
  Scratch codes, numbers;
  float* worth;
  std::int32_t* sums;
  int64_t tile_bytes;

  Quantized(const Shape& shape, const Tiles& tiles)
      : codes(tiles.count, tiles.most * shape.groups * shape.padded_columns()),
        numbers(1, 4 * (tiles.tokens + 1) * (shape.groups + 1)),
        worth(static_cast<float*>(numbers.of(0))),
        sums(static_cast<std::int32_t*>(numbers.of(0)) + tiles.tokens),
        tile_bytes(tiles.most * shape.groups * shape.padded_columns()) {}

  std::int8_t* of(int64_t tile) const { return static_cast<std::int8_t*>(codes.of(tile)); }
};

// One token's codes into its tile: for panels [groups][columns / 4][size][4], for words [size][groups][columns].
void place(const Shape& shape, const std::int8_t* codes, int token, int size, std::int8_t* tile, std::int32_t* sums) {
  const int64_t columns = shape.group_columns(), padded = shape.padded_columns();
  for (int64_t group = 0; group < shape.groups; ++group) {
    const std::int8_t* from = codes + group * columns;
    std::int32_t sum = 0;
    for (int64_t k = 0; k < columns; ++k) sum += from[k];
    sums[group] = sum;
    if (shape.words || size == 1) {
      std::int8_t* const to = tile + (token * shape.groups + group) * padded;
      std::memcpy(to, from, static_cast<std::size_t>(columns));
      std::memset(to + columns, 0, static_cast<std::size_t>(padded - columns));
      continue;
    }
    std::int8_t* to = tile + group * padded * size + token * 4;
    const int64_t whole = columns / 4;
    for (int64_t k = 0; k < whole; ++k) std::memcpy(to + k * size * 4, from + k * 4, 4);
    for (int64_t k = whole; k < padded / 4; ++k) {
      std::int8_t four[4] = {};
      for (int64_t i = 4 * k; i < columns; ++i) four[i - 4 * k] = from[i];
      std::memcpy(to + k * size * 4, four, 4);
    }
  }
}

void quantize_tile(const Kernels& code, const Shape& shape, const Tokens& tokens, const Tiles& tiles, int64_t tile,
                   const Quantized& out, std::int8_t* row) {
  const int size = tiles.size(tile);
  if (tiles.of(tile) < size) {
    std::memset(out.of(tile), 0, static_cast<std::size_t>(size * shape.groups * shape.padded_columns()));
  }
  for (int i = 0; i < tiles.of(tile); ++i) {
    const int64_t token = tile * tiles.most + i;
    const std::int8_t* codes = row;
    if (tokens.codes != nullptr) {
      codes = tokens.codes + token * shape.columns;
      out.worth[token] = tokens.worth[token];
    } else {
      const int64_t bytes = tokens.type == Type::f32 ? 4 : 2;
      const void* x = static_cast<const char*>(tokens.x) + token * shape.columns * bytes;
      out.worth[token] = code.quantize(x, tokens.type, shape.columns, tokens.bits, row);
    }
    place(shape, codes, i, size, out.of(tile), out.sums + token * shape.groups);
  }
}

class Product {
 public:
  Product(const Matrix& matrix, const Result& result, const Tiles& tiles, const Quantized& tokens)
      : code_(kernels()), matrix_(matrix), shape_(matrix.shape), result_(result), tiles_(tiles), tokens_(tokens) {}

  // Tiles first to last of one panel of 32 rows.
  void panel(int64_t panel, int64_t first, int64_t last) const {
    alignas(64) std::int32_t sums[kMostTokens * kPanel];
    alignas(64) float total[kMostTokens * kPanel], held[kPanel];
    const float* scale = held;
    const int64_t group_bytes = shape_.steps() * kPanel * 4;
    const auto* codes = static_cast<const std::uint8_t*>(matrix_.panels) + panel * shape_.groups * group_bytes;
    for (int64_t tile = first; tile < last; ++tile) {
      const int size = tiles_.size(tile);
      for (int64_t group = 0; group < shape_.groups; ++group) {
        const std::int8_t* tokens = tokens_.of(tile) + group * shape_.padded_columns() * size;
        code_.tile(shape_.bits, size, codes + group * group_bytes, tokens, shape_.steps(), sums);
        if (shape_.groups > 1 || tile == first) scale = scales(panel * kPanel, group, held);
        for (int i = 0; i < tiles_.of(tile); ++i) {
          code_.scale(sums + i * kPanel, twice(), less(tile, i, group), scale, group == 0, total + i * kPanel);
        }
      }
      finish(panel * kPanel, tile, total, kPanel);
    }
  }

  // One tile and the panels of words from `first` to `last`. `sums`: int32 [size][rows of them], `total` the same in
  // fp32, `tables`: int16 [3 kBlockWords][size][32].
  void words(int64_t tile, int64_t first, int64_t last, std::int32_t* sums, float* total, std::int16_t* tables) const {
    const int size = tiles_.size(tile);
    const int64_t rows = (last - first) * kWide, stride = shape_.groups * shape_.padded_columns();
    const auto* group_codes = static_cast<const std::uint16_t*>(matrix_.panels);
    alignas(64) float held[kPanel];
    for (int64_t group = 0; group < shape_.groups; ++group) {
      std::memset(sums, 0, static_cast<std::size_t>(4 * size * rows));
      const std::int8_t* tokens = tokens_.of(tile) + group * shape_.padded_columns();
      for (int64_t start = 0; start < shape_.group_words(); start += kBlockWords) {
        const int64_t words = std::min<int64_t>(kBlockWords, shape_.group_words() - start);
        code_.tables(size, tokens + start * kWordColumns, stride, words, tables);
        const std::uint16_t* block = group_codes + start * kWide * shape_.panels();
        code_.look_up(size, block + first * words * kWide, last - first, tables, words, sums, rows);
      }
      for (int64_t row = 0; row < rows; row += kPanel) {
        const float* scale = scales(first * kWide + row, group, held);
        for (int i = 0; i < tiles_.of(tile); ++i) {
          const int64_t at = i * rows + row;
          code_.scale(sums + at, twice(), less(tile, i, group), scale, group == 0, total + at);
        }
      }
      group_codes += shape_.group_words() * kWide * shape_.panels();
    }
    for (int64_t row = 0; row < rows; row += kPanel) finish(first * kWide + row, tile, total + row, rows);
  }

  bool has_words() const { return code_.look_up != nullptr; }

  const Kernels& code() const { return code_; }

 private:
  int twice() const { return shape_.bits == 1 ? 2 : 1; }

  std::int32_t less(int64_t tile, int i, int64_t group) const {
    return shape_.offset() * tokens_.sums[(tile * tiles_.most + i) * shape_.groups + group];
  }

  // Of 32 rows from `row` on, in `held` unless they lie so; 0 beyond the matrix.
  const float* scales(int64_t row, int64_t group, float* held) const {
    const int64_t rows = std::clamp<int64_t>(shape_.rows - row, 0, kPanel), stride = matrix_.row_stride;
    if (rows == kPanel && stride == 1) return matrix_.scale + row;
    for (int64_t i = 0; i < rows; ++i) held[i] = matrix_.scale[(row + i) * stride + group];
    std::fill(held + rows, held + kPanel, 0.0f);
    return held;
  }

  // 32 rows from `row` on of a tile whose tokens' totals are `stride` apart.
  void finish(int64_t row, int64_t tile, const float* total, int64_t stride) const {
    const int held = static_cast<int>(std::min<int64_t>(kPanel, shape_.rows - row));
    if (held <= 0) return;
    const float* bias = result_.bias == nullptr ? nullptr : result_.bias + row;
    for (int i = 0; i < tiles_.of(tile); ++i) {
      const int64_t token = tile * tiles_.most + i;
      const int64_t bytes = result_.type == Type::f32 ? 4 : 2;
      void* y = static_cast<char*>(result_.y) + (token * shape_.rows + row) * bytes;
      code_.finish(total + i * stride, tokens_.worth[token], bias, held, result_.type, y);
    }
  }

  const Kernels& code_;
  const Matrix& matrix_;
  const Shape& shape_;
  const Result& result_;
  const Tiles& tiles_;
  const Quantized& tokens_;
};

void multiply_panels(const Product& product, const Shape& shape, const Tiles& tiles, int64_t tile_bytes, int threads) {
  const int64_t together = std::clamp<int64_t>(kTokenBytes / std::max<int64_t>(tile_bytes, 1), 1, tiles.count);
  const int64_t blocks = (tiles.count + together - 1) / together, panels = shape.panels();
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < blocks * panels; ++item) {
    const int64_t first = item / panels * together;
    product.panel(item % panels, first, std::min(first + together, tiles.count));
  }
}

void require_words(const Product& product) {
  if (product.has_words()) return;
  throw std::runtime_error("this matrix was prepared for look-ups, which MEGAFORGE_CPU_ISA has not; prepare it anew");
}

void multiply_words(const Product& product, const Shape& shape, const Tiles& tiles, int threads) {
  require_words(product);
  const int64_t panels = shape.panels();
  int64_t chunk = std::min(panels, kChunk / kWide);
  if (threads > tiles.count) chunk = std::clamp<int64_t>(panels / (2 * threads), 1, chunk);
  const int64_t chunks = (panels + chunk - 1) / chunk, rows = chunk * kWide;
  const Scratch sums(threads, 4 * 8 * rows), totals(threads, 4 * 8 * rows), tables(threads, 2 * 32 * 8 * 3 * kBlockWords);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < tiles.count * chunks; ++item) {
    const int64_t first = item % chunks * chunk;
    const int me = threads > 1 ? omp_get_thread_num() : 0;
    product.words(item / chunks, first, std::min(first + chunk, panels), static_cast<std::int32_t*>(sums.of(me)),
                  static_cast<float*>(totals.of(me)), static_cast<std::int16_t*>(tables.of(me)));
  }
}

// Those of the panels of words from `first` to `last`, by this thread.
void multiply_some_words(const Product& product, const Tiles& tiles, int64_t first, int64_t last) {
  const int64_t chunk = std::min(last - first, kChunk / kWide), rows = chunk * kWide;
  const Scratch sums(1, 4 * 8 * rows), totals(1, 4 * 8 * rows), tables(1, 2 * 32 * 8 * 3 * kBlockWords);
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    for (int64_t start = first; start < last; start += chunk) {
      product.words(tile, start, std::min(start + chunk, last), static_cast<std::int32_t*>(sums.of(0)),
                    static_cast<float*>(totals.of(0)), static_cast<std::int16_t*>(tables.of(0)));
    }
  }
}

}  // namespace

bool prefers_words(int bits) { return bits == 1 && kernels().look_up != nullptr; }

void multiply(const Matrix& matrix, const Tokens& tokens, const Result& result, int threads) {
  const Shape& shape = matrix.shape;
  if (tokens.count == 0 || shape.rows == 0) return;
  if (tokens.count * shape.rows * shape.columns < kWorthATeam) threads = 1;
  const Tiles tiles(tokens.count, shape.words ? 8 : kMostTokens);
  const Quantized quantized(shape, tiles);
  const Product product(matrix, result, tiles, quantized);
  const int quantizers = static_cast<int>(std::min<int64_t>(threads, tiles.count));
  const Scratch rows(quantizers, shape.columns + 64);
#pragma omp parallel for num_threads(quantizers) if (quantizers > 1)
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    quantize_tile(product.code(), shape, tokens, tiles, tile, quantized,
                  static_cast<std::int8_t*>(rows.of(quantizers > 1 ? omp_get_thread_num() : 0)));
  }
  if (shape.words) multiply_words(product, shape, tiles, threads);
  else multiply_panels(product, shape, tiles, quantized.tile_bytes, threads);
}

void multiply_rows(const Matrix& matrix, const Tokens& tokens, const Result& result, int64_t begin, int64_t end) {
  const Shape& shape = matrix.shape;
  if (tokens.count == 0 || begin >= end) return;
  const Tiles tiles(tokens.count, shape.words ? 8 : kMostTokens);
  const Quantized quantized(shape, tiles);
  const Product product(matrix, result, tiles, quantized);
  const Scratch row(1, shape.columns + 64);
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    quantize_tile(product.code(), shape, tokens, tiles, tile, quantized, static_cast<std::int8_t*>(row.of(0)));
  }
  const int64_t first = begin / shape.granule(), last = (end + shape.granule() - 1) / shape.granule();
  if (shape.words) {
    require_words(product);
    multiply_some_words(product, tiles, first, last);
    return;
  }
  for (int64_t panel = first; panel < last; ++panel) product.panel(panel, 0, tiles.count);
}

}  // namespace megaforge::bitgemm
