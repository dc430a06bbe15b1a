// The parts of the driver's table that know no module: the device and its memory (device.cpp).
#pragma once
#include <string>

#include "driver.h"
#include "regions.h"

namespace ptxsim {

// Keeps the text for last_report().
ae_cu_result failed(ae_cu_result result, const std::string& why);
// What mem_alloc has given out and mem_free has not taken back.
void add_allocations(MemoryMap& memory);

ae_cu_result init(unsigned int);
ae_cu_result device_count(int* count);
ae_cu_result device_get(ae_cu_device* device, int ordinal);
ae_cu_result device_attribute(int* value, int attribute, ae_cu_device);
ae_cu_result primary_context(ae_cu_context* out, ae_cu_device);
ae_cu_result current_context(ae_cu_context* out);
ae_cu_result set_context(ae_cu_context);
ae_cu_result context_device(ae_cu_device* device);
ae_cu_result mem_alloc(ae_cu_ptr* out, size_t bytes);
ae_cu_result mem_free(ae_cu_ptr address);
ae_cu_result memset8(ae_cu_ptr address, unsigned char value, size_t bytes, ae_cu_stream);
ae_cu_result copy_to_host(void* to, ae_cu_ptr from, size_t bytes, ae_cu_stream);
ae_cu_result is_capturing(ae_cu_stream, int* status);
ae_cu_result synchronize(ae_cu_stream);
ae_cu_result exchange_capture_mode(int* mode);
ae_cu_result error_string(ae_cu_result error, const char** text);

}  // namespace ptxsim
