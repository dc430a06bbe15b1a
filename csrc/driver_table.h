// Which driver serves which tensors: that of the machine for CUDA tensors, an installed simulator
// for CPU tensors. Torch-free.
#pragma once
#include <string>

#include "driver.h"

namespace ae {

// Installs a table in place of the machine's driver; null takes it out again. A table that is named
// "simulator" serves CPU tensors, any other one CUDA tensors. Throws std::runtime_error when it was
// built for another version. The table must stay valid for the process's life.
void install_driver(const ae_driver* table);

// The driver of CUDA tensors, found and initialized at the first call. Throws std::runtime_error
// when this machine has none.
const ae_driver& cuda_driver();

// The installed simulator, or null.
const ae_driver* simulator();

// "simulator" when one is installed, else the name of the driver of CUDA tensors, or "none".
std::string driver_name();

// What went wrong in words: a simulator's report, or the driver's text with its number.
std::string driver_error(const ae_driver& driver, ae_cu_result error);

}  // namespace ae
