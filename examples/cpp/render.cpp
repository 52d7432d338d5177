// Render the prompts of an embeddings file, or of a file of token ids, to PNG files.
//
// usage: render BUNDLE PROMPTS OUTPUT [--schedule NAME] [--seed N] [--negative EMBEDDINGS]
//               [--guidance-scale X] [--threads N] [--vae-tiling]
//
// PROMPTS is what `meancache-trt encode` wrote (.safetensors) or, for a bundle with text encoders,
// a text file with a line for each encoder: its name and the ids of one prompt. OUTPUT is the PNG
// of one picture; of several prompts, or frames, it gets a number before its suffix.

#include <algorithm>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "meancache_trt.hpp"
#include "png_file.hpp"
#include "safetensors_file.hpp"

namespace {

using Embeddings = std::map<std::string, StoredTensor>;

struct Request {
  std::string bundle;
  std::string prompts;
  std::string output;
  std::string negative;
  std::uint64_t seed = 0;
  bool vae_tiling = false;
  meancache_trt::SessionOptions session;
};

bool parse(int count, char** arguments, Request& request) {
  if (count < 4) {
    return false;
  }
  request.bundle = arguments[1];
  request.prompts = arguments[2];
  request.output = arguments[3];
  for (int k = 4; k < count; ++k) {
    const std::string option = arguments[k];
    if (option == "--vae-tiling") {
      request.vae_tiling = true;
      continue;
    }
    if (++k == count) {
      return false;
    }
    const std::string value = arguments[k];
    if (option == "--schedule") {
      request.session.schedule = value;
    } else if (option == "--seed") {
      request.seed = std::stoull(value);
    } else if (option == "--negative") {
      request.negative = value;
    } else if (option == "--guidance-scale") {
      request.session.guidance_scale = std::stod(value);
    } else if (option == "--threads") {
      request.session.threads = std::stoi(value);
    } else {
      return false;
    }
  }
  return true;
}

std::size_t prompts_of(const Embeddings& embeddings) {
  if (embeddings.empty() || embeddings.begin()->second.shape.empty()) {
    throw std::runtime_error("the embeddings hold no prompt");
  }
  return static_cast<std::size_t>(embeddings.begin()->second.shape[0]);
}

// The bytes of one prompt.
std::vector<char> row(const StoredTensor& tensor, std::size_t index, std::size_t count) {
  const std::size_t size = tensor.bytes.size() / count;
  const auto begin = tensor.bytes.begin() + static_cast<std::ptrdiff_t>(index * size);
  return {begin, begin + static_cast<std::ptrdiff_t>(size)};
}

// Prompt `index`, and behind it the negative prompt where the model takes one.
void set_embeddings(meancache_trt::Session& session, const Embeddings& positive,
                    const Embeddings& negative, std::size_t index) {
  for (const auto& [name, tensor] : positive) {
    std::vector<char> bytes = row(tensor, index, prompts_of(positive));
    if (!negative.empty()) {
      const std::vector<char> further = row(negative.at(name), 0, prompts_of(negative));
      bytes.insert(bytes.end(), further.begin(), further.end());
    }
    session.set_conditioning(name, bytes.data(), bytes.size());
  }
}

void set_token_ids(meancache_trt::Session& session, const std::string& path) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string encoder;
    std::vector<std::int64_t> ids;
    words >> encoder;
    for (std::int64_t id = 0; words >> id;) {
      ids.push_back(id);
    }
    session.set_token_ids(encoder, ids);
  }
}

// "out.png" and 3 -> "out-3.png".
std::string numbered(const std::string& path, std::size_t number) {
  const std::size_t dot = path.rfind('.');
  return path.substr(0, dot) + "-" + std::to_string(number) + path.substr(dot);
}

void save(const std::vector<std::uint8_t>& rgb, const meancache_trt::Session& session,
          const std::string& output, bool is_one_of_several, std::size_t first) {
  const mct_session_info info = session.info();
  const auto frames = static_cast<std::size_t>(info.frames == 0 ? 1 : info.frames);
  const std::size_t size = rgb.size() / frames;
  for (std::size_t frame = 0; frame < frames; ++frame) {
    const bool has_number = is_one_of_several || frames > 1;
    const std::string path = has_number ? numbered(output, first + frame) : output;
    write_png(path, rgb.data() + frame * size, static_cast<std::uint32_t>(info.width),
              static_cast<std::uint32_t>(info.height));
    std::cout << path << '\n';
  }
}

bool show(std::int64_t done, std::int64_t budget) {
  std::cerr << "\r" << done << "/" << budget << (done == budget ? "\n" : "") << std::flush;
  return true;
}

void render(const Request& request) {
  const meancache_trt::Bundle bundle(request.bundle);
  meancache_trt::Session session(bundle, request.session);
  const std::string suffix = ".safetensors";
  const bool is_embeddings =
      request.prompts.size() > suffix.size() &&
      request.prompts.compare(request.prompts.size() - suffix.size(), suffix.size(), suffix) == 0;
  if (!is_embeddings) {
    set_token_ids(session, request.prompts);
    session.release_encoders();
    session.run_seeds({request.seed}, show);
    save(session.decode_rgb(request.vae_tiling), session, request.output, false, 0);
    return;
  }
  const Embeddings positive = read_safetensors(request.prompts);
  const Embeddings negative =
      request.negative.empty() ? Embeddings() : read_safetensors(request.negative);
  const std::size_t count = prompts_of(positive);
  for (std::size_t index = 0; index < count; ++index) {
    set_embeddings(session, positive, negative, index);
    session.run_seeds({request.seed}, show);
    const auto frames = static_cast<std::size_t>(std::max<std::int64_t>(session.info().frames, 1));
    save(session.decode_rgb(request.vae_tiling), session, request.output, count > 1,
         index * frames);
  }
}

}  // namespace

int main(int count, char** arguments) {
  Request request;
  try {
    if (!parse(count, arguments, request)) {
      std::cerr << "usage: render BUNDLE PROMPTS OUTPUT [--schedule NAME] [--seed N]\n"
                   "              [--negative EMBEDDINGS] [--guidance-scale X] [--threads N]\n"
                   "              [--vae-tiling]\n";
      return 2;
    }
    render(request);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
