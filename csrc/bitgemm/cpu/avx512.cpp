// Products with packed weights for CPUs with AVX-512.
#include "common/intrinsics.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bitgemm.h"

#include "common/begin_avx512.h"

#define MF_ISA avx512
#include "finish.h"
#include "pairs.h"
#include "wide.h"

namespace megaforge::bitgemm {

const Kernels avx512_kernels = avx512::kKernels;

}  // namespace megaforge::bitgemm

#include "common/end_isa.h"
