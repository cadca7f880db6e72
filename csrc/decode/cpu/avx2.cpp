// Steps of decoding for CPUs with AVX2.
#include "common/intrinsics.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "decode.h"
#include "gemv/cpu/gemv.h"
#include "memory.h"

#include "common/begin_avx2.h"

#define MF_ISA avx2
#include "gemv/cpu/values.h"
#include "gemv/cpu/lanes_avx2.h"
#include "gemv/cpu/part.h"

#include "gemv/cpu/products.h"

#include "arithmetic.h"

#include "attention.h"
#include "ffn.h"
#include "time_mix.h"

#include "step.h"

namespace megaforge::decode {

const Kernels avx2_kernels = avx2::all_kernels;

}  // namespace megaforge::decode

#include "common/end_isa.h"
