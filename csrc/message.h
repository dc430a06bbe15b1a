// Text of error messages: small printers shared by the validators.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/abi.h"

namespace ae {

inline const char* dtype_name(int32_t dtype) {
  static constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "int64",
                                           "int32",   "int16",   "int8",     "uint8",   "bool"};
  return dtype >= AE_F32 && dtype <= AE_BOOL ? kNames[dtype] : "an unsupported dtype";
}

inline std::string shape_text(const int64_t* size, int64_t rank) {
  std::string text = "[";
  for (int64_t i = 0; i < rank; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(size[i]);
  }
  return text + "]";
}

// The stable ABI carries std::invalid_argument to Python as ValueError with its exact text. Other
// Python types have no C++ twin: a prefix names them, and attnengine.ops turns it into the type.
[[noreturn]] inline void value_error(const std::string& text) { throw std::invalid_argument(text); }
[[noreturn]] inline void type_error(const std::string& text) {
  throw std::invalid_argument("TypeError: " + text);
}
[[noreturn]] inline void not_implemented(const std::string& text) {
  throw std::invalid_argument("NotImplementedError: " + text);
}

// What the fault word of a launch says, as Python's IndexError.
[[noreturn]] inline void raise_fault(int32_t index, const ae_capture& c) {
  throw std::out_of_range("captures[" + std::to_string(index) + "] of shape " +
                          shape_text(c.size, c.rank) +
                          ": an index is out of range for a key that is not masked; clamp the "
                          "index or mask those keys in mask_mod");
}

}  // namespace ae
