#include "shifts.hpp"

#include <algorithm>
#include <cmath>

#include "error.hpp"

namespace mct {

namespace {

constexpr double largest_mu = 80.0;  // exp(mu) stays a float32 below this
constexpr double below_one = 1e-6;   // UniPCMultistepScheduler, because λ has to be finite

[[noreturn]] void fail(const std::string& text) { throw Error(MCT_SCHEDULE_ERROR, text); }

// NumPy's linspace: i·step + start, with the end set exactly.
std::vector<double> linspace(double start, double stop, std::int64_t count) {
  std::vector<double> values(static_cast<std::size_t>(count), start);
  if (count == 1) {
    return values;
  }
  const double step = (stop - start) / static_cast<double>(count - 1);
  for (std::size_t k = 0; k < values.size(); ++k) {
    values[k] = static_cast<double>(k) * step + start;
  }
  values.back() = stop;
  return values;
}

std::vector<double> pipeline_sigmas(const std::string& convention, std::int64_t steps) {
  if (convention == "linspace_to_zero") {
    std::vector<double> values = linspace(1.0, 0.0, steps + 1);
    values.pop_back();
    return values;
  }
  return linspace(1.0, 1 / static_cast<double>(steps), steps);
}

float training_end(double shift, float step, std::int64_t count) {
  const float end = step / static_cast<float>(count);
  return static_cast<float>(shift) * end / (1 + static_cast<float>(shift - 1) * end);
}

// Evenly spaced over the training grid, which diffusers shifts at construction too.
std::vector<double> counted(const Recipe& recipe) {
  const double shift = recipe.mu ? 1.0 : recipe.shift;
  const auto count = recipe.num_train_timesteps;
  const double scale = static_cast<double>(count);
  const double low = training_end(shift, 1.0f, count);
  const double high = training_end(shift, static_cast<float>(count), count);
  std::vector<double> values = linspace(high * scale, low * scale, recipe.steps);
  for (double& value : values) {
    value /= scale;
  }
  return values;
}

// Over the whole training range, to above its end.
std::vector<double> flow_sigmas(const Recipe& recipe) {
  const double low = 1 / static_cast<double>(recipe.num_train_timesteps);
  std::vector<double> values = linspace(1.0, low, recipe.steps + 1);
  values.pop_back();
  return values;
}

// Shift and stretch in `Float`: pipelines that hand over sigmas are shifted in float32, those that
// hand over a count in float64.
template <class Float>
std::vector<Float> shifted(const std::vector<double>& raw, const Recipe& recipe) {
  std::vector<Float> values(raw.size());
  std::transform(raw.begin(), raw.end(), values.begin(),
                 [](double value) { return static_cast<Float>(value); });
  const bool is_linear = recipe.time_shift_type == "linear";
  const auto shift = static_cast<Float>(recipe.shift);
  const auto more = static_cast<Float>(recipe.shift - 1);
  const auto scale =
      static_cast<Float>(recipe.mu ? (is_linear ? *recipe.mu : std::exp(*recipe.mu)) : 1.0);
  for (Float& value : values) {
    value = recipe.mu ? scale / (scale + (1 / value - 1)) : value * shift / (1 + more * value);
  }
  if (recipe.shift_terminal != 0) {
    const Float remaining = 1 - values.back();
    if (remaining <= 0) {
      fail("shift_terminal moves the last step to sigma " + text_of(recipe.shift_terminal) +
           ", found a grid whose last step is at sigma 1; use two steps or more");
    }
    const Float stretch = remaining / static_cast<Float>(1 - recipe.shift_terminal);
    for (Float& value : values) {
      value = 1 - (1 - value) / stretch;
    }
  }
  return values;
}

template <class Float>
GridValues scaled(const std::vector<Float>& sigmas, const Recipe& recipe) {
  GridValues values;
  for (const Float sigma : sigmas) {
    values.sigmas.push_back(static_cast<float>(sigma));
    values.timesteps.push_back(values.sigmas.back() *
                               static_cast<float>(recipe.num_train_timesteps));
  }
  return values;
}

// As UniPCMultistepScheduler has them: timesteps are cut to whole numbers.
GridValues whole(std::vector<double> sigmas, const Recipe& recipe) {
  if (std::fabs(sigmas.front() - 1) < below_one) {
    sigmas.front() -= below_one;
  }
  GridValues values;
  for (const double sigma : sigmas) {
    const double timestep = std::trunc(sigma * static_cast<double>(recipe.num_train_timesteps));
    values.sigmas.push_back(static_cast<float>(sigma));
    values.timesteps.push_back(static_cast<float>(timestep));
  }
  return values;
}

}  // namespace

GridValues values_of(const Recipe& recipe) {
  if (recipe.convention == "flow_sigmas") {
    return whole(shifted<double>(flow_sigmas(recipe), recipe), recipe);
  }
  if (recipe.convention == "count") {
    return scaled(shifted<double>(counted(recipe), recipe), recipe);
  }
  return scaled(shifted<float>(pipeline_sigmas(recipe.convention, recipe.steps), recipe), recipe);
}

void check_recipe(const Recipe& recipe) {
  if (recipe.steps < 1) {
    fail("a grid has at least one step, found " + text_of(recipe.steps) +
         "; give --steps 1 or more");
  }
  const double positive = !recipe.mu                           ? recipe.shift
                          : recipe.time_shift_type == "linear" ? *recipe.mu
                                                               : 1.0;
  if (!(positive > 0) || std::isinf(positive)) {
    fail("a shift is positive and finite, found " + text_of(positive) + "; 1 leaves the grid");
  }
  if (recipe.mu && !(std::fabs(*recipe.mu) <= largest_mu)) {
    fail("mu is at most 80.0 either way, found " + text_of(*recipe.mu) + "; FLUX uses 0.5 to 1.15");
  }
  const double terminal = recipe.shift_terminal;
  if (terminal != 0 && !(terminal > 0 && terminal < 1)) {
    fail("shift_terminal is a sigma between 0 and 1, found " + text_of(terminal) +
         "; Qwen-Image has .02");
  }
}

}  // namespace mct
