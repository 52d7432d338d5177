// The C++ noise against published vectors and against the file that Python is tested with.
//
// usage: noise_test PATH/TO/tests/golden/noise.txt

#include "noise.hpp"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "check.hpp"

namespace {

// Rows "philox4x32 10" of tests/kat_vectors in Random123, by the authors of Philox.
void philox_gives_the_published_words() {
  struct Known {
    mct::PhiloxCounter counter;
    mct::PhiloxKey key;
    mct::PhiloxCounter words;
  };
  constexpr std::uint32_t full = 0xffffffffu;
  const Known vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
      {{full, full, full, full},
       {full, full},
       {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
      {{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u},
       {0xa4093822u, 0x299f31d0u},
       {0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u}},
  };
  for (const Known& known : vectors) {
    expect(mct::philox4x32(known.counter, known.key) == known.words, "known answer of Random123");
  }
}

void a_shorter_sample_is_a_prefix_of_a_longer_one() {
  std::vector<float> longer(11, 7.0f);
  std::vector<float> shorter(11, 7.0f);
  mct::philox_normal(5, longer.data(), 10);
  mct::philox_normal(5, shorter.data(), 6);
  for (std::size_t k = 0; k < 6; ++k) {
    expect(shorter[k] == longer[k], "prefix of the same seed");
  }
  expect(shorter[6] == 7.0f && longer[10] == 7.0f, "nothing is written behind the last value");
  mct::philox_normal(5, nullptr, 0);
}

struct Case {
  std::uint64_t seed = 0;
  std::string shape;
  std::vector<float> values;
};

std::size_t elements(const std::string& shape) {
  std::istringstream words(shape);
  std::size_t product = 1;
  for (std::size_t size = 0; words >> size;) {
    product *= size;
  }
  return product;
}

// The format is described at the head of the file.
std::vector<Case> read_cases(std::istream& file) {
  std::vector<Case> cases;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string kind;
    words >> kind;
    if (kind == "seed") {
      cases.emplace_back();
      words >> cases.back().seed;
    } else if (kind == "shape") {
      std::getline(words, cases.back().shape);
    } else if (!kind.empty() && kind[0] != '#') {
      cases.back().values.push_back(std::strtof(kind.c_str(), nullptr));
    }
  }
  return cases;
}

bool is_within_one_ulp(float found, float expected) {
  const float infinity = std::numeric_limits<float>::infinity();
  return found >= std::nextafterf(expected, -infinity) &&
         found <= std::nextafterf(expected, infinity);
}

// One float32 ulp: log, cos and sin may differ in the last bit of a double between mathematics
// libraries, which can move the rounding to float by one step and no further.
void noise_equals_the_golden_file(const std::string& path) {
  std::ifstream file(path);
  const std::vector<Case> cases = read_cases(file);
  expect(cases.size() >= 4, "golden file is read: " + path);
  std::size_t different = 0;
  for (const Case& golden : cases) {
    const std::size_t count = golden.values.size();
    expect(count > 0 && count == elements(golden.shape), "as many values as the shape says");
    std::vector<float> found(count);
    mct::philox_normal(golden.seed, found.data(), count);
    for (std::size_t k = 0; k < count; ++k) {
      expect(is_within_one_ulp(found[k], golden.values[k]),
             "seed " + std::to_string(golden.seed) + ", value " + std::to_string(k));
      different += found[k] != golden.values[k] ? 1 : 0;
    }
  }
  std::cout << cases.size() << " golden cases, " << different << " values differ in the last bit\n";
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::cerr << "usage: noise_test PATH/TO/tests/golden/noise.txt\n";
    return 2;
  }
  philox_gives_the_published_words();
  a_shorter_sample_is_a_prefix_of_a_longer_one();
  noise_equals_the_golden_file(arguments[1]);
  return failures == 0 ? 0 : 1;
}
