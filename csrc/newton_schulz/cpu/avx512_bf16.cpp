// Newton-Schulz iterations for CPUs with AVX-512 and its bf16 products.
#include "common/intrinsics.h"
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <utility>

#include "newton_schulz.h"

#include "common/begin_avx512_bf16.h"
#include "common/transpose16.h"

#define MF_ISA avx512_bf16
#include "words.h"
#include "multiply_bf16.h"
#include "products_avx512.h"

#include "iterate.h"

namespace megaforge::newton_schulz {

const Kernels avx512_bf16_kernels = {avx512_bf16::scratch_bytes, avx512_bf16::orthogonalize, avx512_bf16::polynomial};

}  // namespace megaforge::newton_schulz

#include "common/end_isa.h"
