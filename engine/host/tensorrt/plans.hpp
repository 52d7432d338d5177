// Which plans a bundle has, which of them a library and GPU can load, and for which shapes: the
// mirror of engine/tensorrt/record.py, store.py and needs.py. Knows neither CUDA nor TensorRT.

#ifndef MEANCACHE_TRT_HOST_TENSORRT_PLANS_HPP
#define MEANCACHE_TRT_HOST_TENSORRT_PLANS_HPP

#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "bundle.hpp"
#include "manifest.hpp"

namespace mct {

// The smallest and the largest shape of an input that a plan takes.
struct ShapeRange {
  Shape min;
  Shape max;

  bool holds(const Shape& shape) const;
};

// An input or output as the network definition has it; -1 is a dynamic dimension.
struct PlanTensor {
  std::string dtype;
  Shape shape;
};

using PlanTensors = std::map<std::string, PlanTensor>;
using Shapes = std::map<std::string, Shape>;  // of inputs

// What the JSON file beside a plan says.
struct PlanRecord {
  std::string component;
  std::string graph;  // SHA-256 over the graph's file and its weight files
  std::map<std::string, ShapeRange> profile;
  std::string flavour;
  std::string version;
  std::string compute_capability;
  bool is_weight_streaming = false;
  std::string hardware_compatibility = "none";
  PlanTensors inputs;
  PlanTensors outputs;
  FileRecord file;
  std::string built_at;

  // Whether it runs on GPUs of a compute capability.
  bool serves(const std::string& capability) const;
  bool holds(const Shapes& shapes) const;
};

// A library and a GPU.
struct PlanTarget {
  std::string flavour;
  std::string version;
  std::string capability;
};

// Decode a sidecar, strictly. Throws a bundle error.
PlanRecord parse_plan_record(std::string_view text);

// SHA-256 over a graph's file and its weight files, as the manifest has them.
std::string graph_digest(const Bundle& bundle, const Component& component);

// The sidecar of every plan, the last built first.
std::vector<PlanRecord> plan_records(const Bundle& bundle);

// Plans of a component that the target can load, the last built first. Throws a plan-mismatch error
// that says what there is instead, and how to build one.
std::vector<PlanRecord> loadable_plans(const Bundle& bundle, const std::string& name,
                                       const Component& component, const PlanTarget& target);

// The first whose profile holds the shapes. Throws a plan-mismatch error where none does.
const PlanRecord& plan_for(const std::string& name, const std::vector<PlanRecord>& records,
                           const Shapes& shapes);

// Where a plan is, once its SHA-256 is that of its record; hashed again only where it changed.
// Throws a plan-mismatch error where it is missing or was altered.
std::filesystem::path checked_plan(const Bundle& bundle, const PlanRecord& record);

// Compare an engine's inputs and outputs with the record's. Throws a plan-mismatch error.
void check_plan_tensors(const PlanRecord& record, const PlanTensors& inputs,
                        const PlanTensors& outputs);

// The precisions that suit a compute capability, those that the transformer has plans in first.
std::vector<std::string> planned_precisions(const Bundle& bundle, const PlanTarget& target);

// Throws a plan-mismatch error where a graph that a render needs has no plan for the target.
void check_plans(const Bundle& bundle, const PlanTarget& target);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_TENSORRT_PLANS_HPP
