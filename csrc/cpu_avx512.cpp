#include "cpu_kernels.h"

const InstructionSet avx512{"avx512", table<float>(), table<double>()};
