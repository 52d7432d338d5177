// Open, create, run, decode and destroy, again and again: for valgrind and the sanitizers.
//
// usage: cycles BUNDLE COUNT

#include <cstdlib>
#include <iostream>

#include "meancache_trt.hpp"

namespace {

void cycle(const char* path) {
  const meancache_trt::Bundle bundle(path);
  meancache_trt::SessionOptions options;
  options.threads = 1;
  meancache_trt::Session session(bundle, options);
  for (const meancache_trt::Tensor& tensor : session.conditioning()) {
    const std::vector<char> zeros(tensor.size_bytes);
    session.set_conditioning(tensor.name, zeros.data(), zeros.size());
  }
  session.run_seeds({1});
  session.run_seeds({2}, [](std::int64_t done, std::int64_t) { return done < 2; });
  session.run_seeds({3});
  session.decode_rgb();
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: cycles BUNDLE COUNT\n";
    return 2;
  }
  try {
    for (int left = std::atoi(arguments[2]); left > 0; --left) {
      cycle(arguments[1]);
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
