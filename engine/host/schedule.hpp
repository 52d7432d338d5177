// The schedule file, the mirror of meancache/schedule.py: the same checks and messages.

#ifndef MEANCACHE_TRT_HOST_SCHEDULE_HPP
#define MEANCACHE_TRT_HOST_SCHEDULE_HPP

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "folding.hpp"
#include "sigmas.hpp"

namespace mct {

// What the networks of both stages are called; most models have the first alone.
inline const std::string transformer_names[] = {"transformer", "transformer_2"};

// A table of B rows over a grid of T steps; valid once read.
struct Schedule {
  std::string name;
  std::optional<std::string> family;
  std::optional<std::string> model_name;  // of the checkpoint that it was calibrated on
  std::optional<std::string> model_digest;
  SigmaGrid grid;
  std::optional<double> guidance_scale;
  std::optional<std::pair<double, double>> guidance_range;
  std::string precision = "float32";
  std::string method;
  std::vector<std::int64_t> nodes;
  Spans spans;  // of methods that use them
  std::int64_t history = 0;
  Rows weights;  // row n: of v_n, v_{n-1}, …
  bool is_calibrated = false;

  std::int64_t budget() const { return static_cast<std::int64_t>(nodes.size()); }
  bool is_analytic() const;
  // Timestep at each node in the scheduler's units.
  std::vector<float> timesteps() const;
  // Which of `transformer_names` each node evaluates, by its timestep.
  std::vector<std::string> transformers() const;
  // Row n as `length` values, with zeros behind; `length` is at least the history.
  std::vector<float> row(std::size_t n, std::size_t length) const;

  // Throws where this is a fitted table of another grid.
  void check_grid(const SigmaGrid& other) const;
  // Throws where it belongs to another guidance scale.
  void check_guidance(std::optional<double> scale) const;
  // This schedule for `other`, which check_grid has passed; an analytic one is folded again. The
  // second stage is that of `other`, where it names one.
  Schedule on_grid(const SigmaGrid& other) const;
};

// Read and validate. Throws a schedule error naming the file and the fault.
Schedule load_schedule(const std::filesystem::path& path);

// The same of a text, without the file's name.
Schedule parse_schedule(std::string_view text);

// Throws an input error for a scale that is not a number from 0 to 1000.
void check_guidance_scale(std::optional<double> scale);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_SCHEDULE_HPP
