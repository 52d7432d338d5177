// How diffusers' flow-matching schedulers make and shift sigmas, each step in their element type;
// the mirror of meancache/shifts.py.

#ifndef MEANCACHE_TRT_HOST_SHIFTS_HPP
#define MEANCACHE_TRT_HOST_SHIFTS_HPP

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace mct {

// How a grid is made, as meancache/sigmas.py make_grid takes it.
struct Recipe {
  std::int64_t steps;
  std::string convention;
  double shift = 1.0;
  std::optional<double> mu;
  std::string time_shift_type = "exponential";
  double shift_terminal = 0;  // 0: none
  std::int64_t num_train_timesteps = 1000;
};

// What a grid has of each of its steps.
struct GridValues {
  std::vector<float> sigmas;
  std::vector<float> timesteps;
};

// Throws a schedule error for shifts that no scheduler can follow.
void check_recipe(const Recipe& recipe);

GridValues values_of(const Recipe& recipe);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_SHIFTS_HPP
