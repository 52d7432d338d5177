// Grids, folds and tiles against files that the Python host wrote and is tested with.
//
// usage: golden_test PATH/TO/tests/golden

#include <cmath>

#include "check.hpp"
#include "folding.hpp"
#include "json.hpp"
#include "sigmas.hpp"
#include "tiling.hpp"

namespace {

using mct::Json;
using mct::JsonObject;
using mct::JsonValue;

JsonValue golden(const std::string& folder, const std::string& name) {
  return mct::parse_json(contents(folder + "/" + name));
}

void grids_have_the_bits_of_the_golden_file(const JsonValue& root) {
  for (const Json& entry : Json(root).array()) {
    JsonObject object(entry);
    const std::string name = object.required("name").text();
    mct::GridRequest request;
    request.steps = object.required("steps").integer();
    request.convention = object.required("convention").text();
    request.mu_rule = object.required("mu").text();
    request.image_tokens = object.required("image_tokens").integer();
    const mct::SigmaGrid grid = mct::grid_from_config(object.required("config").value(), request);
    expect(grid.sigmas == list_of(object.required("sigmas"), mct::to_number), name + ": sigmas");
    expect(grid.timesteps == list_of(object.required("timesteps"), mct::to_number),
           name + ": timesteps");
  }
}

// 1e-12: sums of at most 50 doubles below 1, whose order NumPy may choose otherwise.
void folds_equal_the_golden_file(const JsonValue& root) {
  const auto numbers = [](const Json& row) { return list_of(row, mct::to_number); };
  const auto integers = [](const Json& row) { return list_of(row, mct::to_integer); };
  for (const Json& entry : Json(root).array()) {
    JsonObject object(entry);
    const std::string method = object.required("method").text();
    const auto sigmas = list_of(object.required("sigmas"), mct::to_number);
    const auto nodes = list_of(object.required("nodes"), mct::to_integer);
    const mct::Spans spans = maybe(object.nullable("spans"), integers);
    const mct::Rows expected = list_of(object.required("weights"), numbers);
    const mct::Rows found = mct::fold(method, sigmas, nodes, spans);
    expect(found.size() == expected.size(), method + ": rows");
    for (std::size_t n = 0; n < std::min(found.size(), expected.size()); ++n) {
      expect(found[n].size() == expected[n].size(),
             method + ": length of row " + std::to_string(n));
      for (std::size_t k = 0; k < std::min(found[n].size(), expected[n].size()); ++k) {
        expect(std::fabs(found[n][k] - expected[n][k]) <= 1e-12,
               method + ": weight " + std::to_string(n) + ", " + std::to_string(k));
      }
    }
  }
}

void malformed_folds_are_refused() {
  const std::vector<double> sigmas = {1.0, 0.75, 0.5, 0.25, 0.0};
  const auto folded = [&](const std::string& method, const mct::Nodes& nodes, mct::Spans spans) {
    return [=] { mct::fold(method, sigmas, nodes, spans); };
  };
  expect_error(folded("euler", {}, {}), "the list is empty");
  expect_error(folded("euler", {1}, {}), "the list begins with 1");
  expect_error(folded("euler", {0, 2, 2}, {}), "found 2 after 2");
  expect_error(folded("euler", {0, 4}, {}), "0 to 3, found 4");
  expect_error(folded("euler", {0, 2}, {{1}}), "takes no spans");
  expect_error(folded("official", {0, 2}, {}), "needs 1 spans");
  expect_error(folded("official", {0, 2}, {{1, 1}}), "found 2; give one span");
  expect_error(folded("official", {0, 2}, {{2}}), "is 1 to 1");
  expect_error(folded("magic", {0}, {}), "unknown method 'magic'");
}

mct::TiledAxis axis_of(const Json& json) {
  JsonObject object(json);
  const auto get = [&](const char* name) { return object.required(name).integer(); };
  mct::TiledAxis axis;
  axis.latent_axis = get("latent_axis");
  axis.image_axis = get("image_axis");
  axis.longest_whole = get("longest_whole");
  axis.tile = get("tile");
  axis.stride = get("stride");
  axis.samples = get("samples");
  axis.first_samples = get("first_samples");
  axis.dropped = get("dropped");
  axis.blend = get("blend");
  object.close();
  return axis;
}

// The latent position that a sample is decoded from.
std::int64_t position_of(const mct::TiledAxis& axis, std::int64_t sample) {
  return sample < axis.first_samples ? 0 : 1 + (sample - axis.first_samples) / axis.samples;
}

// What scripts/write_golden.py decodes with: each sample has the value of its position, plus half
// of the tile's first one, so that tiles differ where they overlap.
mct::Array repeated(const mct::Array& tile, const std::vector<mct::Level>& levels) {
  mct::Array image{mct::image_shape(tile.shape, tile.shape, levels), {}};
  std::size_t count = 1;
  for (const std::int64_t extent : image.shape) {
    count *= static_cast<std::size_t>(extent);
  }
  for (std::size_t k = 0; k < count; ++k) {
    auto rest = static_cast<std::int64_t>(k);
    mct::Shape index(image.shape.size());
    for (std::size_t axis = index.size(); axis-- > 0;) {
      index[axis] = rest % image.shape[axis];
      rest /= image.shape[axis];
    }
    for (const mct::Level& level : levels) {
      for (const mct::TiledAxis& axis : level) {
        std::int64_t& place = index[static_cast<std::size_t>(axis.image_axis)];
        place = position_of(axis, place);
      }
    }
    std::int64_t offset = 0;
    for (std::size_t axis = 0; axis < index.size(); ++axis) {
      offset = offset * tile.shape[axis] + index[axis];
    }
    image.values.push_back(tile.values[static_cast<std::size_t>(offset)] + tile.values[0] * 0.5f);
  }
  return image;
}

void tiles_blend_to_the_bits_of_the_golden_file(const JsonValue& root) {
  const auto to_float = [](const Json& json) { return static_cast<float>(json.number()); };
  for (const Json& entry : Json(root).array()) {
    JsonObject object(entry);
    const std::string name = object.required("name").text();
    mct::Tiling tiling;
    tiling.time = maybe(object.required_nullable("time"), axis_of);
    tiling.space = list_of(object.required("space"), axis_of);
    const auto levels = mct::levels(tiling, !tiling.space.empty());
    const mct::Array latent{list_of(object.required("latent_shape"), mct::to_integer),
                            list_of(object.required("latent"), to_float)};
    const mct::Array image = mct::decode_tiled(
        latent, levels, [&](const mct::Array& tile) { return repeated(tile, levels); });
    expect(image.shape == list_of(object.required("image_shape"), mct::to_integer),
           name + ": shape");
    expect(image.values == list_of(object.required("image"), to_float), name + ": values");
  }
}

void json_is_strict() {
  const auto parsed = [](const std::string& text) { return [=] { mct::parse_json(text); }; };
  expect_error(parsed(""), "truncated");
  expect_error(parsed("{\"a\": 1"), "truncated");
  expect_error(parsed("{\"a\": 1}x"), "malformed");
  expect_error(parsed("{\"a\": NaN}"), "malformed");
  expect_error(parsed("\"\xff\""), "malformed");
  expect_error(parsed("1e999"), "malformed");
  const JsonValue large = mct::parse_json("99999999999999999999");
  expect_error([&] { Json(large).integer(); }, "Expected `int`, got `float`");
  expect_error(parsed(std::string(100000, '[')), "too deeply");
  const JsonValue twice = mct::parse_json("{\"a\": 1, \"a\": 2}");
  expect(twice.find("a")->integer == 2, "the last of two members counts, as in Python");
  expect_error([&] { Json(twice).text(); }, "Expected `str`, got `object`");
  expect_error([&] { JsonObject(Json(twice)).close(); }, "unknown field `a`");
  expect_error([&] { JsonObject(Json(twice)).required("b"); }, "missing required field `b`");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::cerr << "usage: golden_test PATH/TO/tests/golden\n";
    return 2;
  }
  const std::string folder = arguments[1];
  grids_have_the_bits_of_the_golden_file(golden(folder, "grids.json"));
  folds_equal_the_golden_file(golden(folder, "folds.json"));
  malformed_folds_are_refused();
  tiles_blend_to_the_bits_of_the_golden_file(golden(folder, "tiles.json"));
  json_is_strict();
  return failures == 0 ? 0 : 1;
}
