// From a bit width at run time to one at compile time: the one place where a width is looked at.
#pragma once

#include <cstddef>
#include <iterator>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "formats.h"

namespace exllama::layout {

// f(bits as a std::integral_constant<int>). Throws std::logic_error for a width that is not in kWidths.
template <std::size_t i = 0, typename F>
decltype(auto) with_bits(int bits, F&& f) {
  constexpr int kWidth = kWidths[i];
  if (bits == kWidth) return f(std::integral_constant<int, kWidth>{});
  if constexpr (i + 1 < std::size(kWidths)) {
    return with_bits<i + 1>(bits, f);
  } else {
    throw std::logic_error("exllama_ops: there is no format of " + std::to_string(bits) + " bits");
  }
}

// The format of a width. Throws as with_bits does.
inline const Format& format_of(int bits) {
  return with_bits(bits, [](auto width) -> const Format& { return kFormat<width.value>; });
}

}  // namespace exllama::layout
