#include "tensorrt/plans.hpp"

#include <algorithm>
#include <cstdlib>
#include <regex>
#include <set>

#include "error.hpp"
#include "files.hpp"
#include "json.hpp"

namespace mct {

namespace {

const std::vector<std::string> schemas = {"meancache-trt/plan/1"};
const std::vector<std::string> flavours = {"tensorrt", "tensorrt_rtx"};
const std::vector<std::string> compatibilities = {"none", "ampere_plus", "same_compute_capability"};
const std::vector<std::string> tilings = {"none", "fast", "moderate", "full"};

[[noreturn]] void mismatch(const std::string& text) { throw Error(MCT_PLAN_MISMATCH_ERROR, text); }

std::string remedy(const Bundle& bundle) {
  return "build it again with `meancache-trt plan " + bundle.directory().string() + "`";
}

Shape to_shape(const Json& json) { return list_of(json, to_integer); }

ShapeRange to_range(const Json& json) {
  JsonObject object(json);
  ShapeRange range;
  range.min = to_shape(object.required("min"));
  to_shape(object.required("opt"));
  range.max = to_shape(object.required("max"));
  object.close();
  return range;
}

PlanTensor to_tensor(const Json& json) {
  JsonObject object(json);
  PlanTensor tensor{object.required("dtype").text(), to_shape(object.required("shape"))};
  object.close();
  return tensor;
}

void read_options(const Json& json, PlanRecord& record) {
  JsonObject object(json);
  for (const char* name : {"builder_optimization_level", "workspace_bytes", "max_aux_streams"}) {
    maybe(object.nullable(name), to_integer);
  }
  if (const auto streaming = object.optional("weight_streaming")) {
    record.is_weight_streaming = streaming->boolean();
  }
  if (const auto hardware = object.optional("hardware_compatibility")) {
    record.hardware_compatibility = compatibilities[hardware->choice(compatibilities)];
  }
  if (const auto tiling = object.optional("tiling_optimization_level")) {
    tiling->choice(tilings);
  }
  object.close();
}

void read_key(const Json& json, PlanRecord& record) {
  JsonObject object(json);
  record.component = object.required("component").text();
  record.graph = object.required("graph").text();
  object.required("precision").text();
  record.profile = table_of(object.required("profile"), to_range);
  record.flavour = flavours[object.required("flavour").choice(flavours)];
  record.version = object.required("version").text();
  record.compute_capability = object.required("compute_capability").text();
  if (const auto options = object.optional("options")) {
    read_options(*options, record);
  }
  object.close();
}

FileRecord to_file(const Json& json) {
  JsonObject object(json);
  FileRecord file;
  file.path = object.required("path").text();
  file.size_bytes = object.required("size_bytes").integer();
  file.sha256 = object.required("sha256").text();
  object.close();
  return file;
}

PlanRecord to_record(const Json& json) {
  JsonObject object(json);
  PlanRecord record;
  if (const auto schema = object.optional("schema")) {
    schema->choice(schemas);
  }
  read_key(object.required("key"), record);
  record.inputs = table_of(object.required("inputs"), to_tensor);
  record.outputs = table_of(object.required("outputs"), to_tensor);
  record.file = to_file(object.required("file"));
  object.required("fused_attention").integer();
  object.required("build_s").number();
  object.required("peak_memory_bytes").integer();
  record.built_at = object.required("built_at").text();
  object.close();
  return record;
}

std::string size_of(const Shape& shape) {
  std::string text;
  for (const std::int64_t extent : shape) {
    text += (text.empty() ? "" : "×") + text_of(extent);
  }
  return text.empty() ? "scalar" : text;
}

std::string profile_text(const PlanRecord& record) {
  std::vector<std::string> ranges;
  for (const auto& [name, range] : record.profile) {
    ranges.push_back(name + " " + size_of(range.min) + " to " + size_of(range.max));
  }
  return joined(ranges);
}

std::string text_of_tensors(const PlanTensors& tensors) {
  std::vector<std::string> texts;
  for (const auto& [name, tensor] : tensors) {
    texts.push_back(name + " " + tensor.dtype + tuple_of(tensor.shape));
  }
  return joined(texts);
}

// A builder may find out more of an output's shape than the network definition says.
bool agree(const Shape& expected, const Shape& found) {
  return std::equal(expected.begin(), expected.end(), found.begin(), found.end(),
                    [](std::int64_t one, std::int64_t other) {
                      return one == -1 || other == -1 || one == other;
                    });
}

bool fits(const PlanTensors& expected, const PlanTensors& found) {
  return std::equal(expected.begin(), expected.end(), found.begin(), found.end(),
                    [](const auto& one, const auto& other) {
                      return one.first == other.first && one.second.dtype == other.second.dtype &&
                             agree(one.second.shape, other.second.shape);
                    });
}

void check_fit(const PlanRecord& record, const PlanTensors& expected, const PlanTensors& found) {
  if (!fits(expected, found)) {
    mismatch(record.file.path + " is not what its record says: expected " +
             text_of_tensors(expected) + ", found " + text_of_tensors(found) +
             "; build it again with `meancache-trt plan`");
  }
}

// CUDA C++ Programming Guide, arithmetic instructions: Ampere was the first that has it.
bool has_bfloat16(const std::string& capability) {
  return std::strtol(capability.c_str(), nullptr, 10) >= 8;
}

// bfloat16 goes before float16, whose range these models exceed; Turing, 7.5, lacks it.
std::vector<std::string> precisions_for(const std::string& capability) {
  if (has_bfloat16(capability)) {
    return {"bfloat16", "float16", "float32"};
  }
  return {"float16", "float32"};
}

std::string component_name(const std::string& part, const std::string& precision) {
  return precision == "float32" ? part : part + "/" + precision;
}

using Names = std::vector<std::string>;  // of components

// The graphs of some parts, in each of `precisions` that they have.
std::vector<Names> graphs_of(const Bundle& bundle, const Names& parts, const Names& precisions) {
  std::vector<Names> choices;
  for (const std::string& precision : precisions) {
    Names names;
    for (const std::string& part : parts) {
      names.push_back(component_name(part, precision));
    }
    if (bundle.exported().components.count(names.front()) != 0) {
      choices.push_back(names);
    }
  }
  return choices;
}

// Throws what is wrong with the last of some choices where not all components of any can be loaded.
void check_any(const Bundle& bundle, const std::vector<Names>& choices, const PlanTarget& target) {
  for (std::size_t k = 0; k < choices.size(); ++k) {
    try {
      for (const std::string& name : choices[k]) {
        loadable_plans(bundle, name, bundle.exported().components.at(name), target);
      }
      return;
    } catch (const Error& error) {
      if (error.status() != MCT_PLAN_MISMATCH_ERROR || k + 1 == choices.size()) {
        throw;
      }
    }
  }
}

}  // namespace

bool ShapeRange::holds(const Shape& shape) const {
  if (shape.size() != min.size() || shape.size() != max.size()) {
    return false;
  }
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    if (shape[axis] < min[axis] || shape[axis] > max[axis]) {
      return false;
    }
  }
  return true;
}

bool PlanRecord::serves(const std::string& capability) const {
  return hardware_compatibility == "ampere_plus" ? has_bfloat16(capability)
                                                 : compute_capability == capability;
}

bool PlanRecord::holds(const Shapes& shapes) const {
  return std::all_of(shapes.begin(), shapes.end(), [this](const auto& entry) {
    const auto range = profile.find(entry.first);
    if (range != profile.end()) {
      return range->second.holds(entry.second);
    }
    const auto input = inputs.find(entry.first);
    return input != inputs.end() && input->second.shape == entry.second;
  });
}

PlanRecord parse_plan_record(std::string_view text) {
  try {
    const JsonValue root = parse_json(text);
    return to_record(Json(root));
  } catch (const JsonTypeError& fault) {
    throw Error(MCT_BUNDLE_ERROR, std::string("not a valid planrecord file: ") + fault.what());
  } catch (const JsonSyntaxError& fault) {
    throw Error(MCT_BUNDLE_ERROR, std::string("not JSON, perhaps truncated: ") + fault.what());
  }
}

std::string graph_digest(const Bundle& bundle, const Component& component) {
  const auto& files = bundle.manifest().files;
  const auto graph = std::find_if(files.begin(), files.end(), [&](const FileRecord& file) {
    return file.path == component.path;
  });
  if (graph == files.end()) {
    throw Error(MCT_BUNDLE_ERROR, "the manifest of " + bundle.directory().string() +
                                      " does not list " + component.path +
                                      "; build the bundle again");
  }
  std::string text = "[\n \"" + graph->sha256 + "\"";  // as the Python host writes JSON
  for (const WeightFile& file : component.weights) {
    text += ",\n \"" + file.sha256 + "\"";
  }
  return digest_of(text + "\n]\n");
}

std::vector<PlanRecord> plan_records(const Bundle& bundle) {
  // Component, GPU, beginning of the key's digest, such as transformer-bfloat16.sm89.0123456789ab.
  static const std::regex named(R"(plans/[\w-]+\.sm\d+\.[0-9a-f]{12})");
  std::vector<PlanRecord> records;
  for (const auto& [name, addition] : bundle.manifest().additions) {
    if (std::regex_match(name, named)) {
      records.push_back(parse_plan_record(read_file(bundle.directory() / addition.path)));
    }
  }
  std::stable_sort(records.begin(), records.end(), [](const auto& one, const auto& other) {
    return one.built_at > other.built_at;
  });
  return records;
}

std::vector<PlanRecord> loadable_plans(const Bundle& bundle, const std::string& name,
                                       const Component& component, const PlanTarget& target) {
  const std::string graph = graph_digest(bundle, component);
  std::vector<PlanRecord> found;
  std::set<std::string> others;
  for (PlanRecord& record : plan_records(bundle)) {
    if (record.component != name) {
      continue;
    }
    others.insert(record.flavour + " " + record.version + " for " + record.compute_capability);
    if (record.graph == graph && record.flavour == target.flavour &&
        record.version == target.version && record.serves(target.capability)) {
      found.push_back(std::move(record));
    }
  }
  if (found.empty()) {
    std::string there;
    for (const std::string& other : others) {
      there += (there.empty() ? "" : "; ") + other;
    }
    mismatch("expected a plan of " + name + " by " + target.flavour + " " + target.version +
             " for compute capability " + target.capability + ", found " +
             (there.empty() ? "none" : there) + "; build it with `meancache-trt plan " +
             bundle.directory().string() + "`");
  }
  return found;
}

const PlanRecord& plan_for(const std::string& name, const std::vector<PlanRecord>& records,
                           const Shapes& shapes) {
  for (const PlanRecord& record : records) {
    if (record.holds(shapes)) {
      return record;
    }
  }
  std::string planned;
  for (const PlanRecord& record : records) {
    planned += (planned.empty() ? "" : "; or ") + profile_text(record);
  }
  std::vector<std::string> asked;
  for (const auto& [input, shape] : shapes) {
    asked.push_back(input + " " + size_of(shape));
  }
  mismatch("no plan of " + name + " holds the shapes " + joined(asked) + "; planned is " + planned +
           ". Build one with `meancache-trt plan` and wider --batch, --height, --width, --frames "
           "or --text-tokens MIN/OPT/MAX");
}

std::filesystem::path checked_plan(const Bundle& bundle, const PlanRecord& record) {
  const std::filesystem::path path = bundle.directory() / record.file.path;
  std::string found;
  try {
    found = verified_sha256(path);
  } catch (const std::system_error& error) {
    mismatch("cannot read " + path.string() + ": " + reason_of(error) + "; " + remedy(bundle));
  }
  if (found != record.file.sha256) {
    mismatch(path.string() + " was altered: expected SHA-256 " + record.file.sha256.substr(0, 16) +
             "…, found " + found.substr(0, 16) + "…; " + remedy(bundle));
  }
  return path;
}

void check_plan_tensors(const PlanRecord& record, const PlanTensors& inputs,
                        const PlanTensors& outputs) {
  check_fit(record, record.inputs, inputs);
  check_fit(record, record.outputs, outputs);
}

std::vector<std::string> planned_precisions(const Bundle& bundle, const PlanTarget& target) {
  std::vector<std::string> here, others;
  for (const std::string& precision : precisions_for(target.capability)) {
    const auto graphs = graphs_of(bundle, bundle.exported().transformers(), {precision});
    bool is_planned = !graphs.empty();
    try {
      check_any(bundle, graphs, target);
    } catch (const Error& error) {
      if (error.status() != MCT_PLAN_MISMATCH_ERROR) {
        throw;
      }
      is_planned = false;
    }
    (is_planned ? here : others).push_back(precision);
  }
  here.insert(here.end(), others.begin(), others.end());
  return here;
}

void check_plans(const Bundle& bundle, const PlanTarget& target) {
  std::vector<Names> needs = {bundle.exported().transformers(), {"vae_decoder"}, {"prepare"}};
  for (const auto& entry : bundle.exported().text_graphs()) {
    needs.push_back({entry.first});
  }
  for (const Names& parts : needs) {
    check_any(bundle, graphs_of(bundle, parts, precisions_for(target.capability)), target);
  }
  std::vector<Names> updates;
  for (const auto& entry : bundle.exported().components) {
    if (entry.first.rfind("update/", 0) == 0) {
      updates.push_back({entry.first});
    }
  }
  check_any(bundle, updates, target);
}

}  // namespace mct
