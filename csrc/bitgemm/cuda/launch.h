// Launch of the kernels of packed products, without CUDA's or torch's headers.
#pragma once

#include <cstdint>

#include "../../common/bf16.h"
#include "layout.h"

namespace megaforge::bitgemm {

struct Fp16 {
  std::uint16_t bits;
};

enum class Type { kFloat, kBf16, kFp16 };

// How a product is computed. All forms give the same bits.
enum class Form {
  kPlain,   // one thread a result: any groups
  kGemv,    // dp4a: very few tokens; no groups
  kStream,  // mma.sync, each warp with a share of the depth: few tokens; no groups
  kMma,     // mma.sync on tiles: groups of multiples of 32
  kWgmma,   // wgmma on tiles: sm_90a; no groups
};

// Rows as files hold them, uint8 [rows, ceil(columns bits / 8)], become panels.
struct Preparation {
  const std::uint8_t* packed;
  std::uint32_t* panels;  // [panels_of(rows), panel_words(bits, depth)]
  int bits, rows, columns, depth;  // depth: padded_depth(bits, columns)
};

constexpr int kTileRows = 128;  // of the forms on tiles

// Whether codes are to be in the order of gemv_word().
constexpr bool in_gemv_order(Form form) { return form == Form::kGemv || form == Form::kStream; }

constexpr bool on_tiles(Form form) { return form == Form::kMma || form == Form::kWgmma; }

constexpr int tile_tokens(Form form, int tokens) { return form == Form::kMma && tokens <= 64 ? 32 : 128; }

// Tokens [tokens, columns] become int8 codes [tokens, depth], zeros beyond the columns.
struct Quantization {
  const void* x;      // of `type`, or int8 codes where `given`
  std::int8_t* codes;  // aligned to 16 bytes
  float* worth;       // [tokens] what a code is worth: NaN where a value is not finite; not written where `given`
  std::int32_t* sums;  // [tokens] of the codes
  Type type;
  bool given, gemv_order;
  int tokens, columns, depth;
  float most;  // 127 or 7
};

// out[t, n] = (sum_k codes[t, k] weight[n, k] * scale) * worth[t] + bias[n], rounded after each operation; with groups
// the sums of one group of depths after the other are scaled and added.
struct Product {
  const std::uint32_t* panels;
  const std::int8_t* codes;  // [tokens, depth], in gemv's order for it
  const float* worth;        // [tokens]
  const std::int32_t* sums;  // [tokens]
  const float* scale;        // [], [rows] or [rows, groups]
  const float* bias;         // [rows], or null
  void* out;                 // [tokens, rows] of `type`
  Type type;
  int bits, tokens, rows, columns, depth;
  bool scale_of_rows;
  int groups;  // 0: none
  // Tiles that are too few for a GPU are computed in parts of the depth, whose sums are added up afterwards.
  int parts;
  std::int32_t* partial;  // [parts, tokens, rows] where there are several parts
};

// Parts that fill `processors` with blocks; each has at least four stages.
constexpr int parts_for(Form form, int tokens, int rows, int depth, int groups, int processors) {
  if (!on_tiles(form) || groups > 0) return 1;
  const std::int64_t wide = tile_tokens(form, tokens);
  const std::int64_t tiles = (tokens + wide - 1) / wide * ((rows + kTileRows - 1) / kTileRows);
  const std::int64_t fill = processors / tiles, longest = depth / (4 * kStageDepth);
  const std::int64_t parts = fill < longest ? fill : longest;
  return parts < 1 ? 1 : parts > 8 ? 8 : static_cast<int>(parts);
}

// The most columns: no sum leaves 32 bits.
constexpr int kMostColumns = 1 << 17;

// Whether this build and the current device have the form with wgmma (sm_90a); the others run from sm_80 on.
bool has_wgmma();

// Of the current device.
int count_processors();

// Each is null, or what the CUDA runtime says of the launch. `stream` is a cudaStream_t. Nothing is empty.
const char* prepare(const Preparation& preparation, void* stream);
const char* quantize(const Quantization& quantization, void* stream);
const char* multiply(const Product& product, Form form, void* stream);

}  // namespace megaforge::bitgemm
