// Pointwise operators for any CPU.
#include <cstdint>

#include "pointwise.h"

#define MF_ISA scalar
#define MF_WIDTH 4
#include "types.h"
#include "narrow.h"
#include "lanes.h"
#include "vec.h"

#include "activation.h"
#include "labels.h"
#include "norm.h"
#include "table.h"

namespace megaforge::pointwise {

const AllKernels scalar_kernels = {scalar::kernels_of<float>(), scalar::kernels_of<Bf16>()};

}  // namespace megaforge::pointwise
