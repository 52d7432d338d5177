#include "manifest.hpp"

#include <algorithm>
#include <iterator>
#include <set>

#include "error.hpp"
#include "schedule.hpp"

namespace mct {

namespace {

const std::string& only(const Component& component, const Tensors& tensors, Role role) {
  const std::string* found = nullptr;
  for (const auto& [name, record] : tensors) {
    if (record.role == role && found != nullptr) {
      found = nullptr;
      break;
    }
    found = record.role == role ? &name : found;
  }
  if (found == nullptr) {
    throw Error(MCT_BUNDLE_ERROR, "expected one tensor of role " +
                                      std::to_string(static_cast<int>(role)) + " in " +
                                      component.path + "; build the bundle again");
  }
  return *found;
}

using Graphs = std::map<std::string, std::pair<Tensors, Tensors>>;  // by precision

Graphs graphs_of(const std::map<std::string, Component>& components, const std::string& part) {
  Graphs found;
  for (const auto& [name, component] : components) {
    if (name.substr(0, name.find('/')) == part) {
      found[component.precision] = {component.inputs, component.outputs};
    }
  }
  return found;
}

// As Python writes a list.
std::string precisions_of(const Graphs& graphs) {
  std::vector<std::string> names;
  for (const auto& entry : graphs) {
    names.push_back(repr_of(entry.first));
  }
  return "[" + joined(names) + "]";
}

}  // namespace

bool TensorRecord::operator==(const TensorRecord& other) const {
  return dtype == other.dtype && shape == other.shape && role == other.role;
}

Shape TensorRecord::resolved(const Sizes& sizes) const {
  Shape result;
  for (const auto& extent : shape) {
    if (const auto* number = std::get_if<std::int64_t>(&extent)) {
      result.push_back(*number);
      continue;
    }
    const std::string& symbol = std::get<std::string>(extent);
    const auto size = sizes.find(symbol);
    if (size == sizes.end()) {
      throw Error(MCT_BUNDLE_ERROR,
                  "the manifest gives no size for " + repr_of(symbol) + "; build the bundle again");
    }
    result.push_back(size->second);
  }
  return result;
}

const std::string& Component::input_named(Role role) const { return only(*this, inputs, role); }

const std::string& Component::output_named(Role role) const { return only(*this, outputs, role); }

std::size_t Component::history() const {
  const auto is_history = [](const auto& entry) { return entry.second.role == Role::history; };
  return 1 + static_cast<std::size_t>(std::count_if(inputs.begin(), inputs.end(), is_history));
}

std::string size_text(std::int64_t height, std::int64_t width, std::optional<std::int64_t> frames) {
  return text_of(width) + "x" + text_of(height) +
         (frames.value_or(0) != 0 ? "x" + text_of(*frames) : "");
}

bool Guidance::is_classifier_free() const {
  return rule == "classifier_free" || rule == "classifier_free_rescaled" ||
         rule == "classifier_free_from_conditional";
}

int Guidance::least_scale() const { return rule == "classifier_free_from_conditional" ? 0 : 1; }

void check_guidance(const Guidance& guidance, std::optional<double> scale) {
  if (guidance.rule == "none" && scale) {
    throw Error(MCT_INPUT_ERROR,
                "this model takes no guidance scale, found " + text_of(*scale) + "; leave it out");
  }
  check_guidance_scale(scale);
  if (guidance.is_classifier_free() && scale && *scale < guidance.least_scale()) {
    throw Error(MCT_INPUT_ERROR, "a classifier-free guidance scale is at least " +
                                     std::to_string(guidance.least_scale()) +
                                     ", which leaves the negative prompt without effect, found " +
                                     text_of(*scale));
  }
}

std::vector<std::string> Exported::transformers() const {
  return {std::begin(transformer_names), std::begin(transformer_names) + (second_stage ? 2 : 1)};
}

void Exported::check_second_stage() const {
  const Graphs first = graphs_of(components, transformer_names[0]);
  const Graphs second = graphs_of(components, transformer_names[1]);
  if (second != (second_stage ? first : Graphs{})) {
    throw Error(MCT_BUNDLE_ERROR,
                "a bundle has a second stage where it has graphs of transformer_2, each with the "
                "tensors of one of transformer, found the stage " +
                    (second_stage ? second_stage->text() : "None") + " and transformer_2 in " +
                    precisions_of(second) + " beside transformer in " + precisions_of(first));
  }
  const auto scale = second_stage ? second_stage->guidance_scale : std::nullopt;
  if (scale && !guidance.is_classifier_free()) {
    throw Error(MCT_INPUT_ERROR,
                "a second stage has a guidance scale of its own under classifier-free guidance "
                "only, found " +
                    general(*scale) + " and the rule " + repr_of(guidance.rule) + "; leave it out");
  }
  check_guidance(guidance, scale);
}

const Component& Exported::component(const std::string& name) const {
  const auto found = components.find(name);
  if (found == components.end()) {
    throw Error(MCT_BUNDLE_ERROR,
                "expected a graph of " + name + ", found none; build the bundle again");
  }
  return found->second;
}

std::pair<std::string, const Component*> Exported::component_in(
    const std::string& part, const std::vector<std::string>& precisions) const {
  std::string wanted;
  for (const std::string& precision : precisions) {
    const std::string name = precision == "float32" ? part : part + "/" + precision;
    const auto found = components.find(name);
    if (found != components.end()) {
      return {name, &found->second};
    }
    wanted += (wanted.empty() ? "" : " or ") + precision;
  }
  throw Error(MCT_BUNDLE_ERROR, "expected a graph of " + part + " in " + wanted +
                                    ", found none; export it with `--precision " + precisions[0] +
                                    "`");
}

std::map<std::string, const Component*> Exported::text_graphs() const {
  std::map<std::string, const Component*> graphs;
  std::set<std::string> made;
  for (const auto& [name, part] : components) {
    if (part.tokenizer) {
      graphs.emplace(name, &part);
      for (const auto& output : part.outputs) {
        made.insert(output.first);
      }
    }
  }
  for (const auto& [name, record] : component("transformer").inputs) {
    const bool is_wanted = record.role == Role::conditioning || record.role == Role::text_mask;
    if (is_wanted && made.count(name) == 0) {
      return {};
    }
  }
  return graphs;
}

std::pair<std::string, const Component*> Exported::update_for(std::int64_t history) const {
  std::pair<std::string, const Component*> best{"", nullptr};
  for (const auto& [name, part] : components) {
    const bool is_update = name.rfind("update/", 0) == 0;
    const bool is_large = static_cast<std::int64_t>(part.history()) >= history;
    if (is_update && is_large && (!best.second || part.history() < best.second->history())) {
      best = {name, &part};
    }
  }
  return best;
}

}  // namespace mct
