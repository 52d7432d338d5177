// The library and bundle part of the C functions; meancache_trt.h has their contracts.

#include "capi.hpp"

#define MCT_TEXT_(number) #number
#define MCT_TEXT(number) MCT_TEXT_(number)

namespace mct {

namespace {

// Fixed memory, so that telling of a failed allocation needs none.
thread_local char last_error[2048] = "";

const Component& image_decoder(const Exported& exported) {
  return *exported.component_in("vae_decoder", {"float32", "bfloat16", "float16"}).second;
}

// (B, 3, …) -> (…, 3).
Shape image_shape_of(const Exported& exported, const Resolution& resolution) {
  const Component& decoder = image_decoder(exported);
  Sizes sizes = resolution.symbols;
  sizes["batch"] = 1;
  const Shape made = decoder.outputs.at(decoder.output_named(Role::image)).resolved(sizes);
  if (made.size() < 3) {
    throw Error(MCT_BUNDLE_ERROR, "the decoder makes no images; build the bundle again");
  }
  Shape shape(made.begin() + 2, made.end());
  shape.push_back(made[1]);
  return shape;
}

// Tensors of conditioning of the transformer, by name.
Tensors conditioning_of(const Exported& exported) {
  Tensors found;
  for (const auto& [name, record] :
       exported.component_in("transformer", {"float32", "bfloat16", "float16"}).second->inputs) {
    if (record.role == Role::conditioning || record.role == Role::text_mask) {
      found.emplace(name, record);
    }
  }
  return found;
}

mct_guidance guidance_of(const Guidance& guidance) {
  if (guidance.rule == "none") {
    return MCT_GUIDANCE_NONE;
  }
  return guidance.is_classifier_free() ? MCT_GUIDANCE_CLASSIFIER_FREE : MCT_GUIDANCE_EMBEDDED;
}

void check_index(std::size_t index, std::size_t count, const char* what) {
  if (index >= count) {
    throw Error(MCT_INPUT_ERROR, std::string("there are ") + std::to_string(count) + " " + what +
                                     ", found index " + std::to_string(index));
  }
}

template <class Table>
auto entry(const Table& table, std::size_t index, const char* what) {
  check_index(index, table.size(), what);
  auto found = table.begin();
  std::advance(found, index);
  return found;
}

Shape one_sample(const TensorRecord& record, const Exported& exported) {
  Sizes sizes = exported.resolutions.front().symbols;
  sizes["batch"] = 1;
  sizes["two_batch"] = 1;
  const Shape shape = record.resolved(sizes);
  return shape.empty() ? shape : Shape(shape.begin() + 1, shape.end());
}

mct_bundle_info info_of(const Bundle& bundle) {
  const Exported& exported = bundle.exported();
  mct_bundle_info info{};
  info.bundle_id = bundle.manifest().bundle_id.c_str();
  info.family = exported.family.c_str();
  info.model_name = exported.model_name.c_str();
  info.model_digest = exported.model_digest.c_str();
  info.guidance = guidance_of(exported.guidance);
  info.has_default_guidance_scale = exported.guidance.default_scale ? 1 : 0;
  info.default_guidance_scale = exported.guidance.default_scale.value_or(0);
  info.resolution_count = exported.resolutions.size();
  info.schedule_count = bundle.schedules().size();
  info.conditioning_count = conditioning_of(exported).size();
  info.text_encoder_count = exported.text_graphs().size();
  info.text_tokens = exported.text_tokens;
  info.frames_per_second = exported.frames_per_second.value_or(0);
  info.has_space_tiling = exported.tiling.space.empty() ? 0 : 1;
  return info;
}

mct_schedule described(const NamedSchedule& entry) {
  const Schedule& schedule = entry.schedule;
  mct_schedule result{};
  result.name = entry.name.c_str();
  result.method = schedule.method.c_str();
  result.precision = schedule.precision.c_str();
  result.budget = schedule.budget();
  result.steps = schedule.grid.steps;
  result.history = schedule.history;
  result.is_calibrated = schedule.is_calibrated ? 1 : 0;
  result.has_guidance_scale = schedule.guidance_scale ? 1 : 0;
  result.guidance_scale = schedule.guidance_scale.value_or(0);
  if (const auto& range = schedule.guidance_range) {
    result.has_guidance_range = 1;
    result.guidance_low = range->first;
    result.guidance_high = range->second;
  }
  return result;
}

}  // namespace

void remember(const char* text) noexcept { std::strncpy(last_error, text, sizeof last_error - 1); }

mct_tensor described(const std::string& name, const Shape& shape, mct_dtype dtype) {
  mct_tensor tensor{};
  tensor.name = name.c_str();
  tensor.dtype = dtype;
  fill(shape, tensor.rank, tensor.shape);
  tensor.size_bytes = elements_of(shape) * bytes_of(dtype);
  return tensor;
}

}  // namespace mct

using namespace mct;

const char* mct_version(void) {
  return MCT_TEXT(MCT_VERSION_MAJOR) "." MCT_TEXT(MCT_VERSION_MINOR) "." MCT_TEXT(
      MCT_VERSION_PATCH);
}

const char* mct_backends(void) {
  static const std::string names = backend_names();
  return names.c_str();
}

const char* mct_last_error(void) { return last_error; }

mct_status mct_bundle_open(const mct_bundle_options* options, mct_bundle** bundle) {
  return guarded([&] {
    expect(bundle, "a place for the bundle");
    *bundle = nullptr;
    const mct_bundle_options given = taken(options, "mct_bundle_options");
    expect(given.path, "the path of a bundle");
    auto opened = std::make_unique<mct_bundle>();
    opened->shared = std::make_shared<SharedBundle>(given.path, given.is_full_check != 0);
    *bundle = opened.release();
    return MCT_OK;
  });
}

void mct_bundle_destroy(mct_bundle* bundle) { delete bundle; }

mct_status mct_bundle_get_info(const mct_bundle* bundle, mct_bundle_info* info) {
  return guarded([&] {
    expect(bundle, "a bundle");
    give(info_of(bundle->shared->bundle()), info, "mct_bundle_info");
    return MCT_OK;
  });
}

mct_status mct_bundle_get_resolution(const mct_bundle* bundle, size_t index,
                                     mct_resolution* resolution) {
  return guarded([&] {
    expect(bundle, "a bundle");
    const Exported& exported = bundle->shared->bundle().exported();
    const Resolution& found = *entry(exported.resolutions, index, "resolutions");
    mct_resolution result{};
    result.height = found.height;
    result.width = found.width;
    result.frames = found.frames.value_or(0);
    fill(found.noise_shape, result.noise_rank, result.noise_shape);
    fill(found.latent_shape, result.latent_rank, result.latent_shape);
    fill(image_shape_of(exported, found), result.image_rank, result.image_shape);
    give(result, resolution, "mct_resolution");
    return MCT_OK;
  });
}

mct_status mct_bundle_get_schedule(const mct_bundle* bundle, size_t index, mct_schedule* schedule) {
  return guarded([&] {
    expect(bundle, "a bundle");
    const auto& schedules = bundle->shared->bundle().schedules();
    give(described(*entry(schedules, index, "schedules")), schedule, "mct_schedule");
    return MCT_OK;
  });
}

mct_status mct_bundle_get_conditioning(const mct_bundle* bundle, size_t index, mct_tensor* tensor) {
  return guarded([&] {
    expect(bundle, "a bundle");
    const Exported& exported = bundle->shared->bundle().exported();
    const Tensors records = conditioning_of(exported);
    const std::string name = entry(records, index, "tensors of conditioning")->first;
    // The record of the manifest, whose text lives as long as the bundle.
    const auto& inputs =
        exported.component_in("transformer", {"float32", "bfloat16", "float16"}).second->inputs;
    const auto found = inputs.find(name);
    give(described(found->first, one_sample(found->second, exported), found->second.dtype), tensor,
         "mct_tensor");
    return MCT_OK;
  });
}

mct_status mct_bundle_get_text_encoder(const mct_bundle* bundle, size_t index, mct_tensor* tensor) {
  return guarded([&] {
    expect(bundle, "a bundle");
    const Exported& exported = bundle->shared->bundle().exported();
    const auto graphs = exported.text_graphs();
    const auto found = exported.components.find(entry(graphs, index, "text encoders")->first);
    const Component& component = found->second;
    const TensorRecord& record = component.inputs.at(component.input_named(Role::token_ids));
    give(described(found->first, one_sample(record, exported), record.dtype), tensor, "mct_tensor");
    return MCT_OK;
  });
}
