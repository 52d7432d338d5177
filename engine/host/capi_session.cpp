// The session part of the C functions; meancache_trt.h has their contracts.

#include <cmath>

#include "capi.hpp"
#include "session.hpp"

struct mct_session {
  std::shared_ptr<mct::SharedBundle> bundle;
  std::string backend;
  std::string backend_version;
  mct::Session session;
};

namespace mct {

namespace {

SessionRequest request_of(const mct_session_options& given) {
  SessionRequest request;
  if (given.schedule != nullptr) {
    request.schedule = given.schedule;
  }
  if (given.has_guidance_scale != 0) {
    request.guidance_scale = given.guidance_scale;
  }
  request.height = given.height;
  request.width = given.width;
  request.frames = given.frames;
  request.batch = given.batch == 0 ? 1 : given.batch;
  request.text_tokens = given.text_tokens;
  return request;
}

mct_session_info info_of(const mct_session& handle) {
  const Session& session = handle.session;
  mct_session_info info{};
  info.backend = handle.backend.c_str();
  info.backend_version = handle.backend_version.c_str();
  info.schedule = session.schedule().name.c_str();
  info.precision = session.precision().c_str();
  info.budget = session.schedule().budget();
  info.batch = session.batch();
  info.height = session.resolution().height;
  info.width = session.resolution().width;
  info.frames = session.resolution().frames.value_or(0);
  info.has_guidance_scale = session.guidance_scale() ? 1 : 0;
  info.guidance_scale = session.guidance_scale().value_or(0);
  info.conditioning_count = session.conditioning().size();
  info.noise_count = session.noise_count();
  info.latent_count = session.latent_count();
  info.image_count = session.image_count();
  info.tensor_bytes = session.tensor_bytes();
  return info;
}

// Set where a run begins and start it; false where it was cancelled.
bool start(Session& session, const mct_run_options& given) {
  if ((given.seeds == nullptr) == (given.noise == nullptr)) {
    throw Error(MCT_INPUT_ERROR, "a run begins from seeds or from noise: give one of the two");
  }
  if (given.stream != nullptr && !session.runtime().is_on_device()) {
    throw Error(MCT_INPUT_ERROR, "the backend " + session.runtime().name() +
                                     " runs on the CPU and has no streams; leave stream NULL");
  }
  session.set_stream(given.stream);
  if (given.seeds != nullptr) {
    session.set_seeds(given.seeds, given.seed_count);
  } else {
    session.set_noise({given.noise, given.noise_count * sizeof(float), given.noise_memory});
  }
  OnEvaluation on_evaluation;
  if (given.on_evaluation != nullptr) {
    on_evaluation = [&given](std::int64_t done, std::int64_t budget) {
      return given.on_evaluation(given.user_data, done, budget) == 0;
    };
  }
  return session.run(on_evaluation);
}

// The images with channels last and clipped, each value handed to `put` by its place.
template <class Put>
void for_each_pixel(const Array& images, Put put) {
  const auto batch = static_cast<std::size_t>(images.shape[0]);
  const auto channels = static_cast<std::size_t>(images.shape[1]);
  const std::size_t pixels = images.values.size() / (batch * channels);
  for (std::size_t sample = 0; sample < batch; ++sample) {
    for (std::size_t channel = 0; channel < channels; ++channel) {
      const float* plane = images.values.data() + (sample * channels + channel) * pixels;
      for (std::size_t k = 0; k < pixels; ++k) {
        const float value = std::min(std::max(plane[k], 0.0f), 1.0f);
        put((sample * pixels + k) * channels + channel, value);
      }
    }
  }
}

void check_count(const char* what, std::size_t found, std::size_t expected) {
  if (found != expected) {
    throw Error(MCT_INPUT_ERROR, std::string("expected memory for ") + std::to_string(expected) +
                                     " " + what + ", found " + std::to_string(found));
  }
}

void decode(Session& session, const mct_decode_options& given) {
  if (given.pixels == nullptr && given.rgb == nullptr) {
    throw Error(MCT_INPUT_ERROR, "expected memory for pixels or rgb, found neither");
  }
  if (given.pixels != nullptr) {
    check_count("pixels", given.pixels_count, session.image_count());
  }
  if (given.rgb != nullptr) {
    check_count("bytes of rgb", given.rgb_count, session.image_count());
  }
  if (given.latent != nullptr) {
    session.write_latent({given.latent, given.latent_count * sizeof(float), given.latent_memory});
  }
  const Array& images = session.decode(given.vae_tiling != 0);
  if (float* pixels = given.pixels) {
    for_each_pixel(images, [pixels](std::size_t place, float value) { pixels[place] = value; });
  }
  if (std::uint8_t* rgb = given.rgb) {
    for_each_pixel(images, [rgb](std::size_t place, float value) {
      // To the nearest, ties to even, as NumPy rounds; NaN becomes 0.
      rgb[place] = value > 0 ? static_cast<std::uint8_t>(std::nearbyint(value * 255)) : 0;
    });
  }
}

}  // namespace

}  // namespace mct

using namespace mct;

mct_status mct_session_create(mct_bundle* bundle, const mct_session_options* options,
                              mct_session** session) {
  return guarded([&] {
    expect(session, "a place for the session");
    *session = nullptr;
    expect(bundle, "a bundle");
    const mct_session_options given = taken(options, "mct_session_options");
    RuntimeOptions running;
    running.threads = given.threads;
    running.device = given.device;
    running.concurrency = given.concurrency == 0 ? 1 : given.concurrency;
    const std::string backend = given.backend == nullptr ? "" : given.backend;
    std::shared_ptr<Graphs> graphs = bundle->shared->graphs(backend, running);
    const Runtime& runtime = graphs->runtime();
    *session = new mct_session{
        bundle->shared, runtime.name(), runtime.version(), {graphs, request_of(given)}};
    return MCT_OK;
  });
}

void mct_session_destroy(mct_session* session) { delete session; }

mct_status mct_session_get_info(const mct_session* session, mct_session_info* info) {
  return guarded([&] {
    expect(session, "a session");
    give(info_of(*session), info, "mct_session_info");
    return MCT_OK;
  });
}

mct_status mct_session_get_conditioning(const mct_session* session, size_t index,
                                        mct_tensor* tensor) {
  return guarded([&] {
    expect(session, "a session");
    const Bindings& tensors = session->session.conditioning();
    if (index >= tensors.size()) {
      throw Error(MCT_INPUT_ERROR, "there are " + std::to_string(tensors.size()) +
                                       " tensors of conditioning, found index " +
                                       std::to_string(index));
    }
    const auto found = std::next(tensors.begin(), static_cast<std::ptrdiff_t>(index));
    give(described(found->first, found->second->shape(), found->second->dtype()), tensor,
         "mct_tensor");
    return MCT_OK;
  });
}

mct_status mct_session_set_conditioning(mct_session* session, const char* name, const void* data,
                                        size_t size_bytes, mct_memory memory) {
  return guarded([&] {
    expect(session, "a session");
    expect(name, "the name of a tensor");
    session->session.set_conditioning(name, {data, size_bytes, memory});
    return MCT_OK;
  });
}

mct_status mct_session_set_token_ids(mct_session* session, const char* encoder, const int64_t* ids,
                                     size_t ids_count) {
  return guarded([&] {
    expect(session, "a session");
    expect(encoder, "the name of a text encoder");
    session->session.set_token_ids(encoder, ids, ids_count);
    return MCT_OK;
  });
}

mct_status mct_session_release_encoders(mct_session* session) {
  return guarded([&] {
    expect(session, "a session");
    session->session.release_encoders();
    return MCT_OK;
  });
}

mct_status mct_session_run(mct_session* session, const mct_run_options* options) {
  return guarded([&] {
    expect(session, "a session");
    const mct_run_options given = taken(options, "mct_run_options");
    if (!start(session->session, given)) {
      remember("the callback cancelled the run");
      return MCT_CANCELLED;
    }
    session->session.wait();
    return MCT_OK;
  });
}

mct_status mct_session_enqueue(mct_session* session, const mct_run_options* options) {
  return guarded([&] {
    expect(session, "a session");
    const mct_run_options given = taken(options, "mct_run_options");
    if (given.on_evaluation != nullptr) {
      throw Error(MCT_INPUT_ERROR,
                  "a run with a callback waits for each evaluation; use mct_session_run");
    }
    start(session->session, given);
    return MCT_OK;
  });
}

mct_status mct_session_wait(mct_session* session) {
  return guarded([&] {
    expect(session, "a session");
    session->session.wait();
    return MCT_OK;
  });
}

mct_status mct_session_read_latent(mct_session* session, float* latent, size_t latent_count,
                                   mct_memory memory) {
  return guarded([&] {
    expect(session, "a session");
    session->session.read_latent(latent, latent_count, memory);
    return MCT_OK;
  });
}

mct_status mct_session_decode(mct_session* session, const mct_decode_options* options) {
  return guarded([&] {
    expect(session, "a session");
    decode(session->session, taken(options, "mct_decode_options"));
    return MCT_OK;
  });
}
