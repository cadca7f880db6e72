// Launch of the products that Newton-Schulz iterations are made of, without CUDA's or torch's headers.
#pragma once

#include <cstdint>

#include "../../common/bf16.h"

namespace megaforge::newton_schulz {

// scale left right^T + add_scale add, for each matrix of a batch: the result is the [rows, columns] matrix `out`, and
// `mirror` [columns, rows] is its transpose. Rows of the factors lie along the depth that is summed over, so that one
// kernel serves X X^T and, for a symmetric B, B X = B (X^T)^T.
struct Product {
  const Bf16* left;   // [batch, rows, depth]
  const Bf16* right;  // [batch, columns, depth]
  const Bf16* add;    // [batch, rows, columns], or null
  Bf16* out;          // [batch, rows, columns], or null
  Bf16* mirror;       // [batch, columns, rows], or null
  int batch, rows, columns, depth;  // the last three multiples of 8, the pointers of 16 bytes
  float scale, add_scale;
  // left and right are one matrix and `add` is symmetric: the tiles on and below the diagonal are computed, and `out`
  // takes them and their mirror images. `mirror` is null.
  bool symmetric;
};

// Whether this build and the current device have the form for wgmma (sm_90a); the one for mma.sync runs from sm_80 on.
bool has_wgmma();

// Null, or what the CUDA runtime says of the launch. `stream` is a cudaStream_t.
const char* multiply(const Product& product, bool wgmma, void* stream);

}  // namespace megaforge::newton_schulz
