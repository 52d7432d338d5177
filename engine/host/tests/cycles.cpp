// Create, run, cancel, decode and destroy sessions, again and again: for valgrind and the
// sanitizers. The bundle is opened once and one session is kept, so that graphs are compiled once:
// that takes most of the time there.
//
// usage: cycles BUNDLE COUNT [BACKEND]

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>

#include "meancache_trt.hpp"

namespace {

using meancache_trt::Bundle;
using meancache_trt::Session;

Session session_of(const Bundle& bundle, const char* backend) {
  meancache_trt::SessionOptions options;
  options.threads = 1;
  options.backend = backend;
  return Session(bundle, options);
}

void use(Session& session) {
  for (const meancache_trt::Tensor& tensor : session.conditioning()) {
    const std::vector<char> zeros(tensor.size_bytes);
    session.set_conditioning(tensor.name, zeros.data(), zeros.size());
  }
  session.run_seeds({1});
  session.run_seeds({2}, [](std::int64_t done, std::int64_t) { return done < 2; });
  session.run_seeds({3});
  session.decode_rgb();
}

void cycles(const char* path, int count, const char* backend) {
  const Bundle bundle(path);
  Session kept = session_of(bundle, backend);  // what shares the compiled graphs
  use(kept);
  for (; count > 0; --count) {
    Session session = session_of(bundle, backend);
    use(session);
  }
}

// Prints the line of the peak of resident memory.
void show_peak() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM", 0) == 0) {
      std::cout << line << '\n';
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 && count != 4) {
    std::cerr << "usage: cycles BUNDLE COUNT [BACKEND]\n";
    return 2;
  }
  const char* backend = count == 4 ? arguments[3] : "";
  try {
    cycles(arguments[1], std::atoi(arguments[2]), backend);
    show_peak();
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
