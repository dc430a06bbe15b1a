#include "body.h"

#include <algorithm>

namespace ptxsim {
namespace {

void split(std::string_view text, Opcode& opcode) {
  opcode.text = text;
  opcode.part.clear();
  for (size_t at = 0; at <= text.size();) {
    size_t dot = std::min(text.find('.', at), text.size());
    opcode.part.push_back(text.substr(at, dot - at));
    at = dot + 1;
  }
}

template <class F>
void each_operand_row(Operand& o, F f) {
  if (o.row >= 0) f(o.row);
  for (Operand& item : o.items) each_operand_row(item, f);
}

}  // namespace

KernelDecoder::KernelDecoder(const Module& module, Kernel& kernel)
    : module_(module), kernel_(kernel), in_(module.tokens, 0) {}

void KernelDecoder::decode_all() {
  const Function& f = *kernel_.function;
  lay_out_shared(f);
  uint32_t align = 16;
  for (auto& [name, v] : shared_)
    if (v.dynamic) align = std::max(align, v.align);
  kernel_.dynamic_offset = uint32_t(align_up(kernel_.static_shared, align));
  for (auto& [name, v] : shared_)
    if (v.dynamic) v.address = kernel_.dynamic_offset;
  function(f);
  kernel_.start = compiled_.at(f.name).start;
  // Kept rows first, then the shared ones.
  int32_t shift = kSharedRows - next_row_;
  auto place = [&](int32_t& row) {
    if (row >= kSharedRows) row -= shift;
  };
  for (Instr& instr : kernel_.code) {
    place(instr.guard);
    for (Operand& o : instr.op) each_operand_row(o, place);
  }
  kernel_.rows = next_row_ + taken_;
  kernel_.local_bytes = uint32_t(align_up(kernel_.local_bytes, 16));
  kernel_.call_bytes = uint32_t(align_up(kernel_.call_bytes, 16));
  if (!f.parameters.empty())
    kernel_.parameter_bytes = f.parameters.back().offset + f.parameters.back().bytes;
}

// Shared memory of the kernel: what its functions declare or name, in order of appearance.
void KernelDecoder::lay_out_shared(const Function& f) {
  laid_out_.push_back(f.name);
  auto place = [&](Variable v) {
    if (!v.dynamic) {
      v.address = align_up(kernel_.static_shared, v.align);
      kernel_.static_shared = uint32_t(v.address + v.bytes);
      kernel_.shared.push_back(v);
    } else {
      kernel_.dynamic_shared = true;
    }
    return v;
  };
  for (size_t at = f.body; at < f.body_end; ++at) {
    const Token& token = module_.tokens[at];
    if (token.kind != Token::kWord) continue;
    if (token.text == ".shared") {
      Reader in(module_.tokens, at + 1);
      Reader::Declaration d = in.declaration();
      inner_shared_[at + 1] =
          place({Space::kShared, d.name, 0, d.unsized ? 0 : d.bytes, d.align, d.unsized});
    } else if (auto v = module_.variables.find(token.text);
               v != module_.variables.end() && v->second.space == Space::kShared) {
      if (!shared_.count(token.text)) shared_.emplace(token.text, place(v->second));
    } else if (auto g = module_.functions.find(token.text); g != module_.functions.end()) {
      if (g->second.body != 0 &&
          std::find(laid_out_.begin(), laid_out_.end(), token.text) == laid_out_.end())
        lay_out_shared(g->second);
    }
  }
}

void KernelDecoder::function(const Function& f) {
  if (std::find(calling_.begin(), calling_.end(), f.name) != calling_.end())
    throw DecodeError("PTX line " + std::to_string(f.line) + ": function " + std::string(f.name) +
                      " calls itself: recursion is not supported");
  calling_.push_back(f.name);
  for (size_t at = f.body; at < f.body_end; ++at) {  // its callees first
    const Token& token = module_.tokens[at];
    if (token.kind != Token::kWord) continue;
    auto callee = module_.functions.find(token.text);
    if (callee != module_.functions.end() && callee->second.body != 0 &&
        !compiled_.count(token.text))
      function(callee->second);
  }
  calling_.pop_back();

  labels_.clear();
  fixups_.clear();
  tables_.clear();
  table_names_.clear();
  scopes_.clear();
  scopes_.emplace_back();
  next_virtual_ = 0;
  location_ = 0;
  Compiled compiled;
  compiled.start = int32_t(kernel_.code.size());
  declare_parameters(f, compiled);
  size_t first_table = kernel_.branch_tables.size();
  in_.seek(f.body);
  in_.expect('{');
  block(f, compiled);
  Instr end;  // a body may end without one
  end.control = compiled.return_row < 0 ? Instr::kExit : Instr::kReturn;
  end.attr[0] = compiled.return_row;
  end.text = "ret";
  end.line = module_.tokens[f.body_end - 1].line;
  emit(end);
  patch_labels(compiled, first_table);
  taken_ +=
      allocate_rows(kernel_.code, compiled.start, kernel_.branch_tables, next_virtual_, taken_);
  compiled_.emplace(f.name, std::move(compiled));
}

void KernelDecoder::declare_parameters(const Function& f, Compiled& compiled) {
  if (f.entry) {
    for (const Parameter& p : f.parameters)
      scopes_[0].variables[p.name] = {Space::kParam, p.name, p.offset, p.bytes, p.align, false};
    return;
  }
  compiled.return_row = next_row_++;
  auto declare = [&](const std::vector<Parameter>& list, std::vector<Variable>& variables,
                     std::vector<int32_t>& rows) {
    for (const Parameter& p : list) {
      Variable v{Space::kParam, p.name, 0, p.bytes, p.align, false};
      int32_t row = -1;
      if (p.in_register) {
        row = next_row_++;
        scopes_[0].registers[p.name] = {row, uint8_t(p.bytes)};
      } else {
        call_bytes_ = uint32_t(align_up(call_bytes_, std::max(p.align, 8u)));
        v.address = kCallParams + call_bytes_;
        call_bytes_ += p.bytes;
        scopes_[0].variables[p.name] = v;
      }
      variables.push_back(v);
      rows.push_back(row);
    }
  };
  declare(f.results, compiled.results, compiled.result_rows);
  declare(f.parameters, compiled.parameters, compiled.parameter_rows);
  kernel_.call_bytes = std::max(kernel_.call_bytes, call_bytes_);
}

void KernelDecoder::block(const Function& f, Compiled& compiled) {
  while (!in_.accept('}')) statement(f, compiled);
}

void KernelDecoder::statement(const Function& f, Compiled& compiled) {
  if (in_.accept('{')) {
    scopes_.emplace_back();
    uint32_t before = call_bytes_;
    block(f, compiled);
    call_bytes_ = before;
    scopes_.pop_back();
    return;
  }
  if (in_.accept(';')) return;
  const Token& token = in_.peek();
  if (token.kind == Token::kWord && token.text[0] == '.') {
    in_.next();
    if (!directive(token)) Reader::fail("an unknown directive", token);
    return;
  }
  if (token.kind == Token::kWord && in_.peek(1).is(':')) {
    in_.next();
    in_.next();
    if (in_.accept(".branchtargets")) {
      table_names_[token.text] = tables_.size();
      auto& table = tables_.emplace_back();
      do {
        const Token& label = in_.word("a label");
        table.emplace_back(label.text, label.line);
      } while (in_.accept(','));
      in_.expect(';');
    } else if (!labels_.emplace(token.text, int32_t(kernel_.code.size())).second) {
      Reader::fail("a label that is there already", token);
    }
    return;
  }
  instruction(compiled);
}

bool KernelDecoder::directive(const Token& token) {
  std::string_view name = token.text;
  if (name == ".reg")
    registers();
  else if (name == ".local")
    variable(Space::kLocal);
  else if (name == ".shared")
    variable(Space::kShared);
  else if (name == ".param")
    variable(Space::kParam);
  else if (name == ".loc")
    location();
  else if (name == ".pragma")
    while (!in_.accept(';')) in_.next();
  else
    return false;
  return true;
}

void KernelDecoder::registers() {
  Scope& scope = scopes_.back();
  Reader::Declaration d = in_.declaration();
  int bytes = type_bytes(d.type.substr(1));
  while (true) {
    if (d.array || d.bytes != uint64_t(bytes)) in_.fail("vectors of registers are not supported");
    if (bytes > 8) in_.fail("128-bit registers are not supported");
    if (d.range) {
      scope.ranges.push_back(
          {d.name, uint32_t(d.count), kVirtualRows + next_virtual_, uint8_t(bytes)});
      next_virtual_ += int32_t(d.count);
    } else {
      scope.registers[d.name] = {kVirtualRows + next_virtual_++, uint8_t(bytes)};
    }
    if (!in_.accept(',')) break;
    d.range = false;
    d.name = in_.word("a register's name").text;
    if (in_.accept('<')) {
      d.range = true;
      d.count = uint64_t(in_.integer());
      in_.expect('>');
    }
  }
  in_.expect(';');
}

void KernelDecoder::variable(Space space) {
  size_t at = in_.position();
  Reader::Declaration d = in_.declaration();
  Variable v{space, d.name, 0, d.bytes, d.align, false};
  if (space == Space::kShared) {
    v = inner_shared_.at(at);
    if (v.dynamic) v.address = kernel_.dynamic_offset;
  } else {
    if (d.unsized) in_.fail("an array of unknown size is supported in shared memory alone");
    uint32_t& used = space == Space::kLocal ? kernel_.local_bytes : call_bytes_;
    uint64_t start = align_up(used, std::max(d.align, 8u));
    v.address = start + (space == Space::kParam ? kCallParams : 0);
    used = uint32_t(start + d.bytes);
    kernel_.call_bytes = std::max(kernel_.call_bytes, call_bytes_);
  }
  scopes_.back().variables[d.name] = v;
  in_.expect(';');
}

// ".loc 2 409 9, function_name $info+12, inlined_at 1 18 3"
void KernelDecoder::location() {
  Location at;
  at.file = int(in_.integer());
  at.line = int(in_.integer());
  in_.integer();
  while (in_.accept(',')) {
    if (in_.accept("function_name")) {
      in_.next();
      if (in_.accept('+')) in_.integer();
    } else if (in_.accept("inlined_at")) {
      at.inlined_file = int(in_.integer());
      at.inlined_line = int(in_.integer());
      in_.integer();
    } else {
      in_.fail("an unknown part of .loc");
    }
  }
  if (at.line == 0) return;  // code of the compiler's own: the line before is the nearest
  kernel_.locations.push_back(at);
  location_ = int32_t(kernel_.locations.size() - 1);
}

Instr& KernelDecoder::emit(Instr instr) {
  instr.location = location_;
  return kernel_.code.emplace_back(std::move(instr));
}

void KernelDecoder::instruction(const Compiled& compiled) {
  Instr instr;
  if (in_.accept('@')) {
    instr.guard_negated = in_.accept('!');
    const Token& token = in_.word("a predicate");
    Operand guard;
    if (!find_register(token.text, guard)) Reader::fail("a predicate is expected", token);
    instr.guard = guard.row;
  }
  const Token& token = in_.word("an instruction");
  instr.line = token.line;
  instr.text = token.text;
  split(token.text, opcode_);
  opcode_.line = token.line;
  std::string_view name = opcode_.name();
  if (name == "call") return call(instr);
  if (name == "bra" || name == "brx") return branch(instr);
  Types types;
  for (size_t i = opcode_.part.size(); i-- > 1 && types.last.empty();)
    if (type_bytes(opcode_.part[i]) != 0) types.last = opcode_.part[i];
  types.wide_addend = name == "mad" && opcode_.has("wide");
  for (size_t i = 0; !in_.peek().is(';'); ++i) {
    if (i != 0) {
      if (i == 1 && in_.accept('|'))
        instr.pair = true;
      else
        in_.expect(',');
    }
    instr.op.push_back(operand(types, i));
  }
  in_.expect(';');
  decode(opcode_, instr);
  if (instr.control == Instr::kReturn) {
    instr.attr[0] = compiled.return_row;
    if (compiled.return_row < 0) instr.control = Instr::kExit;
  }
  emit(std::move(instr));
}

void KernelDecoder::branch(Instr& instr) {
  for (size_t i = 1; i < opcode_.part.size(); ++i)
    if (opcode_.part[i] != "uni" && opcode_.part[i] != "idx")
      unknown(opcode_, "modifier ." + std::string(opcode_.part[i]));
  if (opcode_.name() == "bra") {
    const Token& label = in_.word("a label");
    Operand o;
    o.kind = Operand::kLabel;
    instr.control = Instr::kBranch;
    instr.op.push_back(o);
    fixups_.push_back({kernel_.code.size(), 0, label.text, label.line});
  } else {
    instr.control = Instr::kBranchIndexed;
    const Token& index = in_.word("a register");
    instr.op.push_back(named(index));
    in_.expect(',');
    const Token& table = in_.word("a list of .branchtargets");
    auto found = table_names_.find(table.text);
    if (found == table_names_.end()) Reader::fail("an unknown list of .branchtargets", table);
    instr.attr[0] = int64_t(found->second);
  }
  in_.expect(';');
  instr.counter = 0;
  emit(std::move(instr));
}

void KernelDecoder::patch_labels(const Compiled& compiled, size_t first_table) {
  auto find = [&](std::string_view label, int line) {
    auto found = labels_.find(label);
    if (found == labels_.end())
      throw DecodeError("PTX line " + std::to_string(line) + ": unknown label " +
                        std::string(label));
    return found->second;
  };
  for (const Fixup& f : fixups_)
    kernel_.code[f.instruction].op[f.operand].offset = find(f.label, f.line);
  for (auto& table : tables_) {
    auto& targets = kernel_.branch_tables.emplace_back();
    for (auto& [label, line] : table) targets.push_back(find(label, line));
  }
  for (size_t i = size_t(compiled.start); i < kernel_.code.size(); ++i)
    if (kernel_.code[i].control == Instr::kBranchIndexed)
      kernel_.code[i].attr[0] += int64_t(first_table);
}

std::unique_ptr<Kernel> decode_kernel(const Module& module, const Function& function) {
  auto kernel = std::make_unique<Kernel>();
  kernel->module = &module;
  kernel->function = &function;
  KernelDecoder(module, *kernel).decode_all();
  return kernel;
}

}  // namespace ptxsim
