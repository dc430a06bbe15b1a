// Operands: registers, immediates, addresses, names of variables and special registers.
#include <algorithm>

#include "body.h"

namespace ptxsim {
namespace {

// Special registers whose value does not change while a thread runs (execute.cpp fills them).
constexpr std::string_view kFixed[] = {"%tid.x",
                                       "%tid.y",
                                       "%tid.z",
                                       "%ntid.x",
                                       "%ntid.y",
                                       "%ntid.z",
                                       "%ctaid.x",
                                       "%ctaid.y",
                                       "%ctaid.z",
                                       "%nctaid.x",
                                       "%nctaid.y",
                                       "%nctaid.z",
                                       "%laneid",
                                       "%warpid",
                                       "%nwarpid",
                                       "%smid",
                                       "%nsmid",
                                       "%gridid",
                                       "%lanemask_eq",
                                       "%lanemask_le",
                                       "%lanemask_lt",
                                       "%lanemask_ge",
                                       "%lanemask_gt",
                                       "%dynamic_smem_size",
                                       "%total_smem_size",
                                       "%aggr_smem_size",
                                       "%clusterid.x",
                                       "%clusterid.y",
                                       "%clusterid.z",
                                       "%nclusterid.x",
                                       "%nclusterid.y",
                                       "%nclusterid.z",
                                       "%cluster_ctaid.x",
                                       "%cluster_ctaid.y",
                                       "%cluster_ctaid.z",
                                       "%cluster_nctaid.x",
                                       "%cluster_nctaid.y",
                                       "%cluster_nctaid.z",
                                       "%cluster_ctarank",
                                       "%cluster_nctarank",
                                       "%is_explicit_cluster",
                                       "WARP_SZ"};

}  // namespace

Operand KernelDecoder::constant(uint64_t value) {
  auto [found, added] = constant_rows_.emplace(value, int32_t(constant_rows_.size()));
  if (added) kernel_.constants.insert(kernel_.constants.end(), kLanes, value);
  Operand o;
  o.kind = Operand::kRow;
  o.row = ~found->second;
  return o;
}

bool KernelDecoder::find_register(std::string_view name, Operand& out) const {
  size_t stem = name.size();
  while (stem > 0 && name[stem - 1] >= '0' && name[stem - 1] <= '9') --stem;
  uint32_t number = 0;
  for (size_t i = stem; i < name.size(); ++i) number = number * 10 + uint32_t(name[i] - '0');
  std::string_view prefix = name.substr(0, stem);
  for (size_t s = scopes_.size(); s-- > 0;) {
    const Scope& scope = scopes_[s];
    if (stem < name.size())
      for (const Scope::Range& range : scope.ranges)
        if (range.prefix == prefix && number < range.count) {
          out.kind = Operand::kRow;
          out.row = range.row + int32_t(number);
          out.bytes = range.bytes;
          return true;
        }
    if (auto found = scope.registers.find(name); found != scope.registers.end()) {
      out.kind = Operand::kRow;
      out.row = found->second.row;
      out.bytes = found->second.bytes;
      return true;
    }
  }
  return false;
}

const Variable* KernelDecoder::find_variable(std::string_view name) {
  for (size_t s = scopes_.size(); s-- > 0;)
    if (auto found = scopes_[s].variables.find(name); found != scopes_[s].variables.end())
      return &found->second;
  if (auto found = module_.variables.find(name); found != module_.variables.end())
    return found->second.space == Space::kShared ? &shared_.at(name) : &found->second;
  return nullptr;
}

bool KernelDecoder::special(std::string_view name, Operand& out) {
  Special::Kind kind;
  if (name == "%clock")
    kind = Special::kClock;
  else if (name == "%clock64")
    kind = Special::kClock64;
  else if (name == "%globaltimer")
    kind = Special::kTimer;
  else if (std::find(std::begin(kFixed), std::end(kFixed), name) != std::end(kFixed))
    kind = Special::kFixed;
  else
    return false;
  auto found = std::find_if(kernel_.specials.begin(), kernel_.specials.end(),
                            [&](const Special& s) { return s.name == name; });
  if (found == kernel_.specials.end())
    found = kernel_.specials.insert(found, Special{kind, name, next_row_++});
  out.kind = Operand::kRow;
  out.row = found->row;
  out.name = name;
  return true;
}

Operand KernelDecoder::named(const Token& token) {
  Operand o;
  if (token.text == "_") {
    o.kind = Operand::kSink;
    o.row = 0;
    return o;
  }
  if (find_register(token.text, o)) return o;
  if (const Variable* v = find_variable(token.text)) {
    o = constant(v->address);
    o.kind = Operand::kSymbol;
    o.offset = int64_t(v->address);
    o.name = v->name;
    return o;
  }
  if (special(token.text, o)) return o;
  Reader::fail("a register, variable or special register is expected", token);
}

Operand KernelDecoder::immediate(const Types& types, size_t index) {
  const Token& first = in_.peek();
  bool minus = in_.accept('-');
  bool inverted = !minus && in_.accept('~');
  if (!minus && !inverted) in_.accept('+');
  const Token& token = in_.next();
  std::string_view type = types.last;
  bool f32 = type == "f32" || type == "f16" || type == "bf16" || type == "f16x2" || type == "tf32";
  if (token.kind == Token::kFloat32 || token.kind == Token::kFloat64) {
    bool single = token.kind == Token::kFloat32;
    uint64_t bits = token.value;
    if (minus) bits ^= uint64_t{1} << (single ? 31 : 63);
    if (single && type == "f64") return constant(bits_of(double(as_float(bits))));
    if (!single && f32) return constant(bits_of(float(as_double(bits))));
    return constant(bits);
  }
  if (token.kind != Token::kInteger) Reader::fail("an operand is expected", first);
  uint64_t value = minus ? -token.value : inverted ? ~token.value : token.value;
  int bytes = type_bytes(type);
  if (type == "pred") bytes = 4;
  if (types.wide_addend && index == 3) bytes *= 2;
  if (bytes != 0 && bytes < 8) value &= (uint64_t{1} << (8 * bytes)) - 1;
  return constant(value);
}

// "[register + 16]", "[variable]", "[64]"; with coordinates, "[map, {x, y}]", those are `items`.
Operand KernelDecoder::address(const Types& types, size_t index) {
  Operand o;
  o.kind = Operand::kAddress;
  o.row = -1;
  if (in_.peek().kind == Token::kWord) {
    Operand base = named(in_.next());
    o.name = base.name;
    if (base.kind == Operand::kSymbol)
      o.offset = base.offset;
    else
      o.row = base.row;
  } else {
    o.offset = in_.integer();
  }
  while (in_.peek().is('+') || in_.peek().is('-')) {
    bool minus = in_.next().is('-');
    int64_t value = in_.integer();
    o.offset += minus ? -value : value;
  }
  while (in_.accept(',')) o.items.push_back(operand(types, index));
  in_.expect(']');
  return o;
}

Operand KernelDecoder::operand(const Types& types, size_t index) {
  if (in_.accept('[')) return address(types, index);
  if (in_.accept('{')) {
    Operand o;
    o.kind = Operand::kVector;
    while (!in_.accept('}')) {
      o.items.push_back(operand(types, index));
      if (!in_.peek().is('}')) in_.expect(',');
    }
    return o;
  }
  if (in_.accept('!')) {
    Operand o = named(in_.word("a predicate"));
    o.negated = true;
    return o;
  }
  if (in_.peek().kind != Token::kWord) return immediate(types, index);
  const Token& token = in_.next();
  Operand o = named(token);
  if (o.kind == Operand::kSymbol && (in_.peek().is('+') || in_.peek().is('-'))) {
    bool minus = in_.next().is('-');
    int64_t value = in_.integer();
    std::string_view name = o.name;
    o = constant(uint64_t(o.offset + (minus ? -value : value)));
    o.kind = Operand::kSymbol;
    o.offset = int64_t(kernel_.constants[size_t(~o.row) * kLanes]);
    o.name = name;
  }
  return o;
}

}  // namespace ptxsim
