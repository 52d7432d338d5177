// Any bytes are a manifest that holds, or an error: never a crash. Its digest is set right first,
// since no mutation would pass it.

#include <cstddef>
#include <cstdint>

#include "error.hpp"
#include "files.hpp"
#include "manifest.hpp"
#include "sigmas.hpp"
#include "tiling.hpp"

namespace {

std::string sealed(std::string text) {
  const std::string key = "\n \"digest\": \"";
  const std::size_t begin = text.rfind(key);
  if (begin == std::string::npos) {
    return text;
  }
  text.resize(begin);
  return text + key + mct::digest_of(text + key + "\"\n}\n") + "\"\n}\n";
}

// What a session makes of the records, short of memory and graphs.
void use(const mct::Exported& exported) {
  for (const mct::Resolution& resolution : exported.resolutions) {
    mct::Sizes sizes = resolution.symbols;
    sizes["batch"] = 1;
    sizes["two_batch"] = 2;
    for (const auto& entry : exported.components) {
      for (const auto& input : entry.second.inputs) {
        input.second.resolved(sizes);
      }
    }
    const auto levels = mct::levels(exported.tiling, !exported.tiling.space.empty());
    if (mct::is_divided(resolution.decode_shape, levels)) {
      mct::pieces(levels.front().front(), 1000);
    }
    mct::grid_from_config(exported.scheduler,
                          {50, exported.grid, 64, 64, 64, {}, exported.mu, exported.second_stage});
  }
  exported.text_graphs();
  exported.update_for(4);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text = sealed(std::string(reinterpret_cast<const char*>(data), size));
  try {
    use(mct::parse_manifest(text, "manifest.json").exported);
  } catch (const mct::Error&) {
  }
  return 0;
}
