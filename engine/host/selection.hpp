// Which resolution and schedule of a bundle a session uses, the mirror of
// src/meancache_trt/selection.py and of Pipeline.schedule in render.py.

#ifndef MEANCACHE_TRT_HOST_SELECTION_HPP
#define MEANCACHE_TRT_HOST_SELECTION_HPP

#include <cstdint>
#include <optional>
#include <string>

#include "bundle.hpp"

namespace mct {

// The first resolution that has the values given; 0 is not given. Throws a bundle error that lists
// what there is, and an input error for frames of a picture.
const Resolution& find_resolution(const Bundle& bundle, std::int64_t height, std::int64_t width,
                                  std::int64_t frames);

// What is asked for: a name in the bundle, a budget, a file, or nothing for the largest.
struct ScheduleRequest {
  std::optional<std::string> schedule;
  std::optional<double> guidance_scale;
  std::string precision;  // of the network that will run
};

// A schedule that fits, on the grid that will be rendered, and the scale to render with.
struct ChosenSchedule {
  Schedule schedule;
  std::optional<double> guidance_scale;
};

// Throws what the Python host raises.
ChosenSchedule choose_schedule(const Bundle& bundle, const Resolution& resolution,
                               const ScheduleRequest& request);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_SELECTION_HPP
