// Reads tokens one after another; what both parsers (module.cpp, body.cpp) share.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "lexer.h"
#include "machine.h"
#include "module.h"

namespace ptxsim {

class Reader {
 public:
  Reader(const std::vector<Token>& tokens, size_t at) : tokens_(tokens), at_(at) {}

  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  const Token& next() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
  bool accept(char c) { return peek().is(c) && (next(), true); }
  bool accept(std::string_view word) { return peek().is(word) && (next(), true); }
  void expect(char c) {
    if (!accept(c)) fail(std::string("'") + c + "' is expected");
  }
  const Token& word(const char* what) {
    if (peek().kind != Token::kWord) fail(std::string(what) + " is expected");
    return next();
  }
  int64_t integer() {
    bool minus = accept('-');
    if (peek().kind != Token::kInteger) fail("an integer is expected");
    int64_t value = int64_t(next().value);
    return minus ? -value : value;
  }
  // After an opening bracket: to behind the one that closes it.
  void skip_to_close(char open, char close) {
    for (int depth = 1; depth > 0;) {
      const Token& token = next();
      if (token.kind == Token::kEnd) fail(std::string("the text ends before '") + close + "'");
      depth += token.is(open) ? 1 : token.is(close) ? -1 : 0;
    }
  }

  [[noreturn]] void fail(const std::string& why) const { fail(why, peek()); }
  [[noreturn]] static void fail(const std::string& why, const Token& at) {
    std::string found = at.kind == Token::kEnd ? "the end of the text" : std::string(at.text);
    throw DecodeError("PTX line " + std::to_string(at.line) + ": " + why + ", not '" + found + "'");
  }

  // What follows ".shared", ".local", ".param", ...: ".align 16 .b8 name[64]".
  struct Declaration {
    uint32_t align = 0;
    std::string_view type, name;
    uint64_t bytes = 0;
    uint64_t count = 1;  // "name<count>" of registers
    bool array = false, unsized = false, range = false;
    int line = 0;
  };
  Declaration declaration() {
    Declaration d;
    int vector = 1;
    while (true) {
      if (accept(".align")) {
        d.align = uint32_t(integer());
      } else if (accept(".v2")) {
        vector = 2;
      } else if (accept(".v4")) {
        vector = 4;
      } else if (peek().is(".attribute")) {
        fail("an attribute that is not supported");
      } else {
        break;
      }
    }
    d.type = word("a type").text;
    uint64_t each = uint64_t(type_bytes(d.type.substr(1)) * vector);
    if (d.type[0] != '.' || each == 0) fail("an unknown type '" + std::string(d.type) + "'");
    skip_pointer();
    const Token& name = word("a name");
    d.name = name.text;
    d.line = name.line;
    d.bytes = each;
    if (d.align == 0) d.align = uint32_t(each);
    while (accept('[')) {
      d.array = true;
      if (accept(']')) {
        d.unsized = true;
        continue;
      }
      d.bytes *= uint64_t(integer());
      expect(']');
    }
    if (accept('<')) {
      d.count = uint64_t(integer());
      d.range = true;
      expect('>');
    }
    return d;
  }

  size_t position() const { return at_; }
  void seek(size_t at) { at_ = at; }

 private:
  // ".u64 .ptr .global .align 16 name": what a parameter points to.
  void skip_pointer() {
    if (!accept(".ptr")) return;
    for (std::string_view s : {".global", ".shared", ".const", ".local", ".param"})
      if (accept(s)) break;
    if (accept(".align")) integer();
  }

  const std::vector<Token>& tokens_;
  size_t at_;
};

}  // namespace ptxsim
