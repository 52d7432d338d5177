// Initial noise, the same values as meancache/noise.py in Python.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) and
// Box-Muller in double, rounded once to float. tests/golden/noise.txt is read by both sides.
// C++17, no dependency, no state: every function may be called from any thread.

#ifndef MEANCACHE_TRT_HOST_NOISE_HPP
#define MEANCACHE_TRT_HOST_NOISE_HPP

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace mct {

using PhiloxCounter = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;

// Four random words of one counter under one key.
inline PhiloxCounter philox4x32(PhiloxCounter counter, PhiloxKey key) noexcept {
  constexpr int rounds = 10;  // what the authors recommend
  constexpr std::uint64_t multiplier_even = 0xD2511F53u;
  constexpr std::uint64_t multiplier_odd = 0xCD9E8D57u;
  constexpr std::uint32_t weyl_low = 0x9E3779B9u;   // golden ratio
  constexpr std::uint32_t weyl_high = 0xBB67AE85u;  // sqrt(3) - 1
  for (int round = 0; round < rounds; ++round) {
    const std::uint64_t even = multiplier_even * counter[0];
    const std::uint64_t odd = multiplier_odd * counter[2];
    counter = {static_cast<std::uint32_t>(odd >> 32) ^ counter[1] ^ key[0],
               static_cast<std::uint32_t>(odd),
               static_cast<std::uint32_t>(even >> 32) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(even)};
    key[0] += weyl_low;
    key[1] += weyl_high;
  }
  return counter;
}

// Two standard normal values from two random words.
inline std::array<double, 2> box_muller(std::uint32_t first, std::uint32_t second) noexcept {
  constexpr double words = 4294967296.0;  // 2^32
  constexpr double pi = 3.141592653589793;
  const double radius = std::sqrt(-2.0 * std::log((first + 0.5) / words));
  const double angle = 2.0 * pi * ((second + 0.5) / words);
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

// Fill `values` with standard normal noise for one sample.
//
// seed:   the key, low word first; any value.
// values: `count` floats of the unpacked latent (C, H, W) or (C, F, H, W), row-major. May be null
//         where count is 0.
//
// Block b of the generator gives values 4b to 4b + 3 and starts at 0 in every sample, so a sample
// depends neither on its batch nor on how the latent is packed. Equal to Python's values, but for
// at most one unit in the last place where the mathematics libraries differ.
inline void philox_normal(std::uint64_t seed, float* values, std::size_t count) noexcept {
  const PhiloxKey key = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (std::size_t start = 0; start < count; start += 4) {
    const std::uint64_t block = start / 4;
    const PhiloxCounter words = philox4x32(
        {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), 0, 0}, key);
    for (std::size_t pair = 0; pair < 4; pair += 2) {
      const std::array<double, 2> normal = box_muller(words[pair], words[pair + 1]);
      for (std::size_t k = 0; k < 2 && start + pair + k < count; ++k) {
        values[start + pair + k] = static_cast<float>(normal[k]);
      }
    }
  }
}

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_NOISE_HPP
