// The denoising loop, the mirror of meancache/loop.py: B times (network, update), with every
// address fixed beforehand.
//
//     v_n = network(x, timestep_n, conditioning)
//     x   = x + Σ_j weights[n][j] · v_{n−j}
//
// A model of two transformers has both in one loop: each node is bound to the network that its
// schedule row names, and latent and history go on across the boundary.
//
// The latent ping-pongs between two tensors. The velocity of node n goes to slot n mod H of H
// rotating tensors, and the update of each node is bound to the slots in order of age, so that no
// history is ever copied. Where a row reads less history, a tensor of zeros is bound that nothing
// writes: NaN left by a failed image cannot reach the next one through a zero weight.

#ifndef MEANCACHE_TRT_HOST_LOOP_HPP
#define MEANCACHE_TRT_HOST_LOOP_HPP

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend.hpp"
#include "schedule.hpp"

namespace mct {

// Makes tensors on a runtime and counts their bytes.
class Memory {
 public:
  explicit Memory(Runtime& runtime) : runtime_(runtime) {}
  TensorPtr zeros(const Shape& shape, mct_dtype dtype);
  TensorPtr of(const std::vector<float>& values);
  std::size_t size_bytes() const { return size_bytes_; }

 private:
  Runtime& runtime_;
  std::size_t size_bytes_ = 0;
};

// A transformer graph and the names of what the loop itself feeds and reads. The network is fed
// timestep_scale times the scheduler's timestep, multiplied in double and rounded to float.
// `update_constants` are tensors for the inputs of the update behind it that the loop does not
// make.
struct Network {
  std::shared_ptr<Graph> graph;
  std::string latent;
  std::string timestep;
  std::string output;
  double timestep_scale = 1;
  Bindings update_constants = {};
};

using Networks = std::map<std::string, Network>;  // those of Schedule::transformers()

// An update graph; `history` is how many velocities it holds.
struct Update {
  std::shared_ptr<Graph> graph;
  std::size_t history = 1;
  bool gives_model_input = false;  // the latent twice, for classifier-free guidance
};

// (evaluations done, B) -> whether to go on.
using OnEvaluation = std::function<bool(std::int64_t, std::int64_t)>;

class DenoisingLoop {
 public:
  // `constants` are tensors for the inputs of the networks that the loop does not make.
  DenoisingLoop(Runtime& runtime, Memory& memory, const Networks& networks, const Update& update,
                const Schedule& schedule, const Shape& latent_shape, const Bindings& constants);

  // Where the loop starts from; the run overwrites it.
  const TensorPtr& initial() const { return latents_[0]; }
  // What the first evaluation reads: `initial`, or a tensor with it twice.
  const TensorPtr& initial_input() const { return initial_input_; }
  // Where the result is after a run.
  const TensorPtr& final_latent() const { return latents_[budget() % 2]; }
  std::size_t budget() const { return evaluations_.size(); }

  // Integrate. Without a callback nothing waits. With one, each evaluation is waited for, and false
  // is returned where it asked to stop.
  bool run(Stream stream, const OnEvaluation& on_evaluation);

 private:
  CallPtr evaluation(const Network& network, const Bindings& constants, double timestep,
                     const TensorPtr& latent, const TensorPtr& output);

  Runtime& runtime_;
  Memory& memory_;
  std::vector<TensorPtr> latents_;
  TensorPtr initial_input_;
  std::vector<CallPtr> evaluations_;
  CallPtr all_;
};

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_LOOP_HPP
