// A libnvinfer.so of our own, whose engines are ONNX graphs that OpenVINO runs: with fake_cuda.cpp
// all of the TensorRT backend is real, and only the kernels are not. A plan is the JSON text of
// tests/fakes/plans.py, which names its graph.
//
// It is strict: a context needs its activations, which it writes to, and every address; its first
// run cannot be captured, since TensorRT allocates there.
//
// stubs.hpp is written from NVIDIA's headers by the test: every pure virtual function, which
// aborts.

#include <NvInferRuntime.h>
#include <cuda.h>
#include <dlfcn.h>

#include <cstring>
#include <functional>
#include <map>
#include <openvino/openvino.hpp>
#include <string>

#include "stubs.hpp"

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

template <class Signature>
Signature* driver(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  return reinterpret_cast<Signature*>(dlsym(library, name));
}

nvinfer1::ILogger* logger = nullptr;
bool refuse(const char* words) {
  logger->log(nvinfer1::ILogger::Severity::kERROR, words);
  return false;
}

Dims dims_of(const ov::PartialShape& shape) {
  Dims dims{};
  for (const auto& axis : shape) {
    dims.d[dims.nbDims++] = axis.is_static() ? axis.get_length() : -1;
  }
  return dims;
}

struct Model {
  std::shared_ptr<ov::Model> graph;
  std::vector<std::string> names;
  std::map<std::string, ov::Output<ov::Node>> ports;
};

ov::Core& core() {
  static ov::Core opened;
  return opened;
}

class FakeContext : public ContextStub {
 public:
  explicit FakeContext(const Model& model) : graph_(model.graph->clone()), model_(model) {}

  bool setInputShape(char const* name, Dims const& dims) noexcept override {
    shapes_[name] = ov::PartialShape(std::vector<ov::Dimension>(dims.d, dims.d + dims.nbDims));
    if (shapes_.size() == graph_->inputs().size()) {
      graph_->reshape(shapes_);
      for (const auto& port : graph_->outputs()) {
        outputs_[port.get_any_name()] = port.get_partial_shape();
      }
    }
    return true;
  }
  Dims getTensorShape(char const* name) const noexcept override {
    const auto output = outputs_.find(name);
    return dims_of(output != outputs_.end() ? output->second : shapes_.at(name));
  }
  std::size_t updateDeviceMemorySizeForShapes() noexcept override {
    return activations_ = 100 + 300 * graph_->inputs().size();
  }
  void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept override {
    memory_ = static_cast<std::size_t>(size) >= activations_ ? memory : nullptr;
    is_warm_ = false;
  }
  bool setTensorAddress(char const* name, void* address) noexcept override {
    addresses_[name] = address;
    return model_.ports.count(name) == 1;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    const auto on = reinterpret_cast<CUstream>(stream);
    if (memory_ == nullptr || addresses_.size() != model_.ports.size()) {
      return refuse("no activations, or not every address");
    }
    if (!is_warm_ && driver<bool(CUstream)>("fake_is_capturing")(on)) {
      return refuse("a first run cannot be captured");
    }
    is_warm_ = true;
    compile();
    const std::function<void()> run = [request = request_, memory = memory_, size = activations_,
                                       addresses = addresses_]() mutable {
      std::memset(memory, 0xff, size);
      for (const auto& [name, address] : addresses) {
        const ov::Tensor known = request.get_tensor(name);
        request.set_tensor(name, ov::Tensor(known.get_element_type(), known.get_shape(), address));
      }
      request.infer();
    };
    driver<void(CUstream, const char*, const std::function<void()>*)>("fake_run")(on, "run", &run);
    return true;
  }

 private:
  void compile() {
    if (!request_) {
      request_ = core()
                     .compile_model(graph_, "CPU", ov::hint::inference_precision(ov::element::f32),
                                    ov::inference_num_threads(1))
                     .create_infer_request();
    }
  }

  std::shared_ptr<ov::Model> graph_;
  Model model_;
  std::map<std::string, ov::PartialShape> shapes_, outputs_;
  std::map<std::string, void*> addresses_;
  ov::InferRequest request_;
  void* memory_ = nullptr;
  std::size_t activations_ = 0;
  bool is_warm_ = false;
};

class FakeEngine : public EngineStub {
 public:
  explicit FakeEngine(Model model) : model_(std::move(model)) {}

  std::int32_t getNbIOTensors() const noexcept override {
    return static_cast<std::int32_t>(model_.names.size());
  }
  char const* getIOTensorName(std::int32_t index) const noexcept override {
    return model_.names[static_cast<std::size_t>(index)].c_str();
  }
  nvinfer1::TensorIOMode getTensorIOMode(char const* name) const noexcept override {
    for (const auto& port : model_.graph->inputs()) {
      if (port.get_any_name() == name) {
        return nvinfer1::TensorIOMode::kINPUT;
      }
    }
    return nvinfer1::TensorIOMode::kOUTPUT;
  }
  nvinfer1::TensorLocation getTensorLocation(char const*) const noexcept override {
    return nvinfer1::TensorLocation::kDEVICE;
  }
  DataType getTensorDataType(char const* name) const noexcept override {
    const ov::element::Type type = model_.ports.at(name).get_element_type();
    return type == ov::element::i64   ? DataType::kINT64
           : type == ov::element::f32 ? DataType::kFLOAT
                                      : DataType::kINT8;
  }
  Dims getTensorShape(char const* name) const noexcept override {
    return dims_of(model_.ports.at(name).get_partial_shape());
  }
  std::int64_t getDeviceMemorySizeV2() const noexcept override { return 1 << 20; }
  nvinfer1::IExecutionContext* createExecutionContext(
      nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override;

 private:
  Model model_;
};

// The public classes forward to those above, which they own.
template <class Public, class Private>
class Owner : public Public {
 public:
  explicit Owner(Private* made) : made_(made) { this->mImpl = made; }

 private:
  std::unique_ptr<Private> made_;
};

nvinfer1::IExecutionContext* FakeEngine::createExecutionContext(
    nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept {
  if (strategy != nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED) {
    return nullptr;
  }
  return new Owner<nvinfer1::IExecutionContext, FakeContext>(new FakeContext(model_));
}

class FakeRuntime : public RuntimeStub {
 public:
  void setEngineHostCodeAllowed(bool allowed) noexcept override { is_open_ = allowed; }
  nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob,
                                               std::size_t size) noexcept override {
    const std::string plan(static_cast<const char*>(blob), size);
    const std::string key = "\"graph\":\"";
    const std::size_t start = plan.find(key);
    if (is_open_ || start == std::string::npos) {
      refuse("the magic tag does not match");
      return nullptr;
    }
    const std::size_t path = start + key.size();
    Model model{core().read_model(plan.substr(path, plan.find('"', path) - path)), {}, {}};
    for (const auto& ports : {model.graph->inputs(), model.graph->outputs()}) {
      for (const auto& port : ports) {
        model.names.push_back(port.get_any_name());
        model.ports.emplace(port.get_any_name(), port);
      }
    }
    return new Owner<nvinfer1::ICudaEngine, FakeEngine>(new FakeEngine(std::move(model)));
  }

 private:
  bool is_open_ = true;
};

}  // namespace

extern "C" {

void* createInferRuntime_INTERNAL(void* given, std::int32_t) noexcept {
  logger = static_cast<nvinfer1::ILogger*>(given);
  return static_cast<nvinfer1::IRuntime*>(
      new Owner<nvinfer1::IRuntime, FakeRuntime>(new FakeRuntime));
}
std::int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
std::int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
std::int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
std::int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }
std::int32_t getInferLibBuildVersion() noexcept { return NV_TENSORRT_BUILD; }

}  // extern "C"
