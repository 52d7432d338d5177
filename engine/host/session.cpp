#include "session.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.hpp"
#include "noise.hpp"

namespace mct {

namespace {

// What the loop makes itself.
bool is_made_by_loop(Role role) {
  return role == Role::latent || role == Role::model_input || role == Role::timestep;
}

bool is_conditioning(Role role) { return role == Role::conditioning || role == Role::text_mask; }

Sizes sizes_of(const Resolution& resolution, const SessionRequest& request,
               std::int64_t text_tokens) {
  Sizes sizes = resolution.symbols;
  if (request.text_tokens < 0 || request.text_tokens > text_tokens) {
    throw Error(MCT_INPUT_ERROR, "a text length is 1 to " + text_of(text_tokens) +
                                     " tokens in this bundle, found " +
                                     text_of(request.text_tokens));
  }
  if (request.text_tokens > 0) {
    sizes["text_tokens"] = request.text_tokens;
  }
  sizes["batch"] = request.batch;
  sizes["two_batch"] = 2 * request.batch;
  return sizes;
}

ChosenSchedule chosen_schedule(const Graphs& graphs, const Resolution& resolution,
                               const SessionRequest& request) {
  const std::string& precision = graphs.network("transformer").second->precision;
  return choose_schedule(graphs.bundle(), resolution,
                         {request.schedule, request.guidance_scale, precision});
}

std::int64_t checked_batch(std::int64_t batch) {
  if (batch < 1 || batch > 4096) {
    throw Error(MCT_INPUT_ERROR, "a batch is 1 to 4096 pictures, found " + text_of(batch));
  }
  return batch;
}

}  // namespace

Session::Session(std::shared_ptr<Graphs> graphs, const SessionRequest& request)
    : graphs_(std::move(graphs)),
      resolution_(
          find_resolution(graphs_->bundle(), request.height, request.width, request.frames)),
      chosen_(chosen_schedule(*graphs_, resolution_, request)),
      batch_(checked_batch(request.batch)),
      sizes_(sizes_of(resolution_, request, graphs_->bundle().exported().text_tokens)),
      memory_(graphs_->runtime()) {
  const Exported& exported = graphs_->bundle().exported();
  const Named transformer = graphs_->network("transformer");
  const Named update = exported.update_for(schedule().history);
  if (update.second == nullptr) {
    throw Error(MCT_SCHEDULE_ERROR,
                "schedule " + repr_of(schedule().name) + " reads " + text_of(schedule().history) +
                    " velocities back, more than any update graph of the bundle holds; use "
                    "shorter spans or fewer nodes in a row");
  }
  precision_ = transformer.second->precision;
  make_inputs(*transformer.second, *update.second);
  make_loop(*transformer.second, update);
  bind_prepare();
  noise_values_.resize(noise_count());
  latent_values_.resize(latent_count());
}

Session::~Session() {
  try {
    graphs_->runtime().synchronize(stream_);
  } catch (...) {  // nothing to tell it to
  }
}

std::shared_ptr<Graph> Session::load(const std::string& name, const Component& component) {
  loaded_.push_back(graphs_->load(name, component));
  return loaded_.back();
}

Shape Session::with_batch(const Shape& sample) const {
  Shape shape = {batch_};
  shape.insert(shape.end(), sample.begin(), sample.end());
  return shape;
}

void Session::make_inputs(const Component& transformer, const Component& update) {
  Tensors records = graphs_->bundle().exported().component("prepare").inputs;
  for (const auto& [name, record] : transformer.inputs) {
    records.insert_or_assign(name, record);
  }
  for (const auto& [name, record] : update.inputs) {
    if (record.role == Role::guidance_scale) {
      records.insert_or_assign(name, record);
    }
  }
  for (const auto& [name, record] : records) {
    if (is_made_by_loop(record.role)) {
      continue;
    }
    const TensorPtr tensor = memory_.zeros(record.resolved(sizes_), record.dtype);
    inputs_[name] = tensor;
    if (is_conditioning(record.role)) {
      conditioning_[name] = tensor;
      missing_.insert(name);
    } else if (record.role == Role::noise) {
      noise_ = tensor;
    } else if (record.role == Role::guidance_scale) {
      const auto scale = static_cast<float>(chosen_.guidance_scale.value_or(0));
      const std::vector<float> scales(elements_of(tensor->shape()), scale);
      tensor->write(scales.data(), MCT_HOST, nullptr);
    }
  }
  if (!noise_ || noise_->dtype() != MCT_FLOAT32) {
    throw Error(MCT_BUNDLE_ERROR,
                "the prepare graph takes no float32 noise; build the bundle again");
  }
}

void Session::make_loop(const Component& transformer, const Named& update) {
  const Component& part = *update.second;
  Networks networks;
  for (const std::string& name : schedule().transformers()) {
    if (networks.count(name) == 0) {
      networks[name] = network_of(name, part);
    }
  }
  Bindings constants;
  for (const auto& [name, tensor] : inputs_) {
    if (transformer.inputs.count(name) != 0) {
      constants[name] = tensor;
    }
  }
  const Update move{load(update.first, part), part.history(),
                    part.outputs.count("model_input") != 0};
  loop_ = std::make_unique<DenoisingLoop>(graphs_->runtime(), memory_, networks, move, schedule(),
                                          with_batch(resolution_.latent_shape), constants);
}

Network Session::network_of(const std::string& part, const Component& update) {
  const Exported& exported = graphs_->bundle().exported();
  const auto [name, component] = graphs_->network(part);
  const Role fed = exported.guidance.is_classifier_free() ? Role::model_input : Role::latent;
  Network network{load(name, *component), component->input_named(fed),
                  component->input_named(Role::timestep), component->output_named(Role::velocity),
                  exported.timestep_scale};
  for (const auto& [input, record] : update.inputs) {
    if (record.role == Role::guidance_scale) {
      network.update_constants[input] = scale_of(part, input, record);
    }
  }
  return network;
}

// The pictures' scale, or the second stage's own.
TensorPtr Session::scale_of(const std::string& part, const std::string& name,
                            const TensorRecord& record) {
  const auto& stage = graphs_->bundle().exported().second_stage;
  if (part == transformer_names[0] || !stage || !stage->guidance_scale) {
    return inputs_.at(name);
  }
  const TensorPtr tensor = memory_.zeros(record.resolved(sizes_), record.dtype);
  const auto scale = static_cast<float>(*stage->guidance_scale);
  const std::vector<float> scales(elements_of(tensor->shape()), scale);
  tensor->write(scales.data(), MCT_HOST, nullptr);
  return tensor;
}

void Session::bind_prepare() {
  const Component& prepare = graphs_->bundle().exported().component("prepare");
  Bindings bindings;
  for (const auto& entry : prepare.inputs) {
    bindings[entry.first] = inputs_.at(entry.first);
  }
  for (const auto& [name, record] : prepare.outputs) {
    if (record.role == Role::latent) {
      bindings[name] = loop_->initial();
    } else if (record.role == Role::model_input) {
      bindings[name] = loop_->initial_input();
    } else if (inputs_.count(name) != 0) {
      bindings[name] = inputs_.at(name);
    } else {
      throw Error(MCT_BUNDLE_ERROR, "the prepare graph makes " + repr_of(name) +
                                        ", which no graph takes; build the bundle again");
    }
  }
  preparation_ = load("prepare", prepare)->bind(bindings);
}

std::size_t Session::noise_count() const { return elements_of(noise_->shape()); }

std::size_t Session::latent_count() const {
  return elements_of(with_batch(resolution_.latent_shape));
}

std::size_t Session::image_count() const {
  const Component& decoder = *graphs_->network("vae_decoder").second;
  return elements_of(decoder.outputs.at(decoder.output_named(Role::image)).resolved(sizes_));
}

void Session::check_place(const char* what, const Given& given, std::size_t expected) const {
  if (given.data == nullptr) {
    throw Error(MCT_INPUT_ERROR, std::string("expected ") + what + ", found NULL");
  }
  if (given.size_bytes != expected) {
    throw Error(MCT_INPUT_ERROR, std::string("expected ") + what + " of " +
                                     std::to_string(expected) + " bytes, found " +
                                     std::to_string(given.size_bytes) +
                                     "; ask the session for its shapes");
  }
  if (given.memory != MCT_HOST && !runtime().is_on_device()) {
    throw Error(MCT_INPUT_ERROR, "the backend " + runtime().name() +
                                     " runs on the CPU and takes no device memory, found " + what +
                                     " there; pass host memory");
  }
}

void Session::set_conditioning(const std::string& name, const Given& given) {
  const auto tensor = conditioning_.find(name);
  if (tensor == conditioning_.end()) {
    std::vector<std::string> known;
    for (const auto& entry : conditioning_) {
      known.push_back(entry.first);
    }
    throw Error(MCT_INPUT_ERROR,
                "unknown conditioning " + repr_of(name) + "; expected one of " + joined(known));
  }
  check_place(name.c_str(), given, tensor->second->size_bytes());
  tensor->second->write(given.data, given.memory, stream_);
  missing_.erase(name);
}

Session::Encoder& Session::encoder(const std::string& name) {
  const auto graphs = graphs_->bundle().exported().text_graphs();
  const auto found = graphs.find(name);
  if (found == graphs.end()) {
    std::vector<std::string> known;
    for (const auto& entry : graphs) {
      known.push_back(entry.first);
    }
    throw Error(MCT_INPUT_ERROR,
                "this bundle has no text encoder " + repr_of(name) + " that takes token ids; " +
                    (known.empty() ? "set its conditioning, which `meancache-trt encode` makes"
                                   : "expected one of " + joined(known)));
  }
  const auto bound = encoders_.find(name);
  if (bound != encoders_.end()) {
    return bound->second;
  }
  const Component& component = *found->second;
  Sizes sizes = sizes_;
  sizes["batch"] = 1;  // each prompt alone, so that it does not depend on its neighbours
  const std::string& input = component.input_named(Role::token_ids);
  Encoder encoder;
  encoder.ids = memory_.zeros(component.inputs.at(input).resolved(sizes), MCT_INT64);
  for (const auto& [output, record] : component.outputs) {
    encoder.outputs[output] = memory_.zeros(record.resolved(sizes), record.dtype);
  }
  Bindings bindings = encoder.outputs;
  bindings[input] = encoder.ids;
  encoder.graph = graphs_->load(name, component);
  encoder.call = encoder.graph->bind(bindings);
  return encoders_.emplace(name, std::move(encoder)).first->second;
}

void Session::set_token_ids(const std::string& name, const std::int64_t* ids, std::size_t count) {
  Encoder& bound = encoder(name);
  const std::size_t length = elements_of(bound.ids->shape());
  const bool is_guided = graphs_->bundle().exported().guidance.is_classifier_free();
  const auto samples = static_cast<std::size_t>(is_guided ? 2 * batch_ : batch_);
  check_place("token ids", {ids, count * sizeof(std::int64_t), MCT_HOST},
              samples * length * sizeof(std::int64_t));
  encode(bound, ids, samples);
}

void Session::encode(Encoder& encoder, const std::int64_t* ids, std::size_t samples) {
  std::map<std::string, std::vector<char>> made;
  const std::size_t length = elements_of(encoder.ids->shape());
  for (std::size_t sample = 0; sample < samples; ++sample) {
    encoder.ids->write(ids + sample * length, MCT_HOST, stream_);
    encoder.call->enqueue(stream_);
    for (const auto& [name, tensor] : encoder.outputs) {
      std::vector<char>& bytes = made[name];
      bytes.resize(samples * tensor->size_bytes());
      tensor->read(bytes.data() + sample * tensor->size_bytes(), MCT_HOST, stream_);
    }
  }
  for (const auto& [name, bytes] : made) {
    if (conditioning_.count(name) != 0) {
      set_conditioning(name, {bytes.data(), bytes.size(), MCT_HOST});
    }
  }
}

void Session::set_noise(const Given& noise) {
  check_place("noise", noise, noise_->size_bytes());
  noise_->write(noise.data, noise.memory, stream_);
}

void Session::set_seeds(const std::uint64_t* seeds, std::size_t count) {
  if (count != static_cast<std::size_t>(batch_)) {
    throw Error(MCT_INPUT_ERROR, "a batch of " + text_of(batch_) + " needs as many seeds, found " +
                                     std::to_string(count));
  }
  const std::size_t sample = noise_values_.size() / count;
  for (std::size_t k = 0; k < count; ++k) {
    philox_normal(seeds[k], noise_values_.data() + k * sample, sample);
  }
  noise_->write(noise_values_.data(), MCT_HOST, stream_);
}

bool Session::run(const OnEvaluation& on_evaluation) {
  if (!missing_.empty()) {
    throw Error(MCT_RENDER_ERROR, "the conditioning lacks " + repr_of(*missing_.begin()) +
                                      "; encode prompts with this bundle and set all of it");
  }
  has_latent_ = false;
  preparation_->enqueue(stream_);
  if (!loop_->run(stream_, on_evaluation)) {
    return false;
  }
  has_latent_ = true;
  return true;
}

void Session::wait() {
  if (!has_latent_) {
    throw Error(MCT_RENDER_ERROR, "there is no final latent; run the session first");
  }
  loop_->final_latent()->read(latent_values_.data(), MCT_HOST, stream_);
  const auto is_finite = [](float value) { return std::isfinite(value); };
  if (!std::all_of(latent_values_.begin(), latent_values_.end(), is_finite)) {
    has_latent_ = false;
    throw Error(MCT_RENDER_ERROR,
                "the latent is not finite after the last evaluation, so no picture was made; the "
                "network overflowed or its weights are damaged. Check the bundle with "
                "`meancache-trt inspect --verify`, and the prompt and guidance scale");
  }
}

void Session::read_latent(float* latent, std::size_t count, mct_memory memory) {
  if (!has_latent_) {
    throw Error(MCT_RENDER_ERROR, "there is no final latent; run the session first");
  }
  check_place("memory for the latent", {latent, count * sizeof(float), memory},
              latent_count() * sizeof(float));
  loop_->final_latent()->read(latent, memory, stream_);
}

void Session::write_latent(const Given& latent) {
  check_place("a latent", latent, latent_count() * sizeof(float));
  loop_->final_latent()->write(latent.data, latent.memory, stream_);
  has_latent_ = true;
}

const Array& Session::decode(bool is_space_tiled) {
  if (!has_latent_) {
    throw Error(MCT_RENDER_ERROR, "there is no final latent; run the session first");
  }
  std::unique_ptr<Decoder>& decoder = decoders_[is_space_tiled];
  if (!decoder) {
    const std::vector<Level> tiles = levels(graphs_->bundle().exported().tiling, is_space_tiled);
    const auto [name, component] = graphs_->network("vae_decoder");
    const TensorRecord& image = component->outputs.at(component->output_named(Role::image));
    decoder =
        std::make_unique<Decoder>(graphs_->runtime(), load(name, *component), *component,
                                  loop_->final_latent()->view(with_batch(resolution_.decode_shape)),
                                  image.resolved(sizes_), tiles);
  }
  return decoder->run(stream_);
}

}  // namespace mct
