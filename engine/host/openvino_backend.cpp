// OpenVINO on the CPU. Graphs are compiled for the shapes that they are bound to, once each, since
// calls with dynamic shapes take longer. Calls run in place and are done when they return.

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <openvino/openvino.hpp>

#include "backend.hpp"
#include "error.hpp"

namespace mct {

namespace {

ov::element::Type element_of(mct_dtype dtype) {
  switch (dtype) {
    case MCT_FLOAT16:
      return ov::element::f16;
    case MCT_BFLOAT16:
      return ov::element::bf16;
    case MCT_FLOAT64:
      return ov::element::f64;
    case MCT_INT32:
      return ov::element::i32;
    case MCT_INT64:
      return ov::element::i64;
    case MCT_BOOL:
      return ov::element::boolean;
    case MCT_FLOAT32:
      break;
  }
  return ov::element::f32;
}

std::shared_ptr<void> zeroed(std::size_t size) {
  constexpr std::size_t alignment = 64;  // a cache line, and the widest vector
  const std::size_t rounded = (size / alignment + 1) * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  std::memset(memory, 0, rounded);
  return {memory, &std::free};
}

class HostTensor : public Tensor {
 public:
  HostTensor(Shape shape, mct_dtype dtype, std::shared_ptr<void> memory)
      : Tensor(std::move(shape), dtype), memory_(std::move(memory)) {}

  void write(const void* source, mct_memory /*memory*/, Stream /*stream*/) override {
    std::memcpy(memory_.get(), source, size_bytes());
  }
  void read(void* target, mct_memory /*memory*/, Stream /*stream*/) const override {
    std::memcpy(target, memory_.get(), size_bytes());
  }
  TensorPtr view(Shape shape) const override {
    return std::make_shared<HostTensor>(std::move(shape), dtype(), memory_);
  }
  ov::Tensor bound() const {
    const Shape& extents = shape();
    return ov::Tensor(element_of(dtype()), ov::Shape(extents.begin(), extents.end()),
                      memory_.get());
  }

 private:
  std::shared_ptr<void> memory_;
};

// A request with all tensors set, which it keeps alive. One for each bound call: it takes a
// kilobyte and 0.2 ms to make on the FLUX stand-in, and nothing is set while the loop runs.
class BoundRequest : public Call {
 public:
  BoundRequest(ov::InferRequest request, Bindings tensors)
      : request_(std::move(request)), tensors_(std::move(tensors)) {}

  void enqueue(Stream /*stream*/) override {
    try {
      request_.infer();
    } catch (const std::exception& error) {
      throw Error(MCT_RENDER_ERROR, std::string("OpenVINO cannot run a graph: ") + error.what());
    }
  }

 private:
  ov::InferRequest request_;
  Bindings tensors_;
};

class OpenVinoGraph : public Graph {
 public:
  OpenVinoGraph(ov::Core& core, std::shared_ptr<ov::Model> model, ov::AnyMap config,
                std::string path)
      : core_(core), model_(std::move(model)), config_(std::move(config)), path_(std::move(path)) {}

  CallPtr bind(const Bindings& tensors) override {
    try {
      check_names(tensors);
      ov::InferRequest request = compiled(tensors).create_infer_request();
      for (const auto& [name, tensor] : tensors) {
        request.set_tensor(name, static_cast<const HostTensor&>(*tensor).bound());
      }
      return std::make_shared<BoundRequest>(std::move(request), tensors);
    } catch (const ov::Exception& error) {
      throw Error(MCT_RENDER_ERROR,
                  "OpenVINO cannot run " + path_ +
                      " at these sizes; the bundle was built for others: " + error.what());
    }
  }

 private:
  using Shapes = std::map<std::string, ov::PartialShape>;

  void check_names(const Bindings& tensors) const {
    std::size_t known = 0;
    for (const auto& ports : {model_->inputs(), model_->outputs()}) {
      for (const auto& port : ports) {
        const std::string& name = port.get_any_name();
        if (tensors.count(name) == 0) {
          throw Error(MCT_RENDER_ERROR, "a graph binds each of its tensors once: missing " +
                                            repr_of(name) + " of " + path_);
        }
        ++known;
      }
    }
    if (known != tensors.size()) {
      throw Error(MCT_RENDER_ERROR,
                  "a graph binds each of its tensors once: the manifest names one that " + path_ +
                      " does not have");
    }
  }

  // The model for the shapes of these inputs.
  ov::CompiledModel compiled(const Bindings& tensors) {
    Shapes shapes;
    for (const auto& port : model_->inputs()) {
      const std::string& name = port.get_any_name();
      const Shape& shape = tensors.at(name)->shape();
      shapes.emplace(name,
                     ov::PartialShape(std::vector<ov::Dimension>(shape.begin(), shape.end())));
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [known, model] : compiled_) {
      if (known == shapes) {
        return model;
      }
    }
    const std::shared_ptr<ov::Model> model = model_->clone();
    model->reshape(shapes);
    compiled_.emplace_back(shapes, core_.compile_model(model, "CPU", config_));
    return compiled_.back().second;
  }

  ov::Core& core_;
  std::shared_ptr<ov::Model> model_;
  ov::AnyMap config_;
  std::string path_;
  std::mutex mutex_;
  std::vector<std::pair<Shapes, ov::CompiledModel>> compiled_;
};

class OpenVinoRuntime : public Runtime {
 public:
  explicit OpenVinoRuntime(const RuntimeOptions& options) : options_(options) {}

  std::string name() const override { return "openvino"; }
  std::string version() const override { return ov::get_openvino_version().buildNumber; }
  bool is_on_device() const override { return false; }
  const std::vector<std::string>& precisions() const override {
    static const std::vector<std::string> names = {"float32", "bfloat16"};
    return names;
  }

  std::shared_ptr<Graph> load(const GraphSource& source) override {
    const std::filesystem::path path = source.bundle.path_of(source.component);
    check_links(source, path);
    try {
      return std::make_shared<OpenVinoGraph>(core_, core_.read_model(path.string()),
                                             config(source.is_light()), path.string());
    } catch (const std::exception& error) {
      throw Error(MCT_BUNDLE_ERROR,
                  "OpenVINO " + version() + " cannot load " + path.string() + ": " + error.what() +
                      "; build the bundle again, or use the version that it was checked with");
    }
  }

  TensorPtr zeros(const Shape& shape, mct_dtype dtype) override {
    const std::size_t size = elements_of(shape) * bytes_of(dtype);
    return std::make_shared<HostTensor>(shape, dtype, zeroed(size));
  }

  void synchronize(Stream /*stream*/) override {}  // calls are done when they return

 private:
  // A light graph runs on one thread: waking a second costs more than it saves.
  ov::AnyMap config(bool is_light) const {
    const int threads = is_light ? 1 : options_.threads;
    ov::AnyMap options = {
        // By default some processors round to bfloat16, also what a graph keeps in float32.
        ov::hint::inference_precision(ov::element::f32),
        ov::hint::execution_mode(ov::hint::ExecutionMode::ACCURACY),
        ov::num_streams(options_.concurrency),
        // Several sessions on the same cores would wait for each other.
        ov::hint::enable_cpu_pinning(false),
    };
    if (threads > 0) {
      // Of all streams together.
      options.insert(ov::inference_num_threads(threads * options_.concurrency));
    }
    return options;
  }

  static void check_links(const GraphSource& source, const std::filesystem::path& path) {
    for (const WeightFile& file : source.component.weights) {
      if (std::filesystem::is_symlink(source.bundle.directory() / file.path)) {
        throw Error(MCT_RUNTIME_UNAVAILABLE_ERROR,
                    "the weights of " + path.string() +
                        " are symbolic links, which OpenVINO does not follow out of the graph's "
                        "folder; build the bundle with `--weights copy`, or on the file system of "
                        "the checkpoint");
      }
    }
  }

  RuntimeOptions options_;
  ov::Core core_;
};

void check_count(const char* what, int found, int least) {
  constexpr int most = 4096;
  if (found < least || found > most) {
    throw Error(MCT_INPUT_ERROR,
                std::string(what) + " or more, up to 4096; found " + text_of(std::int64_t{found}));
  }
}

}  // namespace

std::shared_ptr<Runtime> open_openvino(const RuntimeOptions& options, const Bundle& /*bundle*/) {
  check_count("threads are 0 (all)", options.threads, 0);
  check_count("concurrency is 1", options.concurrency, 1);
  try {
    return std::make_shared<OpenVinoRuntime>(options);
  } catch (const std::exception& error) {
    throw Error(MCT_RUNTIME_UNAVAILABLE_ERROR,
                std::string("OpenVINO cannot start: ") + error.what());
  }
}

}  // namespace mct
