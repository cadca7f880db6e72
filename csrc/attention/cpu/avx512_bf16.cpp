// Causal attention for CPUs with AVX-512 and its bf16 products.
#include "common/intrinsics.h"

#include <cstddef>
#include <cstdint>

#include "attention.h"

#include "common/begin_avx512_bf16.h"
#include "common/transpose16.h"

#define MF_ISA avx512_bf16
#define MF_WIDTH 16
#include "types.h"
#include "narrow_bf16.h"
#include "lanes_avx512.h"
#include "vec.h"

#include "pack.h"

#include "backward.h"
#include "forward.h"

namespace megaforge::attention {

const Kernels avx512_bf16_kernels = {avx512_bf16::forward_bytes<avx512_bf16::Bf16>, avx512_bf16::forward_unit<avx512_bf16::Bf16>,
    avx512_bf16::backward_bytes<avx512_bf16::Bf16>, avx512_bf16::backward_unit<avx512_bf16::Bf16>};

}  // namespace megaforge::attention

#include "common/end_isa.h"
