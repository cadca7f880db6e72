// Pointwise operators for any CPU.
#include <cstdint>

#include "pointwise.h"

#define MF_ISA scalar
#include "vec.h"

#include "activation.h"
#include "labels.h"
#include "norm.h"
#include "table.h"

namespace megaforge::pointwise {

const AllKernels scalar_kernels = {scalar::kernels_of<float>(), scalar::kernels_of<Bf16>()};

}  // namespace megaforge::pointwise
