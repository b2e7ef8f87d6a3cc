#include "cpu_kernels.h"

const InstructionSet portable{"portable", table<float>(), table<double>()};
