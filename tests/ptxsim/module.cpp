// What stands outside of functions' bodies: directives, variables with their initial values, heads
// of functions.
#include "module.h"

#include <algorithm>
#include <cstring>

#include "reader.h"

namespace ptxsim {

int type_bytes(std::string_view type) {
  static constexpr std::pair<std::string_view, int> kTypes[] = {
      {"b8", 1},    {"u8", 1},     {"s8", 1},    {"b16", 2},   {"u16", 2},  {"s16", 2},
      {"f16", 2},   {"b32", 4},    {"u32", 4},   {"s32", 4},   {"f32", 4},  {"b64", 8},
      {"u64", 8},   {"s64", 8},    {"f64", 8},   {"pred", 1},  {"bf16", 2}, {"tf32", 4},
      {"f16x2", 4}, {"bf16x2", 4}, {"b128", 16}, {"u16x2", 4}, {"s16x2", 4}};
  for (auto& [name, bytes] : kTypes)
    if (type == name) return bytes;
  return 0;
}

namespace {

class ModuleParser {
 public:
  explicit ModuleParser(Module& module) : module_(module), in_(module.tokens, 0) {}

  void parse() {
    lay_out();  // addresses must be known before an initial value names one
    in_.seek(0);
    while (in_.peek().kind != Token::kEnd) statement();
    if (module_.target == 0) throw DecodeError("PTX: there is no .target directive");
  }

 private:
  static constexpr std::string_view kLinking[] = {".visible", ".extern", ".weak", ".common"};

  bool linking() {
    for (std::string_view word : kLinking)
      if (in_.accept(word)) return true;
    return false;
  }

  // A first pass over the variables of the module: their addresses.
  void lay_out() {
    uint64_t bytes = 0;
    while (in_.peek().kind != Token::kEnd) {
      const Token& token = in_.next();
      if (token.is('{')) {
        in_.skip_to_close('{', '}');
      } else if (token.is('(')) {
        in_.skip_to_close('(', ')');
      } else if (token.is(".global") || token.is(".const")) {
        Reader::Declaration d = in_.declaration();
        if (d.unsized && !in_.peek().is('='))
          Reader::fail("an array of unknown size is supported in shared memory alone", in_.peek());
        if (d.unsized) d.bytes *= elements();
        bytes = align_up(bytes, std::max(d.align, 16u));
        Variable v{token.is(".const") ? Space::kConst : Space::kGlobal, d.name, bytes, d.bytes,
                   d.align};
        module_.variables.emplace(d.name, v);
        bytes += d.bytes + kGuard;
      }
    }
    module_.storage_bytes = bytes;
    module_.storage = std::make_unique<uint8_t[]>(bytes + kAlign);
    auto base = align_up(reinterpret_cast<uint64_t>(module_.storage.get()), kAlign);
    for (auto& [name, v] : module_.variables) v.address += base;
  }

  uint64_t elements() {  // of the initial value that follows, without reading it
    size_t at = in_.position();
    in_.expect('=');
    in_.expect('{');
    uint64_t count = 1;
    for (int depth = 1; depth > 0;) {
      const Token& token = in_.next();
      depth += token.is('{') ? 1 : token.is('}') ? -1 : 0;
      count += token.is(',');
      if (token.kind == Token::kEnd) in_.fail("'}' is expected");
    }
    in_.seek(at);
    return count;
  }

  void statement() {
    if (in_.accept(".version")) {
      in_.next();
    } else if (in_.accept(".target")) {
      do {
        const Token& token = in_.word("a target");
        if (token.text.substr(0, 3) == "sm_")
          module_.target = std::atoi(std::string(token.text.substr(3)).c_str());
        else if (token.text != "debug" && token.text != "texmode_independent")
          Reader::fail("an unknown target", token);
      } while (in_.accept(','));
    } else if (in_.accept(".address_size")) {
      if (in_.integer() != 64) in_.fail("only .address_size 64 is supported");
    } else if (in_.accept(".file")) {
      int index = int(in_.integer());
      module_.files[index] = in_.next().text;
      while (in_.accept(',')) in_.next();
    } else if (in_.accept(".section")) {
      in_.word("a section");
      in_.expect('{');
      in_.skip_to_close('{', '}');
    } else if (in_.accept(".pragma")) {
      while (!in_.accept(';')) in_.next();
    } else {
      while (linking()) {
      }
      if (in_.accept(".global") || in_.accept(".const")) {
        variable();
      } else if (in_.accept(".shared")) {
        shared();
      } else if (in_.peek().is(".entry") || in_.peek().is(".func")) {
        function();
      } else {
        Reader::fail("an unknown directive", in_.peek());
      }
    }
  }

  void shared() {
    Reader::Declaration d = in_.declaration();
    module_.variables.emplace(
        d.name, Variable{Space::kShared, d.name, 0, d.unsized ? 0 : d.bytes, d.align, d.unsized});
    in_.expect(';');
  }

  void variable() {
    Reader::Declaration d = in_.declaration();
    const Variable& v = module_.variables.at(d.name);
    if (in_.accept('=')) {
      auto* base = reinterpret_cast<uint8_t*>(v.address);
      initialise(base, base + v.bytes, type_bytes(d.type.substr(1)), d.type);
    }
    in_.expect(';');
  }

  uint8_t* initialise(uint8_t* at, uint8_t* end, int bytes, std::string_view type) {
    if (in_.accept('{')) {
      while (!in_.accept('}')) {
        at = initialise(at, end, bytes, type);
        if (!in_.peek().is('}')) in_.expect(',');
      }
      return at;
    }
    if (at + bytes > end) in_.fail("an initial value goes beyond its variable");
    uint64_t value = initial_value(type);
    std::memcpy(at, &value, size_t(bytes));
    return at + bytes;
  }

  uint64_t initial_value(std::string_view type) {
    bool minus = in_.accept('-');
    const Token& token = in_.peek();
    if (token.kind == Token::kFloat32) return in_.next().value ^ (uint64_t{minus} << 31);
    if (token.kind == Token::kFloat64) {
      uint64_t bits = in_.next().value ^ (uint64_t{minus} << 63);
      return type == ".f32" ? bits_of(float(as_double(bits))) : bits;
    }
    if (token.kind != Token::kWord) return uint64_t(minus ? -in_.integer() : in_.integer());
    bool generic = in_.accept("generic");
    if (generic) in_.expect('(');
    const Token& name = in_.word("a variable");
    auto found = module_.variables.find(name.text);
    if (found == module_.variables.end()) Reader::fail("an unknown variable", name);
    if (generic) in_.expect(')');
    uint64_t address = found->second.address;
    if (found->second.space == Space::kShared) Reader::fail("an address of shared memory", name);
    if (in_.accept('+')) address += uint64_t(in_.integer());
    return address;
  }

  void parameters(std::vector<Parameter>& out) {
    uint32_t offset = 0;
    while (!in_.accept(')')) {
      bool in_register = in_.accept(".reg");
      if (!in_register && !in_.accept(".param")) in_.fail("'.param' is expected");
      Reader::Declaration d = in_.declaration();
      if (d.unsized) in_.fail("a parameter of unknown size");
      offset = uint32_t(align_up(offset, d.align));
      out.push_back({d.name, offset, uint32_t(d.bytes), d.align, in_register, d.type});
      offset += uint32_t(d.bytes);
      if (!in_.peek().is(')')) in_.expect(',');
    }
  }

  void function() {
    Function f;
    f.line = in_.peek().line;
    f.entry = in_.next().is(".entry");
    if (in_.accept('(')) parameters(f.results);
    f.name = in_.word("a function's name").text;
    if (in_.accept('(')) parameters(f.parameters);
    while (!in_.peek().is('{') && !in_.accept(';')) attribute(f);
    if (in_.peek().is('{')) {
      f.body = in_.position();
      in_.next();
      in_.skip_to_close('{', '}');
      f.body_end = in_.position();
    }
    Function& known = module_.functions[f.name];
    if (known.body == 0) known = std::move(f);
  }

  void attribute(Function& f) {
    const Token& token = in_.next();
    if (token.is(".maxntid") || token.is(".reqntid")) {
      uint32_t size[3] = {1, 1, 1};
      int n = 0;
      do size[n++] = uint32_t(in_.integer());
      while (n < 3 && in_.accept(','));
      f.max_threads = size[0] * size[1] * size[2];
      if (token.is(".reqntid")) std::copy(size, size + 3, f.required_threads);
    } else if (token.is(".minnctapersm") || token.is(".maxnreg") || token.is(".maxnctapersm")) {
      in_.integer();
    } else if (token.is(".pragma")) {
      while (!in_.accept(';')) in_.next();
    } else if (!token.is(".noreturn")) {
      Reader::fail("an unknown directive of a function", token);
    }
  }

  static constexpr uint64_t kAlign = 256;
  static constexpr uint64_t kGuard = 16;  // between variables, so that no access spans two
  Module& module_;
  Reader in_;
};

}  // namespace

Module::Module(std::string_view ptx) : text(ptx) {
  tokens = tokenize(text);
  ModuleParser(*this).parse();
  initial.assign(storage.get(), storage.get() + storage_bytes + 256);
  for (auto& [name, function] : functions)
    if (function.entry && function.body != 0) kernels.emplace(name, decode_kernel(*this, function));
  tokens = {};
}

void Module::reset() {
  std::copy(initial.begin(), initial.end(), storage.get());
  for (auto& [name, kernel] : kernels) kernel->max_dynamic_shared = Kernel::kDefaultDynamicShared;
}

}  // namespace ptxsim
