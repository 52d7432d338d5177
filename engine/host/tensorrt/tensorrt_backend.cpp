// TensorRT and TensorRT for RTX: the plans of one bundle on one GPU, the mirror of
// engine/tensorrt/runtime.py and contexts.py.
//
// Every tensor, context and CUDA graph keeps its address from binding to the end. All work is in
// one order, on whatever streams it is put: sessions share contexts and one block of activations.

#include <algorithm>

#include "backend.hpp"
#include "error.hpp"
#include "tensorrt/device_tensor.hpp"
#include "tensorrt/library.hpp"

namespace mct {

namespace {

// Of the free memory, what weights and activations of a streamed engine may take: the rest is for
// the tensors of a loop and for other engines.
constexpr double streamed_share = 0.9;

// What everything of a runtime shares, and outlives it.
struct Shared {
  explicit Shared(std::shared_ptr<Device> gpu)
      : device(std::move(gpu)),
        cache(KernelCacheFile(library_flavour(), library_version(), device->product(),
                              device->compute_capability())),
        block([this](std::size_t size) { return device->allocate(size); },
              [this] { device->synchronize(); }) {}
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;

  std::shared_ptr<Device> device;
  NativeRuntime runtime;
  KernelCache cache;
  ActivationBlock block;
};

// A deserialised plan.
class Engine {
 public:
  Engine(std::shared_ptr<Shared> shared, const Bundle& bundle, const PlanRecord& record)
      : shared_(std::move(shared)), record_(record) {
    const std::filesystem::path plan = checked_plan(bundle, record);
    const Device::Use use(*shared_->device);
    native_ = shared_->runtime.engine(plan, record, bundle.directory().string(),
                                      shared_->device->compute_capability());
    if (record.is_weight_streaming) {
      stream_weights();
    }
  }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine() { free_in_use(*shared_->device, native_); }

  // Free something of TensorRT's, when no work is under way.
  template <class Native>
  static void free_in_use(Device& device, Native& native) {
    try {
      const Device::Use use(device);
      device.synchronize();
      native.reset();
    } catch (...) {  // nothing to tell it to; the member's destructor frees it
    }
  }

  Shared& shared() const { return *shared_; }
  nvinfer1::ICudaEngine& native() const { return *native_; }
  const PlanRecord& record() const { return record_; }
  bool is_streaming() const { return is_streaming_; }

 private:
  // Give its weights what is left of the free memory.
  void stream_weights() {
    const std::int64_t weights = native_->getStreamableWeightsSize();
    const std::int64_t others =
        native_->getDeviceMemorySizeV2() + native_->getWeightStreamingScratchMemorySize();
    const auto free = static_cast<double>(shared_->device->free_bytes());
    const auto there = static_cast<std::int64_t>(streamed_share * free) - others;
    const std::int64_t budget = std::min(std::max(there, std::int64_t{0}), weights);
    if (!native_->setWeightStreamingBudgetV2(budget) ||
        native_->getWeightStreamingBudgetV2() != budget) {
      throw Error(MCT_RENDER_ERROR, "TensorRT does not keep " + text_of(budget) +
                                        " bytes of the weights of " + record_.component +
                                        " on the GPU: " + shared_->runtime.log().reason() +
                                        "; close other programs, or plan without "
                                        "--weight-streaming");
    }
    is_streaming_ = budget < weights;
  }

  std::shared_ptr<Shared> shared_;
  PlanRecord record_;
  std::unique_ptr<nvinfer1::ICudaEngine> native_;
  bool is_streaming_ = false;
};

// An engine's execution context for one set of input shapes.
class Context {
 public:
  Context(std::shared_ptr<Engine> engine, const Shapes& shapes) : engine_(std::move(engine)) {
    const Device::Use use(device());
    native_ = make_context(engine_->native(), shared().cache);
    if (!native_.context) {
      throw Error(MCT_RENDER_ERROR, "TensorRT cannot make a context of " +
                                        engine_->record().component + ": " + reason() +
                                        "; close other programs that use the GPU");
    }
    for (const auto& [name, shape] : shapes) {
      if (!native_.context->setInputShape(name.c_str(), dims_of(shape))) {
        refuse("does not take " + name + " of shape " + tuple_of(shape));
      }
    }
    // Zero is its word for a failure, and then the upper bound over the whole profile serves.
    const std::size_t needed = native_.context->updateDeviceMemorySizeForShapes();
    const std::int64_t most = engine_->native().getDeviceMemorySizeV2();
    shared().block.reserve(needed != 0 ? needed : static_cast<std::size_t>(most));
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() {
    try {
      const Device::Use use(device());
      shared().cache.save();
    } catch (...) {  // kernels are compiled again at the next start
    }
    Engine::free_in_use(device(), native_.context);
  }

  Device& device() const { return *shared().device; }
  std::uint64_t generation() const { return shared().block.generation(); }
  // The shape of an input or output, given the shapes of all inputs.
  Shape shape(const std::string& name) const {
    return shape_of(native_.context->getTensorShape(name.c_str()));
  }

  void start(const std::map<std::string, void*>& addresses, CUstream stream) {
    nvinfer1::IExecutionContext& native = *native_.context;
    const ActivationBlock& block = shared().block;
    if (generation_ != block.generation()) {
      native.setDeviceMemoryV2(block.pointer(), static_cast<std::int64_t>(block.size_bytes()));
      generation_ = block.generation();
    }
    for (const auto& [name, address] : addresses) {
      void*& known = addresses_[name];
      if (known == address) {
        continue;
      }
      if (!native.setTensorAddress(name.c_str(), address)) {
        refuse("does not take the address of " + name);
      }
      known = address;
    }
    if (!native.enqueueV3(reinterpret_cast<cudaStream_t>(stream))) {
      refuse("could not be started");
    }
  }

  std::optional<std::string> why_not_captured() const {
    const std::string& component = engine_->record().component;
    if (engine_->is_streaming()) {
      return "the weights of " + component + " are streamed";
    }
    if (!is_capturable(*native_.context, reinterpret_cast<cudaStream_t>(device().own_stream()))) {
      return "TensorRT cannot capture " + component + ": " + reason();
    }
    return std::nullopt;
  }

 private:
  Shared& shared() const { return engine_->shared(); }
  std::string reason() const { return shared().runtime.log().reason(); }
  [[noreturn]] void refuse(const std::string& what) const {
    const PlanRecord& record = engine_->record();
    throw Error(MCT_RENDER_ERROR, record.flavour + " " + record.version + ": the engine of " +
                                      record.component + " " + what + ": " + reason());
  }

  std::shared_ptr<Engine> engine_;
  NativeContext native_;
  std::map<std::string, void*> addresses_;  // as the context has them
  std::uint64_t generation_ = 0;            // of the block that it has
};

// A context with the address of every input and output; holds the tensors.
class BoundCall : public Call, public Startable {
 public:
  BoundCall(std::shared_ptr<Context> context, Bindings tensors)
      : context_(std::move(context)), tensors_(std::move(tensors)) {
    for (const auto& [name, tensor] : tensors_) {
      addresses_[name] = static_cast<const DeviceTensor&>(*tensor).pointer();
    }
  }

  void enqueue(Stream stream) override {
    context_->device().in_order(stream, [this](CUstream on) { start(on); });
  }
  void start(Stream stream) override { context_->start(addresses_, static_cast<CUstream>(stream)); }
  std::uint64_t generation() const override { return context_->generation(); }
  std::optional<std::string> why_not_captured() const override {
    return context_->why_not_captured();
  }

 private:
  std::shared_ptr<Context> context_;
  Bindings tensors_;
  std::map<std::string, void*> addresses_;
};

// A sequence that becomes one CUDA graph, in order with all other work.
class GraphSequence : public Call {
 public:
  GraphSequence(std::shared_ptr<Device> device, std::vector<std::shared_ptr<Startable>> calls)
      : device_(std::move(device)),
        sequence_(std::move(calls), [this](const std::function<void(Stream)>& enqueue) {
          return device_->capture(enqueue);
        }) {}
  GraphSequence(const GraphSequence&) = delete;
  GraphSequence& operator=(const GraphSequence&) = delete;

  void enqueue(Stream stream) override {
    device_->in_order(stream, [this](CUstream on) { sequence_.start(on); });
  }

 private:
  std::shared_ptr<Device> device_;
  CapturedSequence sequence_;
};

// The engines of a bundle's plans, each deserialised at its first use and shared by all who hold
// it.
class Engines {
 public:
  Engines(std::shared_ptr<Shared> shared, const Bundle& bundle)
      : shared_(std::move(shared)), bundle_(bundle) {}

  std::shared_ptr<Engine> get(const PlanRecord& record) {
    const Device::Use use(*shared_->device);
    std::shared_ptr<Engine> engine = known_[record.file.path].lock();
    if (!engine) {
      engine = std::make_shared<Engine>(shared_, bundle_, record);
      known_[record.file.path] = engine;
    }
    return engine;
  }

 private:
  std::shared_ptr<Shared> shared_;
  const Bundle& bundle_;  // outlives the graphs that are loaded from it
  std::map<std::string, std::weak_ptr<Engine>> known_;
};

// A graph of a bundle by its plans; each bound set of shapes has a context, made once.
class TensorRtGraph : public Graph {
 public:
  TensorRtGraph(std::shared_ptr<Shared> shared, std::shared_ptr<Engines> engines,
                const GraphSource& source, std::vector<PlanRecord> records)
      : shared_(std::move(shared)),
        engines_(std::move(engines)),
        name_(source.name),
        component_(source.component),
        records_(std::move(records)) {}

  CallPtr bind(const Bindings& tensors) override {
    check_names(tensors);
    const Device::Use use(*shared_->device);
    Shapes shapes;
    for (const auto& entry : component_.inputs) {
      shapes[entry.first] = tensors.at(entry.first)->shape();
    }
    const std::shared_ptr<Context> context = context_for(shapes);
    for (const auto& entry : component_.outputs) {
      check_output(entry.first, context->shape(entry.first), tensors.at(entry.first)->shape());
    }
    return std::make_shared<BoundCall>(context, tensors);
  }

 private:
  void check_names(const Bindings& tensors) const {
    for (const Tensors* side : {&component_.inputs, &component_.outputs}) {
      for (const auto& [name, record] : *side) {
        const auto found = tensors.find(name);
        if (found == tensors.end()) {
          throw Error(MCT_RENDER_ERROR, "a graph binds each of its tensors once: missing " +
                                            repr_of(name) + " of " + name_);
        }
        check_tensor(name, record, *found->second);
      }
    }
    if (tensors.size() != component_.inputs.size() + component_.outputs.size()) {
      throw Error(MCT_RENDER_ERROR, "a graph binds each of its tensors once: found one that " +
                                        name_ + " does not have");
    }
  }

  void check_tensor(const std::string& name, const TensorRecord& record,
                    const Tensor& tensor) const {
    const auto* on_device = dynamic_cast<const DeviceTensor*>(&tensor);
    if (on_device == nullptr) {
      throw Error(MCT_RENDER_ERROR,
                  "TensorRT binds tensors of its own device, found another for " + repr_of(name));
    }
    if (record.dtype != tensor.dtype()) {
      throw Error(MCT_RENDER_ERROR, "tensor " + repr_of(name) + " of " + name_ +
                                        " has another element type than the one that is bound; "
                                        "build the bundle again");
    }
    if (reinterpret_cast<std::uintptr_t>(on_device->pointer()) % alignment_bytes != 0) {
      throw Error(MCT_RENDER_ERROR, "TensorRT takes addresses that are multiples of " +
                                        std::to_string(alignment_bytes) + ", found another for " +
                                        repr_of(name) + "; copy the tensor to memory of its own");
    }
  }

  void check_output(const std::string& name, const Shape& made, const Shape& bound) const {
    if (made != bound) {
      throw Error(MCT_RENDER_ERROR, "the engine of " + name_ + " gives " + repr_of(name) +
                                        " in shape " + tuple_of(made) +
                                        ", found a tensor of shape " + tuple_of(bound) +
                                        "; the bundle was built for other sizes");
    }
  }

  std::shared_ptr<Context> context_for(const Shapes& shapes) {
    std::shared_ptr<Context>& context = contexts_[shapes];
    if (!context) {
      const PlanRecord& record = plan_for(name_, records_, shapes);
      context = std::make_shared<Context>(engines_->get(record), shapes);
    }
    return context;
  }

  std::shared_ptr<Shared> shared_;
  std::shared_ptr<Engines> engines_;
  std::string name_;
  Component component_;
  std::vector<PlanRecord> records_;
  std::map<Shapes, std::shared_ptr<Context>> contexts_;
};

class TensorRtRuntime : public Runtime {
 public:
  TensorRtRuntime(std::shared_ptr<Device> device, const Bundle& bundle)
      : shared_(std::make_shared<Shared>(std::move(device))),
        target_{library_flavour(), library_version(), shared_->device->compute_capability()},
        precisions_(planned_precisions(bundle, target_)),
        engines_(std::make_shared<Engines>(shared_, bundle)) {}

  std::string name() const override { return target_.flavour; }
  std::string version() const override { return target_.version; }
  bool is_on_device() const override { return true; }
  const std::vector<std::string>& precisions() const override { return precisions_; }

  std::shared_ptr<Graph> load(const GraphSource& source) override {
    return std::make_shared<TensorRtGraph>(
        shared_, engines_, source,
        loadable_plans(source.bundle, source.name, source.component, target_));
  }

  TensorPtr zeros(const Shape& shape, mct_dtype dtype) override {
    return DeviceTensor::zeros(shared_->device, shape, dtype);
  }

  CallPtr sequence(std::vector<CallPtr> calls) override {
    std::vector<std::shared_ptr<Startable>> own;
    for (const CallPtr& call : calls) {
      if (auto bound = std::dynamic_pointer_cast<BoundCall>(call)) {
        own.push_back(std::move(bound));
      }
    }
    if (own.size() != calls.size()) {
      return Runtime::sequence(std::move(calls));
    }
    return std::make_shared<GraphSequence>(shared_->device, std::move(own));
  }

  // All work is in one order, so the end of the last piece is that of every stream's.
  void synchronize(Stream /*stream*/) override { shared_->device->wait(); }

  void check(const Bundle& bundle) const override { check_plans(bundle, target_); }

 private:
  std::shared_ptr<Shared> shared_;
  PlanTarget target_;
  std::vector<std::string> precisions_;
  std::shared_ptr<Engines> engines_;
};

}  // namespace

std::shared_ptr<Runtime> open_tensorrt(const RuntimeOptions& options, const Bundle& bundle) {
  // The GPU first: where there is none, nothing else matters.
  auto device = std::make_shared<Device>(options.device);
  check_headers(NV_TENSORRT_VERSION, getInferLibVersion());
  return std::make_shared<TensorRtRuntime>(std::move(device), bundle);
}

}  // namespace mct
