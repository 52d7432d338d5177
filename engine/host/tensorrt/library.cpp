#include "tensorrt/library.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "error.hpp"
#include "files.hpp"

// Before TensorRT 10 numbers of versions were made otherwise, and activations had other functions.
static_assert(NV_TENSORRT_VERSION >= 10 * 10000 || NV_TENSORRT_MAJOR < 8,
              "the TensorRT backend needs the headers of TensorRT 10 or of TensorRT for RTX");

namespace mct {

namespace {

using nvinfer1::DataType;
using nvinfer1::ICudaEngine;

std::string numbered(long version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

// A file's bytes, read by whoever looks at them.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path) {
    const int handle = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (handle >= 0 && ::fstat(handle, &status) == 0 && status.st_size > 0) {
      size_ = static_cast<std::size_t>(status.st_size);
      data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, handle, 0);
    }
    const int fault = errno;
    if (handle >= 0) {
      ::close(handle);
    }
    if (data_ == MAP_FAILED) {
      const std::system_error error(fault, std::generic_category());
      throw Error(MCT_PLAN_MISMATCH_ERROR, "cannot read " + path.string() + ": " +
                                               reason_of(error) +
                                               "; build it again with `meancache-trt plan`");
    }
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() { ::munmap(data_, size_); }

  const void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void* data_ = MAP_FAILED;
  std::size_t size_ = 0;
};

const char* name_of(DataType dtype) {
  switch (dtype) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT64:
      return "int64";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT8:
      return "int8";
    case DataType::kUINT8:
      return "uint8";
    case DataType::kBOOL:
      return "bool";
    default:
      return "an element type that no graph of a bundle has";
  }
}

[[noreturn]] void refuse(const PlanRecord& record, const std::string& directory,
                         const std::string& capability, const std::string& words) {
  throw Error(MCT_PLAN_MISMATCH_ERROR,
              record.flavour + " " + record.version + " does not take " + record.file.path +
                  " on this GPU of compute capability " + capability + ": " + words +
                  "; build it again with `meancache-trt plan " + directory + "`");
}

// The first tensor in host memory, or null.
const char* host_tensor(const ICudaEngine& engine) {
  for (int index = 0; index < engine.getNbIOTensors(); ++index) {
    const char* name = engine.getIOTensorName(index);
    if (engine.getTensorLocation(name) != nvinfer1::TensorLocation::kDEVICE) {
      return name;
    }
  }
  return nullptr;
}

// Some headers have the question, others do not: the first of these is taken where it compiles.
template <class Context>
auto asked_capturable(Context& context, cudaStream_t stream, int /*preferred*/)
    -> decltype(context.isStreamCapturable(stream)) {
  return context.isStreamCapturable(stream);
}
template <class Context>
bool asked_capturable(Context& /*context*/, cudaStream_t /*stream*/, long /*otherwise*/) {
  return true;
}

PlanTensors tensors_of(const ICudaEngine& engine, nvinfer1::TensorIOMode mode) {
  PlanTensors tensors;
  for (int index = 0; index < engine.getNbIOTensors(); ++index) {
    const char* name = engine.getIOTensorName(index);
    if (engine.getTensorIOMode(name) == mode) {
      tensors[name] = {name_of(engine.getTensorDataType(name)),
                       shape_of(engine.getTensorShape(name))};
    }
  }
  return tensors;
}

}  // namespace

const char* library_flavour() { return MEANCACHE_TRT_TENSORRT_FLAVOUR; }

std::string library_version() {
  return std::to_string(getInferLibMajorVersion()) + "." +
         std::to_string(getInferLibMinorVersion()) + "." +
         std::to_string(getInferLibPatchVersion()) + "." +
         std::to_string(getInferLibBuildVersion());
}

void check_headers(long headers, long library) {
  if (headers != library) {
    throw Error(MCT_RUNTIME_UNAVAILABLE_ERROR,
                std::string("expected ") + library_flavour() + " " + numbered(headers) +
                    ", whose headers this was compiled with, found the library " +
                    numbered(library) +
                    "; load the library that belongs to the headers, or compile with its own");
  }
}

void ErrorLog::log(Severity severity, const char* message) noexcept {
  if (severity > Severity::kERROR) {
    return;
  }
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    errors_.emplace_back(message);
  } catch (...) {  // out of memory: the words are lost
  }
}

std::string ErrorLog::reason() {
  std::vector<std::string> errors;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    errors.swap(errors_);
  }
  std::string text;
  for (auto error = errors.begin(); error != errors.end(); ++error) {
    if (std::find(errors.begin(), error, *error) == error) {
      text += (text.empty() ? "" : "; ") + *error;
    }
  }
  return text.empty() ? "it does not say why" : text;
}

NativeRuntime::NativeRuntime() : native_(nvinfer1::createInferRuntime(log_)) {
  if (!native_) {
    throw Error(MCT_RUNTIME_UNAVAILABLE_ERROR, std::string(library_flavour()) + " " +
                                                   library_version() +
                                                   " cannot start: " + log_.reason());
  }
  // A plan of a bundle from elsewhere must not bring code that runs on the host.
  native_->setEngineHostCodeAllowed(false);
}

std::unique_ptr<ICudaEngine> NativeRuntime::engine(const std::filesystem::path& plan,
                                                   const PlanRecord& record,
                                                   const std::string& directory,
                                                   const std::string& capability) {
  const MappedFile file(plan);
  std::string words;
  check_validity(file.data(), file.size(), words);
  std::unique_ptr<ICudaEngine> engine;
  if (words.empty()) {
    engine.reset(native_->deserializeCudaEngine(file.data(), file.size()));
  }
  if (!engine) {
    refuse(record, directory, capability, words + log_.reason());
  }
  if (const char* name = host_tensor(*engine)) {
    refuse(record, directory, capability,
           "it reads or writes " + repr_of(name) + " in host memory");
  }
  check_plan_tensors(record, tensors_of(*engine, nvinfer1::TensorIOMode::kINPUT),
                     tensors_of(*engine, nvinfer1::TensorIOMode::kOUTPUT));
  return engine;
}

Shape shape_of(const nvinfer1::Dims& dims) {
  return dims.nbDims < 0 ? Shape() : Shape(dims.d, dims.d + dims.nbDims);
}

nvinfer1::Dims dims_of(const Shape& shape) {
  nvinfer1::Dims dims{};
  if (shape.size() > static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS)) {
    throw Error(MCT_BUNDLE_ERROR, "a tensor has at most " +
                                      std::to_string(nvinfer1::Dims::MAX_DIMS) +
                                      " axes, found shape " + tuple_of(shape));
  }
  dims.nbDims = static_cast<std::int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

#if defined(TRT_MAJOR_RTX)

// Ask before the weights are loaded.
void NativeRuntime::check_validity(const void* plan, std::size_t size, std::string& words) {
  using Diagnostics = nvinfer1::EngineInvalidityDiagnostics;
  static const std::vector<std::pair<Diagnostics, const char*>> problems = {
      {Diagnostics::kVERSION_MISMATCH, "VERSION_MISMATCH"},
      {Diagnostics::kUNSUPPORTED_CC, "UNSUPPORTED_CC"},
      {Diagnostics::kOLD_CUDA_DRIVER, "OLD_CUDA_DRIVER"},
      {Diagnostics::kOLD_CUDA_RUNTIME, "OLD_CUDA_RUNTIME"},
      {Diagnostics::kINSUFFICIENT_GPU_MEMORY, "INSUFFICIENT_GPU_MEMORY"},
      {Diagnostics::kMALFORMED_ENGINE, "MALFORMED_ENGINE"},
      {Diagnostics::kCUDA_ERROR, "CUDA_ERROR"},
  };
  std::uint64_t bits = 0;
  const auto validity = native_->getEngineValidity(plan, static_cast<std::int64_t>(size), &bits);
  if (validity != nvinfer1::EngineValidity::kINVALID) {
    return;
  }
  for (const auto& [problem, name] : problems) {
    if ((bits & static_cast<std::uint64_t>(problem)) != 0) {
      words += std::string(name) + ", ";
    }
  }
  words += words.empty() ? "invalid, " : "";
}

void KernelCache::attach(nvinfer1::IRuntimeConfig& config) {
  if (!native_) {
    native_.reset(config.createRuntimeCache());
    if (!native_) {
      return;  // slower, and nothing else
    }
    stored_ = file_.read();
    if (!stored_.empty() && !native_->deserialize(stored_.data(), stored_.size())) {
      stored_.clear();
    }
  }
  config.setRuntimeCache(*native_);
}

void KernelCache::save() {
  if (!native_) {
    return;
  }
  const std::unique_ptr<nvinfer1::IHostMemory> compiled(native_->serialize());
  if (!compiled || compiled->size() == 0) {
    return;
  }
  std::string content(static_cast<const char*>(compiled->data()), compiled->size());
  if (content != stored_ && file_.write(content)) {
    stored_ = std::move(content);
  }
}

NativeContext make_context(ICudaEngine& engine, KernelCache& cache) {
  NativeContext made;
  made.config.reset(engine.createRuntimeConfig());
  if (made.config) {
    made.config->setExecutionContextAllocationStrategy(
        nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
    // Compiled in the background, kernels would change after a capture.
    made.config->setDynamicShapesKernelSpecializationStrategy(
        nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
    cache.attach(*made.config);
    made.context.reset(engine.createExecutionContext(made.config.get()));
  }
  return made;
}

#else

// What follows TensorRT cannot do; only TensorRT for RTX does.
void NativeRuntime::check_validity(const void*, std::size_t, std::string&) {}

void KernelCache::attach(nvinfer1::IRuntimeConfig&) {}

void KernelCache::save() {}

NativeContext make_context(ICudaEngine& engine, KernelCache& /*cache*/) {
  NativeContext made;
  made.context.reset(
      engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
  return made;
}

#endif

bool is_capturable(nvinfer1::IExecutionContext& context, cudaStream_t stream) {
  return asked_capturable(context, stream, 0);
}

}  // namespace mct
