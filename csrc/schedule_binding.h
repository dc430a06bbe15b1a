// templates/common/schedule.h and policy.h for Python: no tensors, no kernel, no operator library.
#pragma once
#include <pybind11/pybind11.h>

namespace ae {
void bind_schedule(pybind11::module_& m);
}
