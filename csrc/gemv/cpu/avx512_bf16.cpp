// Products with a few vectors for CPUs with AVX-512 and its bf16 products.
#include "common/intrinsics.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "gemv.h"

#include "common/begin_avx512_bf16.h"

#define MF_ISA avx512_bf16
#include "values.h"
#include "lanes_avx512.h"
#include "part.h"
#include "part_bf16.h"

#include "products.h"

namespace megaforge::gemv {

const Kernels avx512_bf16_kernels = {avx512_bf16::part<float>, avx512_bf16::part<Bf16>};

}  // namespace megaforge::gemv

#include "common/end_isa.h"
