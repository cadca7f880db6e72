// Products with packed weights for CPUs with AVX-512 and its products of bytes.
#include "common/intrinsics.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bitgemm.h"

#include "common/begin_avx512_vnni.h"

#define MF_ISA avx512_vnni
#include "finish.h"
#include "vnni.h"
#include "wide.h"

namespace megaforge::bitgemm {

const Kernels avx512_vnni_kernels = avx512_vnni::kKernels;

}  // namespace megaforge::bitgemm

#include "common/end_isa.h"
