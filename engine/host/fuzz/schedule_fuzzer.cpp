// Any bytes are a schedule that holds, or an error: never a crash.

#include <cstddef>
#include <cstdint>

#include "error.hpp"
#include "schedule.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const mct::Schedule schedule = mct::parse_schedule(text);
    const std::size_t history = static_cast<std::size_t>(schedule.history);
    for (std::size_t n = 0; n < schedule.nodes.size(); ++n) {
      schedule.row(n, history);
    }
    schedule.timesteps();
    schedule.check_grid(schedule.grid);
    schedule.on_grid(schedule.grid);
  } catch (const mct::Error&) {
  }
  return 0;
}
