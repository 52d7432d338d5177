// What an export says about itself, the mirror of src/meancache_trt/manifest.py and the manifest of
// bundle.py. Tensors are bound by their role and never by the model's family.

#ifndef MEANCACHE_TRT_HOST_MANIFEST_HPP
#define MEANCACHE_TRT_HOST_MANIFEST_HPP

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "json.hpp"
#include "meancache_trt.h"
#include "sigmas.hpp"

namespace mct {

using Shape = std::vector<std::int64_t>;
using Sizes = std::map<std::string, std::int64_t>;  // of every symbol

enum class Role {
  noise,
  latent,
  model_input,
  latent_grid,
  timestep,
  guidance_scale,
  token_ids,
  conditioning,
  text_mask,
  prepared,
  velocity,
  history,
  weights,
  image,
};

struct TensorRecord {
  mct_dtype dtype = MCT_FLOAT32;
  std::vector<std::variant<std::int64_t, std::string>> shape;
  Role role = Role::latent;

  bool operator==(const TensorRecord& other) const;
  // The shape with the symbols replaced. Throws a bundle error for a symbol without a size.
  Shape resolved(const Sizes& sizes) const;
};

using Tensors = std::map<std::string, TensorRecord>;

struct WeightFile {
  std::string path;
  std::string sha256;
  bool is_linked = false;
};

struct Tokenizer {
  std::string path;
  std::int64_t length = 0;
};

struct Component {
  std::string path;
  Tensors inputs;
  Tensors outputs;
  std::string precision = "float32";
  std::vector<WeightFile> weights;
  std::int64_t weight_bytes = 0;
  std::optional<Tokenizer> tokenizer;

  // The name of the only tensor with a role. Throws a bundle error where there is not one.
  const std::string& input_named(Role role) const;
  const std::string& output_named(Role role) const;
  // Velocities that an update graph holds.
  std::size_t history() const;
};

struct Resolution {
  std::int64_t height = 0;
  std::int64_t width = 0;
  std::optional<std::int64_t> frames;
  Sizes symbols;
  Shape noise_shape;
  Shape latent_shape;
  Shape decode_shape;
};

// Height, width and frames as text: 1280x720 or 1280x720x129, the width first.
std::string size_text(std::int64_t height, std::int64_t width, std::optional<std::int64_t> frames);

struct TiledAxis {
  std::int64_t latent_axis = 0;
  std::int64_t image_axis = 0;
  std::int64_t longest_whole = 0;
  std::int64_t tile = 0;
  std::int64_t stride = 0;
  std::int64_t samples = 0;
  std::int64_t first_samples = 0;
  std::int64_t dropped = 0;
  std::int64_t blend = 0;
};

struct Tiling {
  std::optional<TiledAxis> time;
  std::vector<TiledAxis> space;
};

struct Guidance {
  std::string rule;
  std::optional<double> default_scale;

  bool is_classifier_free() const;
  // The classifier-free scale at which the negative prompt has no effect.
  int least_scale() const;
};

// Throws an input error for a scale that a model with this guidance cannot take.
void check_guidance(const Guidance& guidance, std::optional<double> scale);

struct Exported {
  std::string family;
  std::string model_name;
  std::string model_digest;
  std::map<std::string, Component> components;
  std::vector<Resolution> resolutions;  // at least one
  Guidance guidance;
  std::string grid;
  std::string mu = "line";
  double timestep_scale = 1;
  std::int64_t text_tokens = 0;
  JsonValue scheduler;
  std::optional<double> frames_per_second;
  Tiling tiling;
  std::optional<SecondStage> second_stage;

  // The networks that schedules name: the first and, in a second stage, another.
  std::vector<std::string> transformers() const;
  // Throws unless the second transformer is there exactly where a second stage is, and for a scale
  // of its own that the model cannot take.
  void check_second_stage() const;
  // Throws a bundle error where there is none of that name.
  const Component& component(const std::string& name) const;
  // A part's graph in the first of `precisions` that there is, with its name.
  std::pair<std::string, const Component*> component_in(
      const std::string& part, const std::vector<std::string>& precisions) const;
  // Text encoders where they make all conditioning that the transformer takes; else none.
  std::map<std::string, const Component*> text_graphs() const;
  // The smallest update graph that holds so many velocities, with its name; null where none does.
  std::pair<std::string, const Component*> update_for(std::int64_t history) const;
};

struct FileRecord {
  std::string path;
  std::int64_t size_bytes = 0;
  std::string sha256;
};

struct Manifest {
  std::string bundle_id;
  Exported exported;
  std::vector<FileRecord> files;
  std::map<std::string, FileRecord> additions;  // by name, such as "schedules/b10"
  std::string digest;
};

// Decode and check the digest that it states. Throws a bundle error that names `path`.
Manifest parse_manifest(std::string_view text, const std::string& path);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_MANIFEST_HPP
