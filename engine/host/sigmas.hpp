// Sigma grids, the mirror of meancache/sigmas.py: the same operations in the same element types, so
// that a grid has the same bits in both hosts (tests/golden/grids.json is read by both).

#ifndef MEANCACHE_TRT_HOST_SIGMAS_HPP
#define MEANCACHE_TRT_HOST_SIGMAS_HPP

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "json.hpp"

namespace mct {

// Grids closer than this at every step are the same grid.
constexpr double sigma_tolerance = 1e-6;

// Where a model of two transformers hands over to the second, and how that one is guided.
struct SecondStage {
  double boundary_timestep = 0;          // in the scheduler's units; below it, it is transformer_2
  std::optional<double> guidance_scale;  // its own; none where the first one's acts in both

  bool operator==(const SecondStage& other) const;
  // Such as "below timestep 875, guidance scale 3".
  std::string text() const;
};

struct SigmaGrid {
  std::int64_t steps = 0;
  std::vector<double> sigmas;     // T + 1, descending; the last may repeat
  std::vector<double> timesteps;  // T, in the scheduler's units
  std::string convention;
  std::int64_t num_train_timesteps = 1000;
  std::optional<double> shift;
  std::optional<double> mu;
  std::optional<std::string> time_shift_type;
  std::optional<double> shift_terminal;
  std::optional<std::int64_t> height;
  std::optional<std::int64_t> width;
  std::optional<std::int64_t> frames;
  std::optional<std::int64_t> image_tokens;  // where mu is the empirical one of them
  std::optional<SecondStage> second_stage;

  // In words how `other` differs, or nothing where both are the same grid.
  std::optional<std::string> difference(const SigmaGrid& other) const;
  // Such as "50 steps, shift 3".
  std::string describe() const;
};

// Throws JsonTypeError or a schedule error.
SigmaGrid read_grid(const Json& json);
SecondStage read_second_stage(const Json& json);

// Throws a schedule error unless `sigmas` are steps + 1 finite, descending values in [0, 1].
void check_sigmas(const std::vector<double>& sigmas, std::int64_t steps);

// What a pipeline's grid depends on besides its scheduler's configuration.
struct GridRequest {
  std::int64_t steps = 0;
  std::string convention;  // "linspace", "linspace_to_zero" or "count"
  std::int64_t image_tokens = 0;
  std::int64_t height = 0;
  std::int64_t width = 0;
  std::optional<std::int64_t> frames;
  std::string mu_rule = "line";  // or "empirical"
  std::optional<SecondStage> second_stage;
};

// The grid of a pipeline with this scheduler_config.json. Throws a schedule error for options that
// are not reproduced.
SigmaGrid grid_from_config(const JsonValue& config, const GridRequest& request);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_SIGMAS_HPP
