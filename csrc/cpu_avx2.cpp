#include "cpu_kernels.h"

const InstructionSet avx2{"avx2", table<float>(), table<double>()};
