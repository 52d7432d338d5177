// A bundle made ready to render one schedule at one size and batch, the mirror of
// src/meancache_trt/session.py:
//
//     noise, conditioning ── prepare ──▶ latent, position tables
//     latent ── loop: B x (transformer or transformer_2, update) ──▶ latent
//     latent ── vae_decoder ──▶ pictures

#ifndef MEANCACHE_TRT_HOST_SESSION_HPP
#define MEANCACHE_TRT_HOST_SESSION_HPP

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "decoder.hpp"
#include "graphs.hpp"
#include "loop.hpp"
#include "selection.hpp"

namespace mct {

struct SessionRequest {
  std::optional<std::string> schedule;
  std::optional<double> guidance_scale;
  std::int64_t height = 0;  // 0: see find_resolution
  std::int64_t width = 0;
  std::int64_t frames = 0;
  std::int64_t batch = 1;
  std::int64_t text_tokens = 0;  // 0: the bundle's
};

// Memory of the caller.
struct Given {
  const void* data;
  std::size_t size_bytes;
  mct_memory memory;
};

class Session {
 public:
  Session(std::shared_ptr<Graphs> graphs, const SessionRequest& request);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const Schedule& schedule() const { return chosen_.schedule; }
  std::optional<double> guidance_scale() const { return chosen_.guidance_scale; }
  const Resolution& resolution() const { return resolution_; }
  std::int64_t batch() const { return batch_; }
  const Runtime& runtime() const { return graphs_->runtime(); }
  const std::string& precision() const { return precision_; }
  std::size_t tensor_bytes() const { return memory_.size_bytes(); }
  // Tensors of conditioning by name.
  const Bindings& conditioning() const { return conditioning_; }
  std::size_t noise_count() const;
  std::size_t latent_count() const;
  std::size_t image_count() const;

  void set_conditioning(const std::string& name, const Given& given);
  void set_token_ids(const std::string& encoder, const std::int64_t* ids, std::size_t count);
  void release_encoders() { encoders_.clear(); }

  // What all further work and copies are put on; null is the backend's own.
  void set_stream(Stream stream) { stream_ = stream; }
  void set_noise(const Given& noise);
  void set_seeds(const std::uint64_t* seeds, std::size_t count);
  // From what was set to the final latent; returns false where the callback asked to stop.
  bool run(const OnEvaluation& on_evaluation);
  // Wait for the last run and check its result.
  void wait();
  void read_latent(float* latent, std::size_t count, mct_memory memory);
  void write_latent(const Given& latent);
  // Images in the decoder's layout, (B, 3, …), not clipped.
  const Array& decode(bool is_space_tiled);

 private:
  struct Encoder {
    std::shared_ptr<Graph> graph;
    TensorPtr ids;
    Bindings outputs;
    CallPtr call;
  };
  using Named = std::pair<std::string, const Component*>;

  // A graph, which lives as long as this session, so that others share it.
  std::shared_ptr<Graph> load(const std::string& name, const Component& component);
  Shape with_batch(const Shape& sample) const;
  void make_inputs(const Component& transformer, const Component& update);
  void make_loop(const Component& transformer, const Named& update);
  Network network_of(const std::string& part, const Component& update);
  TensorPtr scale_of(const std::string& part, const std::string& name, const TensorRecord& record);
  void bind_prepare();
  void check_place(const char* what, const Given& given, std::size_t expected) const;
  Encoder& encoder(const std::string& name);
  void encode(Encoder& encoder, const std::int64_t* ids, std::size_t samples);

  std::shared_ptr<Graphs> graphs_;
  std::vector<std::shared_ptr<Graph>> loaded_;
  Resolution resolution_;
  ChosenSchedule chosen_;
  std::int64_t batch_;
  Sizes sizes_;
  std::string precision_;
  Memory memory_;
  TensorPtr noise_;
  Bindings inputs_;        // of prepare, transformer and update; what the loop makes is not here
  Bindings conditioning_;  // those of them that the caller sets
  std::set<std::string> missing_;
  std::vector<float> noise_values_;   // host memory for seeds
  std::vector<float> latent_values_;  // host memory for the check of a result
  std::unique_ptr<DenoisingLoop> loop_;
  CallPtr preparation_;
  std::map<bool, std::unique_ptr<Decoder>> decoders_;
  std::map<std::string, Encoder> encoders_;
  Stream stream_ = nullptr;
  bool has_latent_ = false;
};

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_SESSION_HPP
