#include "schedule.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "error.hpp"
#include "evidence.hpp"
#include "files.hpp"

namespace mct {

namespace {

const char* const version = "meancache-trt/schedule/1";
const char* const fitted = "fitted";

[[noreturn]] void fail(const std::string& text) { throw Error(MCT_SCHEDULE_ERROR, text); }

std::string count_of(std::size_t count) { return std::to_string(count); }

// The loop multiplies by float32 weights; a larger one would become infinite there.
bool is_float32(double weight) { return std::fabs(weight) <= std::numeric_limits<float>::max(); }

void check_weights(const Schedule& schedule) {
  const auto& weights = schedule.weights;
  const std::size_t budget = schedule.nodes.size();
  if (weights.size() != budget) {
    fail(count_of(budget) + " nodes need " + count_of(budget) + " rows of weights, found " +
         count_of(weights.size()));
  }
  std::size_t longest = 0;
  for (std::size_t n = 0; n < weights.size(); ++n) {
    const std::vector<double>& row = weights[n];
    if (row.empty() || row.size() > n + 1) {
      fail("row " + count_of(n) + " holds 1 to " + count_of(n + 1) +
           " weights (the velocities so far), found " + count_of(row.size()));
    }
    if (!std::all_of(row.begin(), row.end(), is_float32)) {
      fail("row " + count_of(n) +
           " has a weight that is not a finite float32; bake the schedule again");
    }
    longest = std::max(longest, row.size());
  }
  if (schedule.history != static_cast<std::int64_t>(longest)) {
    fail("history is the longest row, " + count_of(longest) + ", found " +
         text_of(schedule.history));
  }
}

void check_fold(const Schedule& schedule) {
  const Rows rows = fold(schedule.method, schedule.grid.sigmas, schedule.nodes, schedule.spans);
  if (!is_close(rows, schedule.weights)) {
    fail("the weights are not those of method " + repr_of(schedule.method) +
         " on this grid with these nodes and spans; the file was altered, bake it again");
  }
}

void check(const Schedule& schedule) {
  check_nodes(schedule.nodes, schedule.grid.steps);
  check_guidance_scale(schedule.guidance_scale);
  if (const auto& range = schedule.guidance_range) {
    check_guidance_scale(range->first);
    check_guidance_scale(range->second);
  }
  if (schedule.grid.second_stage) {
    check_guidance_scale(schedule.grid.second_stage->guidance_scale);
  }
  if (const auto& range = schedule.guidance_range; range && !(range->first < range->second)) {
    fail("a range of guidance scales has the lower one first, found (" + text_of(range->first) +
         ", " + text_of(range->second) + ")");
  }
  check_weights(schedule);
  if (schedule.is_analytic()) {
    check_fold(schedule);
  } else if (schedule.method != fitted) {
    fail("unknown method " + repr_of(schedule.method) + "; expected 'fitted' or one of " +
         joined(method_names()));
  }
}

// A foreign version is named before the fields that it adds.
void check_version(const JsonValue& root) {
  if (root.kind != JsonValue::Kind::object) {
    return;  // the decoder says so
  }
  const JsonValue* found = root.find("schema");
  const bool is_text = found != nullptr && found->kind == JsonValue::Kind::text;
  if (!is_text || found->text != version) {
    const std::string what = is_text ? repr_of(found->text)
                             : found == nullptr || found->kind == JsonValue::Kind::null
                                 ? "None"
                                 : "something else";
    fail(std::string("expected a schedule file with schema '") + version + "', found " + what +
         "; bake it again with this version of meancache-trt");
  }
}

Schedule decode(const Json& json) {
  JsonObject object(json);
  Schedule schedule;
  object.required("schema");
  schedule.name = object.required("name").text();
  schedule.family = maybe(object.nullable("family"), to_text);
  if (const auto model = object.nullable("model")) {
    JsonObject reference(*model);
    schedule.model_name = reference.required("name").text();
    schedule.model_digest = maybe(reference.nullable("digest"), to_text);
    reference.close();
  }
  schedule.grid = read_grid(object.required("grid"));
  schedule.guidance_scale = maybe(object.nullable("guidance_scale"), to_number);
  if (const auto range = object.nullable("guidance_range")) {
    const std::vector<Json> ends = range->array(2);
    schedule.guidance_range = {ends[0].number(), ends[1].number()};
  }
  if (const auto precision = object.optional("precision")) {
    schedule.precision = precision->text();
  }
  schedule.method = object.required("method").text();
  schedule.nodes = list_of(object.required("nodes"), to_integer);
  const auto integers = [](const Json& values) { return list_of(values, to_integer); };
  schedule.spans = maybe(object.nullable("spans"), integers);
  schedule.history = object.required("history").integer();
  schedule.weights =
      list_of(object.required("weights"), [](const Json& row) { return list_of(row, to_number); });
  if (const auto evidence = object.nullable("calibration")) {
    check_evidence(*evidence);
    schedule.is_calibrated = true;
  }
  object.close();
  check(schedule);
  return schedule;
}

}  // namespace

bool Schedule::is_analytic() const {
  const std::vector<std::string>& names = method_names();
  return std::find(names.begin(), names.end(), method) != names.end();
}

std::vector<float> Schedule::timesteps() const {
  std::vector<float> values;
  for (const std::int64_t node : nodes) {
    values.push_back(static_cast<float>(grid.timesteps[static_cast<std::size_t>(node)]));
  }
  return values;
}

std::vector<std::string> Schedule::transformers() const {
  std::vector<std::string> names;
  for (const float timestep : timesteps()) {
    // In float32, where diffusers compares them.
    const bool is_second =
        grid.second_stage && timestep < static_cast<float>(grid.second_stage->boundary_timestep);
    names.push_back(transformer_names[is_second ? 1 : 0]);
  }
  return names;
}

std::vector<float> Schedule::row(std::size_t n, std::size_t length) const {
  std::vector<float> values(length, 0.0f);
  std::transform(weights[n].begin(), weights[n].end(), values.begin(),
                 [](double weight) { return static_cast<float>(weight); });
  return values;
}

void Schedule::check_guidance(std::optional<double> scale) const {
  const std::string found = scale ? text_of(*scale) : "None";
  if (guidance_range) {
    const auto [low, high] = *guidance_range;
    if (!scale || *scale < low || *scale > high) {
      fail("schedule " + repr_of(name) + " was calibrated for guidance scales " + general(low) +
           " to " + general(high) + ", found " + found +
           "; render with one of them or calibrate for " + found);
    }
  } else if (guidance_scale && guidance_scale != scale) {
    const std::string own = text_of(*guidance_scale);
    fail("schedule " + repr_of(name) + " was calibrated for guidance scale " + own + ", found " +
         found + "; render with " + own + " or calibrate for " + found);
  }
}

void Schedule::check_grid(const SigmaGrid& other) const {
  const auto difference = grid.difference(other);
  if (difference && (is_calibrated || !is_analytic())) {
    fail("schedule " + repr_of(name) + " was calibrated on another grid: " + *difference +
         "; calibrate for this grid, or render at the size and number of steps it was made for");
  }
}

Schedule Schedule::on_grid(const SigmaGrid& other) const {
  const auto difference = grid.difference(other);
  Schedule folded = *this;
  if (!difference) {
    if (other.second_stage) {
      folded.grid.second_stage = other.second_stage;
    }
    return folded;
  }
  folded.grid = other;
  if (!other.second_stage) {
    folded.grid.second_stage = grid.second_stage;
  }
  folded.weights = fold(method, other.sigmas, nodes, spans);
  folded.history = 0;
  for (const std::vector<double>& row : folded.weights) {
    folded.history = std::max(folded.history, static_cast<std::int64_t>(row.size()));
  }
  return folded;
}

Schedule parse_schedule(std::string_view text) {
  try {
    const JsonValue root = parse_json(text);
    check_version(root);
    return decode(Json(root));
  } catch (const JsonTypeError& fault) {
    fail(std::string("not a valid schedule file: ") + fault.what());
  } catch (const JsonSyntaxError& fault) {
    fail(std::string("not JSON, perhaps truncated: ") + fault.what());
  }
}

Schedule load_schedule(const std::filesystem::path& path) {
  const std::string text = read_file(path);
  try {
    return parse_schedule(text);
  } catch (const Error& error) {
    if (error.status() != MCT_SCHEDULE_ERROR) {
      throw;
    }
    fail(path.string() + ": " + error.what());
  }
}

void check_guidance_scale(std::optional<double> scale) {
  if (scale && !(*scale >= 0 && *scale <= 1000)) {
    throw Error(MCT_INPUT_ERROR, "a guidance scale is 0 to 1000, found " + text_of(*scale) +
                                     "; 1 means no guidance");
  }
}

}  // namespace mct
