// What the tests share: a program that counts what failed.

#ifndef MEANCACHE_TRT_HOST_TESTS_CHECK_HPP
#define MEANCACHE_TRT_HOST_TESTS_CHECK_HPP

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include "error.hpp"

inline int failures = 0;

inline void expect(bool is_true, const std::string& behaviour) {
  if (!is_true) {
    std::cerr << "FAILED: " << behaviour << '\n';
    ++failures;
  }
}

// Whether `work` throws an error whose text contains `words`.
template <class Work>
void expect_error(Work work, const std::string& words) {
  try {
    work();
  } catch (const std::exception& error) {
    const std::string found = error.what();
    expect(found.find(words) != std::string::npos, "says '" + words + "', found: " + found);
    return;
  }
  expect(false, "fails with '" + words + "'");
}

inline std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

#endif  // MEANCACHE_TRT_HOST_TESTS_CHECK_HPP
