// Products with a few vectors for CPUs with AVX2.
#include "common/intrinsics.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "gemv.h"

#include "common/begin_avx2.h"

#define MF_ISA avx2
#include "values.h"
#include "lanes_avx2.h"
#include "part.h"

#include "products.h"

namespace megaforge::gemv {

const Kernels avx2_kernels = {avx2::part<float>, avx2::part<Bf16>};

}  // namespace megaforge::gemv

#include "common/end_isa.h"
