// Newton-Schulz iterations for CPUs with AVX2.
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

#include "common/begin_avx2.h"

#define MF_ISA avx2
#include "words.h"
#include "multiply_wide.h"
#include "products_avx2.h"
#include "transpose.h"

#include "iterate.h"

namespace megaforge::newton_schulz {

const Kernels avx2_kernels = {avx2::scratch_bytes, avx2::orthogonalize, avx2::polynomial};

}  // namespace megaforge::newton_schulz

#include "common/end_isa.h"
