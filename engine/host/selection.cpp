#include "selection.hpp"

#include <algorithm>
#include <cctype>

#include "error.hpp"

namespace mct {

namespace {

[[noreturn]] void fail_bundle(const std::string& text) { throw Error(MCT_BUNDLE_ERROR, text); }
[[noreturn]] void fail_schedule(const std::string& text) { throw Error(MCT_SCHEDULE_ERROR, text); }

using Schedules = std::vector<const Schedule*>;

// The schedules of a bundle at one resolution.
class Selection {
 public:
  Selection(const Bundle& bundle, const Resolution& resolution)
      : bundle_(bundle), resolution_(resolution) {}

  // The grid that the checkpoint's own pipeline would use with so many steps.
  SigmaGrid grid(std::int64_t steps) const {
    const Exported& exported = bundle_.exported();
    GridRequest request;
    request.steps = steps;
    request.convention = exported.grid;
    request.mu_rule = exported.mu;
    const auto tokens = resolution_.symbols.find("image_tokens");
    if (tokens == resolution_.symbols.end()) {
      fail_bundle("the manifest gives no size for 'image_tokens'; build the bundle again");
    }
    request.image_tokens = tokens->second;
    request.height = resolution_.height;
    request.width = resolution_.width;
    request.frames = resolution_.frames;
    request.second_stage = exported.second_stage;
    return grid_from_config(exported.scheduler, request);
  }

  Schedule find(const std::optional<std::string>& wanted) const {
    if (!wanted) {
      return largest();
    }
    const auto is_digit = [](unsigned char letter) { return std::isdigit(letter) != 0; };
    if (!wanted->empty() && std::all_of(wanted->begin(), wanted->end(), is_digit)) {
      return of_budget(*wanted);
    }
    const std::filesystem::path path(*wanted);
    return path.extension() == ".json" ? load_schedule(path) : bundle_.schedule(*wanted);
  }

  void check_grid(const Schedule& schedule, const SigmaGrid& grid) const {
    try {
      schedule.check_grid(grid);
    } catch (const Error& error) {
      const std::string size = size_text(resolution_.height, resolution_.width, resolution_.frames);
      fail_schedule(std::string(error.what()) + ". To make one for " + size +
                    ": `meancache-trt calibrate MODEL -o DIRECTORY --resolution " + size +
                    "`, then `meancache-trt bake --calibration DIRECTORY --budget " +
                    text_of(schedule.budget()) + " --bundle " + bundle_.directory().string() + "`");
    }
  }

 private:
  Schedules all() const {
    Schedules found;
    for (const NamedSchedule& entry : bundle_.schedules()) {
      found.push_back(&entry.schedule);
    }
    return found;
  }

  Schedule largest() const {
    const Schedules schedules = all();
    if (schedules.empty()) {
      fail_bundle(bundle_.directory().string() +
                  " has no schedule yet; `meancache-trt bake` makes one");
    }
    return *fitting(schedules).front();
  }

  Schedule of_budget(const std::string& wanted) const {
    Schedules found;
    std::vector<std::string> budgets;
    for (const Schedule* schedule : all()) {
      budgets.push_back(text_of(schedule->budget()));
      if (budgets.back() == wanted) {
        found.push_back(schedule);
      }
    }
    if (found.empty()) {
      fail_bundle(bundle_.directory().string() + " has no schedule of " + wanted +
                  " evaluations; it has [" + joined(budgets) +
                  "]. Add one with `meancache-trt bake`");
    }
    const Schedules fit = fitting(found);
    if (fit.size() > 1) {
      std::vector<std::string> names;
      for (const Schedule* schedule : fit) {
        names.push_back(schedule->name);
      }
      fail_bundle(bundle_.directory().string() + " has several schedules of " + wanted +
                  " evaluations: " + joined(names) + "; ask for one by name");
    }
    return *fit.front();
  }

  bool is_of_this_size(const SigmaGrid& grid) const {
    return grid.height == resolution_.height && grid.width == resolution_.width &&
           grid.frames == resolution_.frames;
  }

  // The calibrated ones of this grid, if any of this very size those alone; all where none is
  // calibrated.
  Schedules fitting(const Schedules& schedules) const {
    Schedules calibrated;
    std::copy_if(schedules.begin(), schedules.end(), std::back_inserter(calibrated),
                 [](const Schedule* schedule) { return schedule->is_calibrated; });
    if (calibrated.empty()) {
      return schedules;
    }
    Schedules fit;
    Schedules exact;
    for (const Schedule* schedule : calibrated) {
      if (!schedule->grid.difference(grid(schedule->grid.steps))) {
        fit.push_back(schedule);
        if (is_of_this_size(schedule->grid)) {
          exact.push_back(schedule);
        }
      }
    }
    if (fit.empty()) {
      check_grid(*calibrated.front(), grid(calibrated.front()->grid.steps));
    }
    return exact.empty() ? fit : exact;
  }

  const Bundle& bundle_;
  const Resolution& resolution_;
};

// What schedules may be calibrated in, and networks run in, whichever it is of either; measured in
// docs/proof/precision-transfer.json (meancache/schedule.py).
bool is_interchangeable(const std::string& precision) {
  return precision == "float32" || precision == "bfloat16" || precision == "float16";
}

// Throws where a schedule is of another family, checkpoint or precision, or of more stages.
void check_origin(const Schedule& schedule, const Exported& exported,
                  const std::string& precision) {
  if (schedule.family && *schedule.family != exported.family) {
    fail_schedule("schedule " + repr_of(schedule.name) + " is for the family " +
                  repr_of(*schedule.family) + ", this bundle is " + repr_of(exported.family) +
                  "; bake one for it");
  }
  if (schedule.model_digest && *schedule.model_digest != exported.model_digest) {
    fail_schedule("schedule " + repr_of(schedule.name) + " was calibrated on " +
                  repr_of(*schedule.model_name) + " (digest " +
                  schedule.model_digest->substr(0, 12) + "), this bundle is " +
                  repr_of(exported.model_name) + " (digest " + exported.model_digest.substr(0, 12) +
                  "); calibrate on this checkpoint");
  }
  if (schedule.grid.second_stage && !exported.second_stage) {
    fail_schedule("schedule " + repr_of(schedule.name) + " has a second transformer " +
                  schedule.grid.second_stage->text() +
                  ", this bundle has one transformer; bake one for it");
  }
  const bool is_known = is_interchangeable(schedule.precision) && is_interchangeable(precision);
  if (schedule.is_calibrated && schedule.precision != precision && !is_known) {
    fail_schedule("schedule " + repr_of(schedule.name) + " was calibrated in " +
                  schedule.precision + ", this network is " + precision + "; calibrate in " +
                  precision);
  }
}

}  // namespace

const Resolution& find_resolution(const Bundle& bundle, std::int64_t height, std::int64_t width,
                                  std::int64_t frames) {
  const std::vector<Resolution>& resolutions = bundle.exported().resolutions;
  const auto fits = [](std::int64_t wanted, std::int64_t own) {
    return wanted == 0 || wanted == own;
  };
  std::vector<std::string> known;
  for (const Resolution& found : resolutions) {
    if (fits(height, found.height) && fits(width, found.width) &&
        fits(frames, found.frames.value_or(0))) {
      return found;
    }
    known.push_back(size_text(found.height, found.width, found.frames));
  }
  const Resolution& first = resolutions.front();
  if (!first.frames && frames != 0) {
    throw Error(MCT_INPUT_ERROR, "this bundle makes pictures, found " + text_of(frames) +
                                     " frames; leave frames out");
  }
  const std::string asked =
      size_text(height != 0 ? height : first.height, width != 0 ? width : first.width,
                frames != 0 ? frames : first.frames.value_or(0));
  fail_bundle("this bundle renders " + joined(known) + ", found " + asked +
              "; add it with `meancache-trt export MODEL -o " + bundle.directory().string() +
              " --resolution " + asked + "`");
}

ChosenSchedule choose_schedule(const Bundle& bundle, const Resolution& resolution,
                               const ScheduleRequest& request) {
  const Exported& exported = bundle.exported();
  const Selection selection(bundle, resolution);
  const Schedule found = selection.find(request.schedule);
  check_origin(found, exported, request.precision);
  const SigmaGrid grid = selection.grid(found.grid.steps);
  selection.check_grid(found, grid);
  const auto asked = request.guidance_scale ? request.guidance_scale : found.guidance_scale;
  check_guidance(exported.guidance, asked);
  const auto scale = asked ? asked : exported.guidance.default_scale;
  found.check_guidance(scale);
  return {found.on_grid(grid), scale};
}

}  // namespace mct
