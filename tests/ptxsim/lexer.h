// PTX text as tokens. Names keep their dots: an opcode with its modifiers, a directive and a
// register's component ("%tid.x") are one token each.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace ptxsim {

struct Token {
  enum Kind : uint8_t {
    kEnd,
    kWord,     // name, opcode or directive
    kInteger,  // `value`, two's complement
    kFloat32,  // `value` holds the bits: 0f3F800000
    kFloat64,  // `value` holds the bits: 0d3FF0000000000000, 1.5
    kString,   // `text` without its quotes
    kPunctuation,
  };
  Kind kind = kEnd;
  char punctuation = 0;
  int32_t line = 0;
  std::string_view text;
  uint64_t value = 0;

  bool is(char c) const { return kind == kPunctuation && punctuation == c; }
  bool is(std::string_view word) const { return kind == kWord && text == word; }
};

// The tokens of a text, which they point into; the last one is kEnd. Throws DecodeError.
std::vector<Token> tokenize(std::string_view text);

}  // namespace ptxsim
