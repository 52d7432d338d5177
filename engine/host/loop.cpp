#include "loop.hpp"

namespace mct {

namespace {

std::vector<TensorPtr> several(Memory& memory, std::size_t count, const Shape& shape) {
  std::vector<TensorPtr> tensors;
  for (std::size_t k = 0; k < count; ++k) {
    tensors.push_back(memory.zeros(shape, MCT_FLOAT32));
  }
  return tensors;
}

Shape twice(Shape shape) {
  shape[0] *= 2;
  return shape;
}

}  // namespace

TensorPtr Memory::zeros(const Shape& shape, mct_dtype dtype) {
  TensorPtr tensor = runtime_.zeros(shape, dtype);
  size_bytes_ += tensor->size_bytes();
  return tensor;
}

TensorPtr Memory::of(const std::vector<float>& values) {
  TensorPtr tensor = zeros({static_cast<std::int64_t>(values.size())}, MCT_FLOAT32);
  tensor->write(values.data(), MCT_HOST, nullptr);
  return tensor;
}

DenoisingLoop::DenoisingLoop(Runtime& runtime, Memory& memory, const Networks& networks,
                             const Update& update, const Schedule& schedule,
                             const Shape& latent_shape, const Bindings& constants)
    : runtime_(runtime), memory_(memory), latents_(several(memory, 2, latent_shape)) {
  const Shape input_shape = update.gives_model_input ? twice(latent_shape) : latent_shape;
  initial_input_ = update.gives_model_input ? memory.zeros(input_shape, MCT_FLOAT32) : latents_[0];
  const std::vector<TensorPtr> velocities = several(memory, update.history, latent_shape);
  const TensorPtr output = memory.zeros(input_shape, MCT_FLOAT32);
  const TensorPtr zeros = memory.zeros(latent_shape, MCT_FLOAT32);
  const std::vector<float> timesteps = schedule.timesteps();
  const std::vector<std::string> parts = schedule.transformers();
  std::vector<CallPtr> calls;
  for (std::size_t node = 0; node < timesteps.size(); ++node) {
    const TensorPtr& here = latents_[node % 2];
    const Network& network = networks.at(parts[node]);
    Bindings move = network.update_constants;
    for (std::size_t age = 1; age < update.history; ++age) {
      const bool is_read = age < schedule.weights[node].size();
      move["history_" + std::to_string(age)] =
          is_read ? velocities[(node - age) % update.history] : zeros;
    }
    if (update.gives_model_input) {
      // One tensor serves all: an update writes it when the network call before has read it.
      move["model_input"] = initial_input_;
    }
    move["latent"] = here;
    move["model_output"] = output;
    move["weights"] = memory.of(schedule.row(node, update.history));
    move["next_latent"] = latents_[(node + 1) % 2];
    move["velocity"] = velocities[node % update.history];
    calls.push_back(evaluation(network, constants, timesteps[node],
                               update.gives_model_input ? initial_input_ : here, output));
    calls.push_back(update.graph->bind(move));
    evaluations_.push_back(runtime.sequence({calls.end() - 2, calls.end()}));
  }
  all_ = runtime.sequence(std::move(calls));
}

CallPtr DenoisingLoop::evaluation(const Network& network, const Bindings& constants,
                                  double timestep, const TensorPtr& latent,
                                  const TensorPtr& output) {
  const auto samples = static_cast<std::size_t>(latent->shape()[0]);
  const auto fed = static_cast<float>(timestep * network.timestep_scale);
  Bindings bindings = constants;
  bindings[network.latent] = latent;
  bindings[network.timestep] = memory_.of(std::vector<float>(samples, fed));
  bindings[network.output] = output;
  return network.graph->bind(bindings);
}

bool DenoisingLoop::run(Stream stream, const OnEvaluation& on_evaluation) {
  if (!on_evaluation) {
    all_->enqueue(stream);
    return true;
  }
  const auto count = static_cast<std::int64_t>(budget());
  for (std::int64_t done = 1; done <= count; ++done) {
    evaluations_[static_cast<std::size_t>(done - 1)]->enqueue(stream);
    runtime_.synchronize(stream);
    if (!on_evaluation(done, count)) {
      return false;
    }
  }
  return true;
}

}  // namespace mct
