#include "narrow.h"

#include <algorithm>

namespace ptxsim {

double round_to(const Format& format, double x, Rounding rounding, bool finite) {
  if (std::isnan(x) || x == 0) return x;
  bool negative = std::signbit(x);
  double magnitude = std::fabs(x);
  double result;
  if (std::isinf(magnitude)) {
    result = magnitude;
  } else {
    int exponent = std::max(std::ilogb(magnitude), format.min_exponent);
    int unit = exponent - (format.digits - 1);
    double units = std::ldexp(magnitude, -unit);
    double whole = std::floor(units);
    double rest = units - whole;
    bool up = false;
    switch (rounding) {
      case Rounding::kNone:
      case Rounding::kEven:
        up = rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2) != 0);
        break;
      case Rounding::kAway:
        up = rest >= 0.5;
        break;
      case Rounding::kZero:
        break;
      case Rounding::kDown:
        up = rest > 0 && negative;
        break;
      case Rounding::kUp:
        up = rest > 0 && !negative;
        break;
    }
    result = std::ldexp(whole + (up ? 1 : 0), unit);
    if (result > format.largest) {
      bool cut = rounding == Rounding::kZero || (rounding == Rounding::kDown && !negative) ||
                 (rounding == Rounding::kUp && negative);
      result = cut ? format.largest : std::numeric_limits<double>::infinity();
    }
  }
  if (finite) result = std::min(result, format.largest);
  return negative ? -result : result;
}

}  // namespace ptxsim
