#include "error.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>

namespace mct {

namespace {

std::string printed(const char* format, int digits, double value) {
  char buffer[512];  // "%.6f" of the largest double has 316 characters
  const int length = std::snprintf(buffer, sizeof buffer, format, digits, value);
  return std::string(buffer, static_cast<std::size_t>(length));
}

std::string shortest(double value) {
  const double size = std::fabs(value);
  // Python writes exponents below 1e-4 and from 1e16 on.
  const bool is_plain = size == 0 || (size >= 1e-4 && size < 1e16);
  char buffer[64];
  const auto format = is_plain ? std::chars_format::fixed : std::chars_format::scientific;
  const auto done = std::to_chars(buffer, buffer + sizeof buffer, value, format);
  std::string text(buffer, done.ptr);
  if (is_plain && text.find('.') == std::string::npos) {
    text += ".0";
  }
  return text;
}

}  // namespace

std::string text_of(double value) {
  if (std::isnan(value)) {
    return "nan";
  }
  if (std::isinf(value)) {
    return value > 0 ? "inf" : "-inf";
  }
  return shortest(value);
}

std::string text_of(std::int64_t value) { return std::to_string(value); }

std::string general(double value, int digits) { return printed("%.*g", digits, value); }

std::string fixed6(double value) { return printed("%.*f", 6, value); }

std::string repr_of(std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const bool has_double = text.find('"') != std::string_view::npos;
  const char mark = has_single && !has_double ? '"' : '\'';
  std::string result(1, mark);
  for (const char letter : text) {
    if (letter == '\n') {
      result += "\\n";
      continue;
    }
    if (letter == mark || letter == '\\') {
      result += '\\';
    }
    result += letter;
  }
  return result + mark;
}

std::string tuple_of(const std::vector<std::int64_t>& values) {
  std::string result = "(";
  for (std::size_t k = 0; k < values.size(); ++k) {
    result += (k == 0 ? "" : ", ") + std::to_string(values[k]);
  }
  return result + (values.size() == 1 ? ",)" : ")");
}

std::string joined(const std::vector<std::string>& texts) {
  std::string result;
  for (std::size_t k = 0; k < texts.size(); ++k) {
    result += (k == 0 ? "" : ", ") + texts[k];
  }
  return result;
}

}  // namespace mct
