// Routing for CPUs with AVX2.
#include "common/intrinsics.h"

#include <cstddef>
#include <cstdint>

#include "moe_routing.h"

#include "common/begin_avx2.h"

#define MF_ISA avx2
#define MF_PIECE 8
#include "lanes.h"
#include "pieces_avx2.h"
#include "compress.h"
#include "route_vec.h"
#include "rows.h"

namespace megaforge::moe {

const RouteKernels<float> avx2_route_f32 = {avx2::scratch_bytes, avx2::route_part, avx2::backward_part};
const RowKernels avx2_rows = {avx2::permute, avx2::unpermute, avx2::unpermute_backward};

}  // namespace megaforge::moe

#include "common/end_isa.h"
