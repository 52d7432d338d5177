#include "sigmas.hpp"

#include <algorithm>
#include <cmath>

#include "error.hpp"
#include "shifts.hpp"

namespace mct {

namespace {

constexpr const char* flow_sigmas_scheduler = "UniPCMultistepScheduler";

[[noreturn]] void fail(const std::string& text) { throw Error(MCT_SCHEDULE_ERROR, text); }

SigmaGrid make_grid(const Recipe& recipe) {
  check_recipe(recipe);
  const GridValues values = values_of(recipe);
  SigmaGrid grid;
  grid.steps = recipe.steps;
  grid.sigmas.assign(values.sigmas.begin(), values.sigmas.end());
  grid.sigmas.push_back(0.0);
  grid.timesteps.assign(values.timesteps.begin(), values.timesteps.end());
  grid.convention = recipe.convention;
  grid.num_train_timesteps = recipe.num_train_timesteps;
  grid.shift = recipe.mu ? std::nullopt : std::optional<double>(recipe.shift);
  grid.mu = recipe.mu;
  check_sigmas(grid.sigmas, grid.steps);
  return grid;
}

bool is_set(const JsonValue& config, const char* option) {
  const JsonValue* value = config.find(option);
  return value != nullptr && (value->boolean || value->number != 0 || !value->text.empty());
}

double number_of(const JsonValue& config, const char* option, double otherwise) {
  const JsonValue* value = config.find(option);
  return value == nullptr || value->kind == JsonValue::Kind::null ? otherwise
                                                                  : Json(*value).number();
}

// A line through two published points.
double dynamic_mu(const JsonValue& config, std::int64_t image_tokens) {
  const double low = number_of(config, "base_image_seq_len", 256);
  const double high = number_of(config, "max_image_seq_len", 4096);
  const double base = number_of(config, "base_shift", 0.5);
  const double top = number_of(config, "max_shift", 1.15);
  const double slope = (top - base) / (high - low);
  return static_cast<double>(image_tokens) * slope + (base - slope * low);
}

// A line in the tokens for 10 steps, one for 200, and between them by the steps; above 4300 tokens
// that for 200 alone.
double empirical_mu(std::int64_t image_tokens, std::int64_t steps) {
  const auto tokens = static_cast<double>(image_tokens);
  const double at_200 = 0.00016927 * tokens + 0.45666666;
  if (image_tokens > 4300) {
    return at_200;
  }
  const double at_10 = 8.73809524e-05 * tokens + 1.89833333;
  const double slope = (at_200 - at_10) / 190.0;
  return slope * static_cast<double>(steps) + (at_200 - 200.0 * slope);
}

bool is_unipc_scheduler(const JsonValue& config) {
  const JsonValue* name = config.find("_class_name");
  return name != nullptr && name->text == flow_sigmas_scheduler;
}

// Python's repr of a value of the configuration.
std::string shown(const JsonValue* value) {
  if (value == nullptr || value->kind == JsonValue::Kind::null) {
    return "None";
  }
  if (value->kind == JsonValue::Kind::boolean) {
    return value->boolean ? "True" : "False";
  }
  if (value->kind == JsonValue::Kind::text) {
    return repr_of(value->text);
  }
  const bool is_integer = value->kind == JsonValue::Kind::integer;
  return is_integer ? text_of(value->integer) : text_of(value->number);
}

// A UniPCMultistepScheduler whose grid ends at 0 and is made of the number of steps alone.
void check_flow_sigmas(const JsonValue& config, const std::string& convention) {
  std::vector<std::string> wrong;
  const auto expect = [&](const char* key, bool is_as_expected) {
    if (!is_as_expected) {
      wrong.push_back(std::string(key) + " " + shown(config.find(key)));
    }
  };
  const auto is_text = [&](const char* key, const char* text) {
    const JsonValue* value = config.find(key);
    return value != nullptr && value->text == text;
  };
  const JsonValue* flag = config.find("use_flow_sigmas");
  expect("use_flow_sigmas", flag != nullptr && (flag->boolean || flag->number == 1));
  expect("prediction_type", is_text("prediction_type", "flow_prediction"));
  expect("final_sigmas_type",
         config.find("final_sigmas_type") == nullptr || is_text("final_sigmas_type", "zero"));
  if (wrong.empty() && convention == "count") {
    return;
  }
  fail(std::string("expected a ") + flow_sigmas_scheduler +
       " of flow matching, as Wan's, in a pipeline that gives it the number of steps alone "
       "(use_flow_sigmas, prediction_type flow_prediction, final_sigmas_type zero), found " +
       (wrong.empty() ? "one that is given sigmas" : joined(wrong)) +
       "; give the pipeline a FlowMatchEulerDiscreteScheduler");
}

std::optional<std::int64_t> given(std::int64_t value) {
  return value == 0 ? std::nullopt : std::optional<std::int64_t>(value);
}

}  // namespace

SigmaGrid grid_from_config(const JsonValue& config, const GridRequest& request) {
  for (const char* option : {"invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas",
                             "use_beta_sigmas", "stochastic_sampling"}) {
    if (is_set(config, option)) {
      fail(std::string("the checkpoint's scheduler sets ") + option +
           "; grids are reproduced for plain and shifted flow matching only. Load the pipeline "
           "with that option off");
    }
  }
  Recipe recipe;
  recipe.steps = request.steps;
  recipe.convention = request.convention;
  const bool is_unipc = is_unipc_scheduler(config);
  if (is_unipc) {
    check_flow_sigmas(config, request.convention);
  }
  if (is_unipc || is_set(config, "has_unipc_grid")) {
    recipe.convention = "flow_sigmas";
  }
  recipe.shift = number_of(config, is_unipc ? "flow_shift" : "shift", 1.0);
  const bool is_dynamic = is_set(config, "use_dynamic_shifting");
  const bool is_empirical = is_dynamic && request.mu_rule == "empirical";
  if (is_dynamic) {
    recipe.mu = is_empirical ? empirical_mu(request.image_tokens, request.steps)
                             : dynamic_mu(config, request.image_tokens);
  }
  const JsonValue* form = config.find("time_shift_type");
  recipe.time_shift_type = form == nullptr ? "exponential" : Json(*form).text();
  recipe.shift_terminal = number_of(config, "shift_terminal", 0);
  recipe.num_train_timesteps =
      static_cast<std::int64_t>(number_of(config, "num_train_timesteps", 1000));
  SigmaGrid grid = make_grid(recipe);
  grid.height = given(request.height);
  grid.width = given(request.width);
  grid.frames = request.frames;
  if (is_empirical) {
    grid.image_tokens = request.image_tokens;
  }
  grid.second_stage = request.second_stage;
  return grid;
}

bool SecondStage::operator==(const SecondStage& other) const {
  return boundary_timestep == other.boundary_timestep && guidance_scale == other.guidance_scale;
}

std::string SecondStage::text() const {
  return "below timestep " + general(boundary_timestep) +
         (guidance_scale ? ", guidance scale " + general(*guidance_scale) : "");
}

std::optional<std::string> SigmaGrid::difference(const SigmaGrid& other) const {
  if (steps != other.steps) {
    return text_of(steps) + " steps against " + text_of(other.steps);
  }
  if (frames && other.frames && *frames != *other.frames) {
    return text_of(*frames) + " frames against " + text_of(*other.frames);
  }
  std::size_t step = 0;
  double gap = -1;
  for (std::size_t k = 0; k < sigmas.size(); ++k) {
    const double found = std::fabs(sigmas[k] - other.sigmas[k]);
    if (found > gap) {
      gap = found;
      step = k;
    }
  }
  if (gap > sigma_tolerance) {
    return "sigma " + fixed6(sigmas[step]) + " against " + fixed6(other.sigmas[step]) +
           " at step " + std::to_string(step) + " (" + describe() + " against " + other.describe() +
           ")";
  }
  if (num_train_timesteps != other.num_train_timesteps) {
    return "timesteps of sigma x " + text_of(num_train_timesteps) + " against " +
           text_of(other.num_train_timesteps);
  }
  if (second_stage && other.second_stage && !(*second_stage == *other.second_stage)) {
    return "second stage " + second_stage->text() + " against " + other.second_stage->text();
  }
  return std::nullopt;
}

std::string SigmaGrid::describe() const {
  const double factor = shift.value_or(0) == 0 ? 1 : *shift;
  const std::string moved = mu ? "mu " + general(*mu, 4) : "shift " + general(factor, 4);
  const bool has_size = width.value_or(0) != 0 && height.value_or(0) != 0;
  return text_of(steps) + " steps, " + moved +
         (has_size ? ", " + text_of(*width) + "x" + text_of(*height) : "");
}

void check_sigmas(const std::vector<double>& sigmas, std::int64_t steps) {
  if (steps < 1 || sigmas.size() != static_cast<std::size_t>(steps) + 1) {
    fail("a grid of " + text_of(steps) + " steps has " + text_of(steps + 1) +
         " sigmas (the last is where integration ends), found " + std::to_string(sigmas.size()) +
         "; use at least one step and give one sigma a step plus the last");
  }
  const auto [least, most] = std::minmax_element(sigmas.begin(), sigmas.end());
  // A float32 shift of sigma 1 may round to 1 + 1e-7, in diffusers too.
  if (!(*least >= 0) || !(*most <= 1 + sigma_tolerance)) {
    fail("sigmas are finite and between 0 (image) and 1 (noise), found " + text_of(*least) +
         " to " + text_of(*most) + "; give noise levels, not timesteps");
  }
  for (std::size_t k = 0; k + 1 < sigmas.size(); ++k) {
    const bool is_end = k + 2 == sigmas.size() && sigmas[k] == sigmas[k + 1];
    if (static_cast<float>(sigmas[k + 1]) >= static_cast<float>(sigmas[k]) && !is_end) {
      fail("sigmas must descend, found " + text_of(sigmas[k]) + " at step " + std::to_string(k) +
           " before " + text_of(sigmas[k + 1]) + "; only the last may repeat");
    }
  }
}

SecondStage read_second_stage(const Json& json) {
  JsonObject object(json);
  SecondStage stage;
  stage.boundary_timestep = object.required("boundary_timestep").number();
  stage.guidance_scale = maybe(object.nullable("guidance_scale"), to_number);
  object.close();
  if (!(stage.boundary_timestep >= 0) || std::isinf(stage.boundary_timestep)) {
    fail("the timestep of a second stage is 0 or more and finite, found " +
         general(stage.boundary_timestep) + "; Wan 2.2 has 875");
  }
  return stage;
}

SigmaGrid read_grid(const Json& json) {
  JsonObject object(json);
  SigmaGrid grid;
  grid.steps = object.required("steps").integer();
  grid.sigmas = list_of(object.required("sigmas"), to_number);
  grid.timesteps = list_of(object.required("timesteps"), to_number);
  const std::vector<std::string> conventions = {"linspace", "linspace_to_zero", "count",
                                                "flow_sigmas", "custom"};
  if (const auto convention = object.optional("convention")) {
    grid.convention = conventions[convention->choice(conventions)];
  } else {
    grid.convention = "linspace";
  }
  if (const auto count = object.optional("num_train_timesteps")) {
    grid.num_train_timesteps = count->integer();
  }
  grid.shift = maybe(object.nullable("shift"), to_number);
  grid.mu = maybe(object.nullable("mu"), to_number);
  if (const auto form = object.nullable("time_shift_type")) {
    const std::vector<std::string> forms = {"exponential", "linear"};
    grid.time_shift_type = forms[form->choice(forms)];
  }
  grid.shift_terminal = maybe(object.nullable("shift_terminal"), to_number);
  grid.height = maybe(object.nullable("height"), to_integer);
  grid.width = maybe(object.nullable("width"), to_integer);
  grid.frames = maybe(object.nullable("frames"), to_integer);
  grid.image_tokens = maybe(object.nullable("image_tokens"), to_integer);
  grid.second_stage = maybe(object.nullable("second_stage"), read_second_stage);
  object.close();
  check_sigmas(grid.sigmas, grid.steps);
  if (grid.timesteps.size() != static_cast<std::size_t>(grid.steps)) {
    fail("a grid of " + text_of(grid.steps) + " steps has " + text_of(grid.steps) +
         " timesteps, found " + std::to_string(grid.timesteps.size()) +
         "; write the file again with `meancache-trt bake`");
  }
  return grid;
}

}  // namespace mct
