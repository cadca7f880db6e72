// Products with a few vectors for CPUs with AVX-512.
#include "common/intrinsics.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "gemv.h"

#include "common/begin_avx512.h"

#define MF_ISA avx512
#include "values.h"
#include "lanes_avx512.h"
#include "part.h"

#include "products.h"

namespace megaforge::gemv {

const Kernels avx512_kernels = {avx512::part<float>, avx512::part<Bf16>};

}  // namespace megaforge::gemv

#include "common/end_isa.h"
