// C++17 over meancache_trt.h: handles that free themselves, and statuses that become exceptions.
//
//   const meancache_trt::Bundle bundle("flux.mcb");
//   meancache_trt::SessionOptions options;
//   options.schedule = "b10";
//   meancache_trt::Session session(bundle, options);
//   session.set_conditioning("encoder_hidden_states", values);
//   session.run_seeds({7});
//   const std::vector<std::uint8_t> rgb = session.decode_rgb();
//
// Header only: exceptions are thrown by code of the program that includes it, and none crosses the
// library's boundary. Contracts (shapes, threads, ownership) are those of meancache_trt.h.

#ifndef MEANCACHE_TRT_HPP
#define MEANCACHE_TRT_HPP

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "meancache_trt.h"

namespace meancache_trt {

// What the library reports; `status` says of which kind.
class Error : public std::runtime_error {
 public:
  Error(mct_status status, const std::string& what) : std::runtime_error(what), status_(status) {}
  mct_status status() const noexcept { return status_; }

 private:
  mct_status status_;
};

inline void check(mct_status status) {
  if (status != MCT_OK) {
    throw Error(status, mct_last_error());
  }
}

// A structure of the library that states its own size, else zero.
template <class Struct>
Struct sized() {
  Struct value{};
  value.struct_size = sizeof(Struct);
  return value;
}

inline std::string version() { return mct_version(); }
inline std::string backends() { return mct_backends(); }

// Name, element type and shape.
struct Tensor {
  std::string name;
  mct_dtype dtype = MCT_FLOAT32;
  std::vector<std::int64_t> shape;
  std::size_t size_bytes = 0;

  explicit Tensor(const mct_tensor& tensor)
      : name(tensor.name),
        dtype(tensor.dtype),
        shape(tensor.shape, tensor.shape + tensor.rank),
        size_bytes(tensor.size_bytes) {}
};

// An opened bundle; may be shared by threads.
class Bundle {
 public:
  explicit Bundle(const std::string& path, bool is_full_check = false) {
    auto options = sized<mct_bundle_options>();
    options.path = path.c_str();
    options.is_full_check = is_full_check ? 1 : 0;
    mct_bundle* bundle = nullptr;
    check(mct_bundle_open(&options, &bundle));
    handle_.reset(bundle);
  }

  mct_bundle* get() const noexcept { return handle_.get(); }

  mct_bundle_info info() const {
    auto info = sized<mct_bundle_info>();
    check(mct_bundle_get_info(get(), &info));
    return info;
  }
  mct_resolution resolution(std::size_t index = 0) const {
    auto resolution = sized<mct_resolution>();
    check(mct_bundle_get_resolution(get(), index, &resolution));
    return resolution;
  }
  mct_schedule schedule(std::size_t index) const {
    auto schedule = sized<mct_schedule>();
    check(mct_bundle_get_schedule(get(), index, &schedule));
    return schedule;
  }
  // Conditioning of one prompt.
  std::vector<Tensor> conditioning() const {
    return tensors(info().conditioning_count, mct_bundle_get_conditioning);
  }
  // Token ids of one prompt, by text encoder.
  std::vector<Tensor> text_encoders() const {
    return tensors(info().text_encoder_count, mct_bundle_get_text_encoder);
  }

 private:
  struct Destroy {
    void operator()(mct_bundle* bundle) const noexcept { mct_bundle_destroy(bundle); }
  };

  template <class Get>
  std::vector<Tensor> tensors(std::size_t count, Get get_tensor) const {
    std::vector<Tensor> found;
    for (std::size_t index = 0; index < count; ++index) {
      auto tensor = sized<mct_tensor>();
      check(get_tensor(handle_.get(), index, &tensor));
      found.emplace_back(tensor);
    }
    return found;
  }

  std::unique_ptr<mct_bundle, Destroy> handle_;
};

// As mct_session_options; what is empty or 0 is left to the library.
struct SessionOptions {
  std::string schedule;
  std::string backend;
  std::int64_t height = 0;
  std::int64_t width = 0;
  std::int64_t frames = 0;
  std::int64_t batch = 1;
  std::int64_t text_tokens = 0;
  std::optional<double> guidance_scale;
  int threads = 0;
  int device = 0;
  int concurrency = 1;
};

// (evaluations done, B) -> whether to go on. An exception cancels, and is thrown again by run.
using OnEvaluation = std::function<bool(std::int64_t done, std::int64_t budget)>;

// One schedule at one size and batch; one thread at a time.
class Session {
 public:
  Session(const Bundle& bundle, const SessionOptions& options) {
    auto given = sized<mct_session_options>();
    given.schedule = options.schedule.empty() ? nullptr : options.schedule.c_str();
    given.backend = options.backend.empty() ? nullptr : options.backend.c_str();
    given.height = options.height;
    given.width = options.width;
    given.frames = options.frames;
    given.batch = options.batch;
    given.text_tokens = options.text_tokens;
    given.has_guidance_scale = options.guidance_scale ? 1 : 0;
    given.guidance_scale = options.guidance_scale.value_or(0);
    given.threads = options.threads;
    given.device = options.device;
    given.concurrency = options.concurrency;
    mct_session* session = nullptr;
    check(mct_session_create(bundle.get(), &given, &session));
    handle_.reset(session);
  }

  mct_session* get() const noexcept { return handle_.get(); }

  mct_session_info info() const {
    auto info = sized<mct_session_info>();
    check(mct_session_get_info(get(), &info));
    return info;
  }
  // Conditioning with its batch.
  std::vector<Tensor> conditioning() const {
    std::vector<Tensor> found;
    for (std::size_t index = 0; index < info().conditioning_count; ++index) {
      auto tensor = sized<mct_tensor>();
      check(mct_session_get_conditioning(get(), index, &tensor));
      found.emplace_back(tensor);
    }
    return found;
  }

  void set_conditioning(const std::string& name, const void* data, std::size_t size_bytes,
                        mct_memory memory = MCT_HOST) {
    check(mct_session_set_conditioning(get(), name.c_str(), data, size_bytes, memory));
  }
  void set_conditioning(const std::string& name, const std::vector<float>& values) {
    set_conditioning(name, values.data(), values.size() * sizeof(float));
  }
  void set_token_ids(const std::string& encoder, const std::vector<std::int64_t>& ids) {
    check(mct_session_set_token_ids(get(), encoder.c_str(), ids.data(), ids.size()));
  }
  void release_encoders() { check(mct_session_release_encoders(get())); }

  // Render from one seed a sample; returns false where the callback asked to stop.
  bool run_seeds(const std::vector<std::uint64_t>& seeds, const OnEvaluation& on_evaluation = {}) {
    auto options = sized<mct_run_options>();
    options.seeds = seeds.data();
    options.seed_count = seeds.size();
    return run(options, on_evaluation);
  }
  // Render from noise, (batch, noise_shape).
  bool run_noise(const std::vector<float>& noise, const OnEvaluation& on_evaluation = {}) {
    auto options = sized<mct_run_options>();
    options.noise = noise.data();
    options.noise_count = noise.size();
    return run(options, on_evaluation);
  }
  // As options say; their callback and user data are replaced where `on_evaluation` is given.
  bool run(mct_run_options options, const OnEvaluation& on_evaluation = {}) {
    Callback callback{on_evaluation, nullptr};
    if (on_evaluation) {
      options.on_evaluation = &Callback::call;
      options.user_data = &callback;
    }
    const mct_status status = mct_session_run(get(), &options);
    if (callback.error) {
      std::rethrow_exception(callback.error);
    }
    if (status != MCT_CANCELLED) {
      check(status);
    }
    return status == MCT_OK;
  }
  void enqueue(const mct_run_options& options) { check(mct_session_enqueue(get(), &options)); }
  void wait() { check(mct_session_wait(get())); }

  std::vector<float> latent() const {
    std::vector<float> values(info().latent_count);
    check(mct_session_read_latent(get(), values.data(), values.size(), MCT_HOST));
    return values;
  }
  // 8-bit RGB, (batch, image_shape), of the final latent.
  std::vector<std::uint8_t> decode_rgb(bool vae_tiling = false) {
    std::vector<std::uint8_t> rgb(info().image_count);
    auto options = sized<mct_decode_options>();
    options.rgb = rgb.data();
    options.rgb_count = rgb.size();
    options.vae_tiling = vae_tiling ? 1 : 0;
    check(mct_session_decode(get(), &options));
    return rgb;
  }
  // The same as values in [0, 1].
  std::vector<float> decode(bool vae_tiling = false) {
    std::vector<float> pixels(info().image_count);
    auto options = sized<mct_decode_options>();
    options.pixels = pixels.data();
    options.pixels_count = pixels.size();
    options.vae_tiling = vae_tiling ? 1 : 0;
    check(mct_session_decode(get(), &options));
    return pixels;
  }

 private:
  struct Destroy {
    void operator()(mct_session* session) const noexcept { mct_session_destroy(session); }
  };

  // Keeps an exception from crossing the library.
  struct Callback {
    const OnEvaluation& on_evaluation;
    std::exception_ptr error;

    static int call(void* user_data, std::int64_t done, std::int64_t budget) noexcept {
      auto* self = static_cast<Callback*>(user_data);
      try {
        return self->on_evaluation(done, budget) ? 0 : 1;
      } catch (...) {
        self->error = std::current_exception();
        return 1;
      }
    }
  };

  std::unique_ptr<mct_session, Destroy> handle_;
};

}  // namespace meancache_trt

#endif  // MEANCACHE_TRT_HPP
