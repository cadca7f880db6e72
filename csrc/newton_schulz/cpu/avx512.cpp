// Newton-Schulz iterations for CPUs with AVX-512.
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

#include "common/begin_avx512.h"
#include "common/transpose16.h"

#define MF_ISA avx512
#include "words.h"
#include "multiply_wide.h"
#include "products_avx512.h"

#include "iterate.h"

namespace megaforge::newton_schulz {

const Kernels avx512_kernels = {avx512::scratch_bytes, avx512::orthogonalize, avx512::polynomial};

}  // namespace megaforge::newton_schulz

#include "common/end_isa.h"
