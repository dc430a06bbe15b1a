// The vocabulary of generated code: free functions over any mix of C++ scalars (float, double,
// int32_t, int64_t, bool) and the vectors of lanes.h. Scalars give a scalar, anything else a
// vector; a scalar operand is broadcast in the vector's element type. A vector of bools is a Mask
// (I32 of 0 and -1), and a bool that is broadcast becomes one. Call them qualified (ae::remainder):
// the C library has other functions of the same names.
#pragma once
#include "cpu/math_core.h"
#include "cpu/math_div.h"
#include "cpu/math_exp.h"
#include "cpu/math_libm.h"
#include "cpu/math_reduce.h"
#include "cpu/math_select.h"
