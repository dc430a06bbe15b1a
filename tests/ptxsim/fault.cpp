// The text of reports: who did it and where.
#include <bit>

#include "cta.h"
#include "module.h"

namespace ptxsim {
namespace {

std::string lanes_text(Mask lanes) {
  if (lanes == kAll) return "all lanes";
  std::string text;
  int ranges = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    int last = l;
    while (last + 1 < kLanes && (lanes >> (last + 1) & 1)) ++last;
    if (++ranges > 1) text += ",";
    text += std::to_string(l);
    if (last > l) text += "-" + std::to_string(last);
    l = last;
  }
  return (ranges == 1 && std::has_single_bit(lanes) ? "lane " : "lanes ") + text;
}

std::string file_line(const Module& module, int file, int line) {
  auto found = module.files.find(file);
  std::string name = found == module.files.end() ? "?" : std::string(found->second);
  return name.substr(name.rfind('/') + 1) + ":" + std::to_string(line);
}

std::string source(const Kernel& kernel, const Instr& instr) {
  const Location& at = kernel.locations[size_t(instr.location)];
  if (at.line == 0) return "";
  std::string text = " (" + file_line(*kernel.module, at.file, at.line);
  if (at.inlined_line != 0)
    text += ", inlined at " + file_line(*kernel.module, at.inlined_file, at.inlined_line);
  return text + ")";
}

}  // namespace

std::string place(const Warp& warp, const Instr& instr, Mask lanes) {
  return "warp " + std::to_string(warp.index) + ", " + lanes_text(lanes) + ", PTX line " +
         std::to_string(instr.line) + ": " + std::string(instr.text) +
         source(*warp.cta->launch->kernel, instr);
}

void fault(const Warp& warp, const Instr& instr, Mask lanes, const std::string& kind,
           const std::string& what) {
  const Cta& cta = *warp.cta;
  auto three = [](uint32_t x, uint32_t y, uint32_t z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  throw Fault(kind, what + "\n  in kernel " + std::string(cta.launch->kernel->function->name) +
                        ", thread block " + three(cta.id[0], cta.id[1], cta.id[2]) + " of " +
                        three(cta.launch->grid[0], cta.launch->grid[1], cta.launch->grid[2]) +
                        ", " + place(warp, instr, lanes));
}

std::string shared_name(const Warp& warp, uint32_t offset) {
  const Kernel& kernel = *warp.cta->launch->kernel;
  std::string place = "byte " + std::to_string(offset) + " of shared memory";
  for (const Variable& v : kernel.shared)
    if (offset >= v.address && offset < v.address + v.bytes)
      return "'" + std::string(v.name) + "' + " + std::to_string(offset - v.address) + " (" +
             place + ")";
  if (offset >= kernel.dynamic_offset && offset < warp.cta->shared_bytes)
    return "dynamic shared memory + " + std::to_string(offset - kernel.dynamic_offset) + " (" +
           place + ")";
  return place;
}

}  // namespace ptxsim
