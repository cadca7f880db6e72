// Routing for CPUs with AVX-512.
#include "common/intrinsics.h"

#include <cstddef>
#include <cstdint>

#include "moe_routing.h"

#include "common/begin_avx512.h"

#define MF_ISA avx512
#include "lanes_avx512.h"
#include "route_vec.h"
#include "rows.h"

namespace megaforge::moe {

const RouteKernels<float> avx512_route_f32 = {avx512::scratch_bytes, avx512::route_part, avx512::backward_part};
const RowKernels avx512_rows = {avx512::permute, avx512::unpermute, avx512::unpermute_backward};

}  // namespace megaforge::moe

#include "common/end_isa.h"
