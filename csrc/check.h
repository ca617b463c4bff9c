// Errors that say which argument was wrong.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace bld_ext {

// Not by way of std::ostringstream, as STD_TORCH_CHECK does it: a process can hold several copies
// of the C++ library, and a stream whose locale is another copy's ends it.
template <typename T> std::string as_text(const T &value) {
  if constexpr (std::is_floating_point_v<T>) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
    return text;
  } else if constexpr (std::is_integral_v<T>) {
    return std::to_string(value);
  } else {
    return value;
  }
}

template <typename... Parts> [[noreturn]] void fail(const Parts &...parts) {
  throw std::runtime_error((std::string() + ... + as_text(parts)));
}

} // namespace bld_ext

// Raises a RuntimeError of all that follows the condition, unless that holds.
#define BLD_CHECK(condition, ...)                                                                  \
  do {                                                                                             \
    if (!(condition))                                                                              \
      ::bld_ext::fail(__VA_ARGS__);                                                                \
  } while (false)
