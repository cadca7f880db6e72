// The products of all steps of the iteration, in their order; who multiplies is given, so that a test can.
#pragma once

#include <cstddef>
#include <span>
#include <utility>

#include "launch.h"

namespace megaforge::newton_schulz {

// Matrices X [batch, m, n], m <= n, and their transposes [batch, n, m].
struct Matrices {
  const Bf16* x;
  const Bf16* transposed;
};

struct Results {
  Bf16* x;
  Bf16* transposed;
};

struct Workspace {
  Results results[2];  // steps write them in turn, the first step the first
  Bf16 *gram, *polynomial;  // [batch, m, m]
};

struct Step {
  float a, b, c;
};

// X <- a X + (b A + c A A) X with A = X X^T, for each of `steps` in turn. Of the last step only the X or, where
// `transposed`, the transposes are made. `multiply(product)` is called in order. Nothing overlaps the workspace.
template <class Multiply>
void iterate(int batch, int m, int n, Matrices from, const Workspace& work, std::span<const Step> steps, bool transposed,
             Multiply multiply) {
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const auto [a, b, c] = steps[i];
    const bool last = i + 1 == steps.size();
    const Results to = work.results[i % 2];
    multiply(Product{from.x, from.x, nullptr, work.gram, nullptr, batch, m, m, n, 1.0f, 0.0f, true});
    if (c != 0.0f) {
      multiply(Product{work.gram, work.gram, work.gram, work.polynomial, nullptr, batch, m, m, m, c, b, true});
    }
    multiply(Product{c != 0.0f ? work.polynomial : work.gram, from.transposed, from.x,
                     last && transposed ? nullptr : to.x, last && !transposed ? nullptr : to.transposed, batch, m, n, m,
                     c != 0.0f ? 1.0f : b, a, false});
    from = {to.x, to.transposed};
  }
}

}  // namespace megaforge::newton_schulz
