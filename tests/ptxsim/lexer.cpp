#include "lexer.h"

#include <array>
#include <bit>
#include <cstdlib>
#include <string>

#include "machine.h"

namespace ptxsim {
namespace {

enum : uint8_t { kSpace = 1, kNameStart = 2, kName = 4, kDigit = 8, kHex = 16 };

constexpr std::array<uint8_t, 256> classes() {
  std::array<uint8_t, 256> of{};
  for (int c : {' ', '\t', '\r', '\n', '\f', '\v'}) of[c] = kSpace;
  for (int c = 'a'; c <= 'z'; ++c) of[c] |= kNameStart | kName;
  for (int c = 'A'; c <= 'Z'; ++c) of[c] |= kNameStart | kName;
  for (int c : {'_', '$', '%', '.'}) of[c] |= kNameStart | kName;
  of[':'] = 0;  // "::" inside an opcode is seen to below
  for (int c = '0'; c <= '9'; ++c) of[c] |= kName | kDigit | kHex;
  for (int c = 'a'; c <= 'f'; ++c) of[c] |= kHex;
  for (int c = 'A'; c <= 'F'; ++c) of[c] |= kHex;
  return of;
}
constexpr auto kClass = classes();

uint8_t class_of(char c) { return kClass[uint8_t(c)]; }

int digit(char c) { return c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10; }

class Lexer {
 public:
  explicit Lexer(std::string_view text) : at_(text.data()), end_(text.data() + text.size()) {}

  std::vector<Token> all() {
    std::vector<Token> tokens;
    tokens.reserve(size_t(end_ - at_) / 4 + 16);
    while (true) {
      skip_space();
      Token& token = tokens.emplace_back();
      token.line = line_;
      if (at_ == end_) return tokens;
      read(token);
    }
  }

 private:
  char peek(int ahead = 0) const { return end_ - at_ > ahead ? at_[ahead] : '\0'; }

  [[noreturn]] void fail(const std::string& why) {
    throw DecodeError("PTX line " + std::to_string(line_) + ": " + why);
  }

  void skip_space() {
    while (at_ < end_) {
      if (class_of(*at_) == kSpace) {
        line_ += *at_++ == '\n';
      } else if (*at_ == '/' && peek(1) == '/') {
        while (at_ < end_ && *at_ != '\n') ++at_;
      } else if (*at_ == '/' && peek(1) == '*') {
        at_ += 2;
        while (at_ < end_ && !(*at_ == '*' && peek(1) == '/')) line_ += *at_++ == '\n';
        if (at_ == end_) fail("a comment does not end");
        at_ += 2;
      } else {
        return;
      }
    }
  }

  void read(Token& token) {
    const char* start = at_;
    uint8_t c = class_of(*at_);
    if (c & kDigit) {
      number(token);
    } else if (c & kNameStart) {
      token.kind = Token::kWord;
      bool directive = *at_++ == '.';  // ".reg.b16" is two of them, as in cuda_fp16.h
      while (at_ < end_ && !(directive && *at_ == '.') &&
             (class_of(*at_) & kName ||
              (*at_ == ':' && peek(1) == ':' && class_of(peek(2)) & kName))) {
        at_ += *at_ == ':' ? 2 : 1;
      }
    } else if (*at_ == '"') {
      token.kind = Token::kString;
      ++start;
      for (++at_; at_ < end_ && *at_ != '"'; ++at_)
        if (*at_ == '\n') fail("a string does not end on its line");
      if (at_ == end_) fail("a string does not end");
      token.text = {start, size_t(at_++ - start)};
      return;
    } else {
      token.kind = Token::kPunctuation;
      token.punctuation = *at_++;
    }
    token.text = {start, size_t(at_ - start)};
  }

  uint64_t digits(int base) {
    uint64_t value = 0;
    const char* start = at_;
    for (; at_ < end_ && class_of(*at_) & kHex && digit(*at_) < base; ++at_)
      value = value * uint64_t(base) + uint64_t(digit(*at_));
    if (at_ == start) fail("a number without digits");
    return value;
  }

  uint64_t bits(int count) {
    const char* start = at_;
    uint64_t value = digits(16);
    if (at_ - start != count) fail("a hexadecimal float has " + std::to_string(count) + " digits");
    return value;
  }

  void number(Token& token) {
    token.kind = Token::kInteger;
    char second = char(peek(1) | 0x20);
    if (*at_ == '0' && second == 'f') {
      at_ += 2;
      token.kind = Token::kFloat32;
      token.value = bits(8);
    } else if (*at_ == '0' && second == 'd') {
      at_ += 2;
      token.kind = Token::kFloat64;
      token.value = bits(16);
    } else if (*at_ == '0' && second == 'x') {
      at_ += 2;
      token.value = digits(16);
    } else if (*at_ == '0' && second == 'b') {
      at_ += 2;
      token.value = digits(2);
    } else {
      const char* start = at_;
      while (class_of(peek()) & kDigit) ++at_;
      if (peek() == '.' || (peek() | 0x20) == 'e') {
        char* stop = nullptr;
        std::string copy(start, size_t(std::min<ptrdiff_t>(end_ - start, 64)));
        double value = std::strtod(copy.c_str(), &stop);
        at_ = start + (stop - copy.c_str());
        token.kind = Token::kFloat64;
        token.value = std::bit_cast<uint64_t>(value);
      } else {
        at_ = start;
        token.value = digits(*start == '0' ? 8 : 10);
      }
    }
    if (token.kind == Token::kInteger && (peek() | 0x20) == 'u') ++at_;
    if (class_of(peek()) & kName) fail("a number that ends in '" + std::string(1, peek()) + "'");
  }

  const char* at_;
  const char* end_;
  int32_t line_ = 1;
};

}  // namespace

std::vector<Token> tokenize(std::string_view text) { return Lexer(text).all(); }

}  // namespace ptxsim
