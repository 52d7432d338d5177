// The C++ wrapper alone: it compiles as C++17 and throws what the library reports.

#include "check.hpp"
#include "meancache_trt.hpp"

int main() {
  try {
    const meancache_trt::Bundle bundle("/nowhere");
    expect(false, "opening nothing throws");
  } catch (const meancache_trt::Error& error) {
    expect(error.status() == MCT_BUNDLE_ERROR, "of its kind");
    expect(std::string(error.what()).find("no such directory") != std::string::npos, "with words");
  }
  expect(!meancache_trt::version().empty(), "a version");
  return failures == 0 ? 0 : 1;
}
