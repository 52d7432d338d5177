// Errors inside the library, and texts as the Python host writes them.

#ifndef MEANCACHE_TRT_HOST_ERROR_HPP
#define MEANCACHE_TRT_HOST_ERROR_HPP

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "meancache_trt.h"

namespace mct {

// An error with its place in the tree; the C functions turn it into a status and a text.
class Error : public std::runtime_error {
 public:
  Error(mct_status status, const std::string& what) : std::runtime_error(what), status_(status) {}
  mct_status status() const noexcept { return status_; }

 private:
  mct_status status_;
};

// Numbers as Python's repr and str, so that messages are the same.
std::string text_of(double value);
std::string text_of(std::int64_t value);
// As Python's format "%.{digits}g".
std::string general(double value, int digits = 6);
// As Python's format "%.6f".
std::string fixed6(double value);
// As Python's repr of a text.
std::string repr_of(std::string_view text);
// As Python's repr of a tuple: (1, 2), and (1,) for one.
std::string tuple_of(const std::vector<std::int64_t>& values);
// Joined by ", ".
std::string joined(const std::vector<std::string>& texts);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_ERROR_HPP
