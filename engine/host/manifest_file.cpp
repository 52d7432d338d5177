// manifest.json, decoded strictly.

#include <limits>

#include "error.hpp"
#include "files.hpp"
#include "manifest.hpp"

namespace mct {

namespace {

const char* const version = "meancache-trt/bundle/1";

mct_dtype read_dtype(const Json& json) {
  const std::vector<std::string> names = {"float32", "float16", "bfloat16", "float64",
                                          "int32",   "int64",   "bool"};
  return static_cast<mct_dtype>(json.choice(names) + 1);
}

Role read_role(const Json& json) {
  const std::vector<std::string> names = {
      "noise",          "latent",    "model_input",  "latent_grid", "timestep",
      "guidance_scale", "token_ids", "conditioning", "text_mask",   "prepared",
      "velocity",       "history",   "weights",      "image"};
  return static_cast<Role>(json.choice(names));
}

// Extents and counts: what memory is made from, so neither negative nor beyond what fits.
std::int64_t read_extent(const Json& json) {
  const std::int64_t value = json.integer();
  if (value < 0 || value > std::numeric_limits<std::int32_t>::max()) {
    json.fail("Expected `int` >= 0 and < 2^31");
  }
  return value;
}

Shape read_shape(const Json& json) {
  Shape shape = list_of(json, read_extent);
  if (shape.size() >= MCT_MAX_RANK) {  // one more axis is the batch
    json.fail("Expected `array` of length < 8");
  }
  return shape;
}

TensorRecord read_tensor(const Json& json) {
  JsonObject object(json);
  TensorRecord record;
  record.dtype = read_dtype(object.required("dtype"));
  const Json shape = object.required("shape");
  for (const Json& extent : shape.array()) {
    if (extent.value().kind == JsonValue::Kind::text) {
      record.shape.emplace_back(extent.text());
    } else {
      record.shape.emplace_back(read_extent(extent));
    }
  }
  if (record.shape.size() > MCT_MAX_RANK) {
    shape.fail("Expected `array` of length <= 8");
  }
  record.role = read_role(object.required("role"));
  object.close();
  return record;
}

WeightFile read_weights(const Json& json) {
  JsonObject object(json);
  WeightFile file;
  file.path = object.required("path").text();
  object.required("size_bytes").integer();
  file.sha256 = object.required("sha256").text();
  file.is_linked = object.required("is_linked").boolean();
  object.close();
  return file;
}

Tokenizer read_tokenizer(const Json& json) {
  JsonObject object(json);
  Tokenizer tokenizer;
  tokenizer.path = object.required("path").text();
  tokenizer.length = read_extent(object.required("length"));
  object.close();
  return tokenizer;
}

Component read_component(const Json& json) {
  JsonObject object(json);
  Component component;
  component.path = object.required("path").text();
  component.inputs = table_of(object.required("inputs"), read_tensor);
  component.outputs = table_of(object.required("outputs"), read_tensor);
  if (const auto precision = object.optional("precision")) {
    component.precision = precision->text();
  }
  maybe(object.optional("opset"), to_integer);
  if (const auto weights = object.optional("weights")) {
    component.weights = list_of(*weights, read_weights);
  }
  component.weight_bytes = maybe(object.optional("weight_bytes"), to_integer).value_or(0);
  maybe(object.optional("shared_bytes"), to_integer);
  component.tokenizer = maybe(object.nullable("tokenizer"), read_tokenizer);
  object.close();
  return component;
}

Resolution read_resolution(const Json& json) {
  JsonObject object(json);
  Resolution resolution;
  resolution.height = read_extent(object.required("height"));
  resolution.width = read_extent(object.required("width"));
  resolution.frames = maybe(object.required_nullable("frames"), read_extent);
  resolution.symbols = table_of(object.required("symbols"), read_extent);
  resolution.noise_shape = read_shape(object.required("noise_shape"));
  resolution.latent_shape = read_shape(object.required("latent_shape"));
  resolution.decode_shape = read_shape(object.required("decode_shape"));
  object.close();
  return resolution;
}

TiledAxis read_axis(const Json& json) {
  JsonObject object(json);
  TiledAxis axis;
  const auto extent = [&](const char* name) { return read_extent(object.required(name)); };
  axis.latent_axis = extent("latent_axis");
  axis.image_axis = extent("image_axis");
  axis.longest_whole = extent("longest_whole");
  axis.tile = extent("tile");
  axis.stride = extent("stride");
  axis.samples = extent("samples");
  axis.first_samples = extent("first_samples");
  axis.dropped = extent("dropped");
  axis.blend = extent("blend");
  object.close();
  if (axis.tile < 1 || axis.stride < 1) {
    json.fail("Expected `int` >= 1 for tile and stride");
  }
  return axis;
}

Tiling read_tiling(const Json& json) {
  JsonObject object(json);
  Tiling tiling;
  tiling.time = maybe(object.nullable("time"), read_axis);
  if (const auto space = object.optional("space")) {
    tiling.space = list_of(*space, read_axis);
  }
  object.close();
  return tiling;
}

Guidance read_guidance(const Json& json) {
  JsonObject object(json);
  Guidance guidance;
  const std::vector<std::string> rules = {"embedded", "classifier_free", "classifier_free_rescaled",
                                          "classifier_free_from_conditional", "none"};
  guidance.rule = rules[object.required("rule").choice(rules)];
  guidance.default_scale = maybe(object.required_nullable("default_scale"), to_number);
  object.close();
  return guidance;
}

void check_parity(const Json& json) {
  JsonObject object(json);
  object.required("component").text();
  object.required("max_abs_error").number();
  object.required("tolerance").number();
  list_of(object.required("sizes"), [](const Json& sizes) { return table_of(sizes, to_integer); });
  object.required("runtime").text();
  if (const auto blocks = object.optional("blocks")) {
    list_of(*blocks, to_text);
  }
  object.close();
}

void check_range(const Json& json) {
  JsonObject object(json);
  for (const char* name : {"min", "opt", "max"}) {
    object.required(name).integer();
  }
  object.close();
}

void check_lora(const Json& json) {
  JsonObject object(json);
  object.required("name").text();
  object.required("sha256").text();
  object.required("scale").number();
  object.close();
}

void read_model(const Json& json, Exported& exported) {
  JsonObject object(json);
  exported.model_name = object.required("name").text();
  maybe(object.required_nullable("revision"), to_text);
  exported.model_digest = object.required("digest").text();
  if (const auto loras = object.optional("loras")) {
    for (const Json& lora : loras->array()) {  // the name and the digest have them
      check_lora(lora);
    }
  }
  object.close();
}

Exported read_export(const Json& json) {
  JsonObject object(json);
  Exported exported;
  exported.family = object.required("family").text();
  read_model(object.required("model"), exported);
  exported.components = table_of(object.required("components"), read_component);
  list_of(object.required("encoder_weights"), read_weights);
  const Json resolutions = object.required("resolutions");
  exported.resolutions = list_of(resolutions, read_resolution);
  if (exported.resolutions.empty()) {
    resolutions.fail("Expected `array` of length >= 1");
  }
  exported.guidance = read_guidance(object.required("guidance"));
  const std::vector<std::string> grids = {"linspace", "linspace_to_zero", "count"};
  exported.grid = grids[object.required("grid").choice(grids)];
  exported.timestep_scale = object.required("timestep_scale").number();
  object.required("num_train_timesteps").integer();
  exported.text_tokens = read_extent(object.required("text_tokens"));
  const Json scheduler = object.required("scheduler");
  scheduler.members();  // an object, whose members are diffusers'
  exported.scheduler = scheduler.value();
  for (const Json& parity : object.required("parity").array()) {
    check_parity(parity);
  }
  exported.frames_per_second = maybe(object.nullable("frames_per_second"), to_number);
  if (const auto tiling = object.nullable("tiling")) {
    exported.tiling = read_tiling(*tiling);
  }
  if (const auto batch = object.optional("batch")) {
    check_range(*batch);
  }
  if (const auto buckets = object.optional("text_buckets")) {
    list_of(*buckets, to_integer);  // the caller says which length it cut its conditioning to
  }
  if (const auto rule = object.optional("mu")) {
    const std::vector<std::string> rules = {"line", "empirical"};
    exported.mu = rules[rule->choice(rules)];
  }
  exported.second_stage = maybe(object.nullable("second_stage"), read_second_stage);
  object.close();
  return exported;
}

FileRecord read_record(JsonObject& object, std::string path) {
  FileRecord record;
  record.path = std::move(path);
  record.size_bytes = object.required("size_bytes").integer();
  record.sha256 = object.required("sha256").text();
  object.close();
  return record;
}

Manifest decode(const Json& json) {
  JsonObject object(json);
  Manifest manifest;
  if (const auto schema = object.optional("schema")) {
    schema->choice({version});
  }
  manifest.bundle_id = object.required("bundle_id").text();
  table_of(object.required("tools"), to_text);
  manifest.exported = read_export(object.required("export"));
  for (const auto& [path, value] : object.required("files").members()) {
    JsonObject record(value);
    manifest.files.push_back(read_record(record, path));
  }
  if (const auto additions = object.optional("additions")) {
    for (const auto& [name, value] : additions->members()) {
      JsonObject record(value);
      const std::string path = record.required("path").text();
      manifest.additions.insert_or_assign(name, read_record(record, path));
    }
  }
  manifest.digest = maybe(object.optional("digest"), to_text).value_or("");
  object.close();
  return manifest;
}

// The digest is that of the text in which it is "", as the Python host writes it: the last line.
bool has_its_digest(std::string_view text, const std::string& digest) {
  const std::string ending = "\n \"digest\": \"" + digest + "\"\n}\n";
  if (digest.empty() || text.size() < ending.size() ||
      text.substr(text.size() - ending.size()) != ending) {
    return false;
  }
  const std::string rest(text.substr(0, text.size() - ending.size()));
  return digest_of(rest + "\n \"digest\": \"\"\n}\n") == digest;
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& path) {
  Manifest manifest;
  try {
    const JsonValue root = parse_json(text);
    manifest = decode(Json(root));
    manifest.exported.check_second_stage();
  } catch (const JsonTypeError& fault) {
    throw Error(MCT_BUNDLE_ERROR,
                path + ": not a valid manifest file: " + fault.what() + "; build the bundle again");
  } catch (const JsonSyntaxError& fault) {
    throw Error(MCT_BUNDLE_ERROR, path + ": not JSON, perhaps truncated: " + fault.what() +
                                      "; build the bundle again");
  } catch (const Error& error) {
    throw Error(MCT_BUNDLE_ERROR, path + ": " + error.what() + "; build the bundle again");
  }
  if (!has_its_digest(text, manifest.digest)) {
    throw Error(MCT_BUNDLE_ERROR,
                path +
                    " does not have the digest that it states, so it was edited or damaged; build "
                    "the bundle again");
  }
  return manifest;
}

}  // namespace mct
