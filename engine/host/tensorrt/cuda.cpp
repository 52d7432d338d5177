#include "tensorrt/cuda.hpp"

#include <dlfcn.h>

#include "error.hpp"

namespace mct {

namespace {

constexpr char driver_file[] = "libcuda.so.1";

[[noreturn]] void unavailable(const std::string& problem) {
  throw Error(MCT_RUNTIME_UNAVAILABLE_ERROR,
              "expected an NVIDIA GPU, but " + problem +
                  "; use a backend that runs on the CPU, such as openvino, or see `meancache-trt "
                  "doctor`");
}

#define MCT_TEXT(name) #name
#define MCT_TEXT_OF(name) MCT_TEXT(name)

// The driver stays loaded, as its own threads do.
CudaFunctions load_driver() {
  void* library = ::dlopen(driver_file, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    unavailable(std::string("there is no NVIDIA driver (") + driver_file + " is not found)");
  }
  CudaFunctions functions;
#define MCT_LOAD(name)                                                                      \
  functions.name =                                                                          \
      reinterpret_cast<decltype(functions.name)>(::dlsym(library, MCT_TEXT_OF(name)));      \
  if (functions.name == nullptr) {                                                          \
    unavailable("the NVIDIA driver is too old: it lacks " MCT_TEXT_OF(name) "; update it"); \
  }
  MCT_CUDA_FUNCTIONS(MCT_LOAD)
#undef MCT_LOAD
  return functions;
}

// A stream that the host made, and not one of CUDA's default ones.
CUstream stream_of(Stream stream) {
  const auto native = static_cast<CUstream>(stream);
  if (native == CU_STREAM_LEGACY || native == CU_STREAM_PER_THREAD) {
    throw Error(MCT_INPUT_ERROR,
                "expected a stream of its own, found a default stream, which cannot be captured in "
                "a CUDA graph; make one by cudaStreamCreateWithFlags");
  }
  return native;
}

// An executable CUDA graph.
class DriverGraph : public CapturedWork {
 public:
  DriverGraph(std::shared_ptr<Device> device, CUgraphExec native)
      : device_(std::move(device)), native_(native) {}
  DriverGraph(const DriverGraph&) = delete;
  DriverGraph& operator=(const DriverGraph&) = delete;
  ~DriverGraph() override {
    try {
      const Device::Use use(*device_);
      device_->cuda().cuGraphExecDestroy(native_);  // may still be running
    } catch (...) {                                 // nothing to tell it to
    }
  }

  void launch(Stream stream) override {
    device_->check(device_->cuda().cuGraphLaunch(native_, static_cast<CUstream>(stream)),
                   "launch a CUDA graph");
  }

 private:
  std::shared_ptr<Device> device_;
  CUgraphExec native_;
};

}  // namespace

Device::Device(int index) : cuda_(load_driver()) {
  if (const CUresult status = cuda_.cuInit(0); status != CUDA_SUCCESS) {
    unavailable("the NVIDIA driver is there, but cuInit returned " +
                std::to_string(static_cast<int>(status)));
  }
  int count = 0;
  check(cuda_.cuDeviceGetCount(&count), "count the GPUs");
  if (index < 0 || index >= count) {
    unavailable(count == 0 ? "the NVIDIA driver is there, but sees no GPU"
                           : "there are " + std::to_string(count) + " GPUs, found no index " +
                                 std::to_string(index));
  }
  check(cuda_.cuDeviceGet(&ordinal_, index), "find the GPU");
  check(cuda_.cuDevicePrimaryCtxRetain(&context_, ordinal_), "open the GPU");
  try {
    open();
  } catch (...) {
    cuda_.cuDevicePrimaryCtxRelease(ordinal_);
    throw;
  }
}

void Device::open() {
  const Use use(*this);
  char name[256] = "";
  check(cuda_.cuDeviceGetName(name, sizeof name, ordinal_), "ask the GPU for its name");
  product_ = name;
  int major = 0, minor = 0;
  check(cuda_.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, ordinal_),
        "ask the GPU for its compute capability");
  check(cuda_.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, ordinal_),
        "ask the GPU for its compute capability");
  capability_ = std::to_string(major) + "." + std::to_string(minor);
  check(cuda_.cuStreamCreate(&own_, CU_STREAM_NON_BLOCKING), "make a stream");
  previous_ = own_;
  check(cuda_.cuEventCreate(&last_, CU_EVENT_DISABLE_TIMING), "make an event");
}

Device::~Device() {
  try {
    const Use use(*this);
    // Statuses are not looked at: there is nobody to tell them to.
    cuda_.cuStreamSynchronize(own_);
    cuda_.cuEventDestroy(last_);
    cuda_.cuStreamDestroy(own_);
  } catch (...) {
  }
  cuda_.cuDevicePrimaryCtxRelease(ordinal_);
}

void Device::check(CUresult status, const char* action) const {
  if (status == CUDA_SUCCESS) {
    return;
  }
  const char* name = nullptr;
  const char* words = nullptr;
  if (cuda_.cuGetErrorName(status, &name) != CUDA_SUCCESS ||
      cuda_.cuGetErrorString(status, &words) != CUDA_SUCCESS) {
    name = "an unknown error";
    words = "update the driver";
  }
  throw Error(MCT_RENDER_ERROR,
              std::string("CUDA could not ") + action + ": " + name + " (" + words +
                  "); after an error of a kernel this process cannot use the GPU any more: start "
                  "it again");
}

Device::Use::Use(Device& device) : lock_(device.mutex_), device_(device) {
  device.check(device.cuda_.cuCtxPushCurrent(device.context_), "select the GPU");
}

Device::Use::~Use() {
  CUcontext ours = nullptr;
  device_.cuda_.cuCtxPopCurrent(&ours);  // what was pushed is there to be popped
}

std::size_t Device::free_bytes() {
  const Use use(*this);
  std::size_t free = 0, total = 0;
  check(cuda_.cuMemGetInfo(&free, &total), "ask for free memory");
  return free;
}

std::shared_ptr<void> Device::allocate(std::size_t size_bytes) {
  const Use use(*this);
  const std::size_t size = size_bytes == 0 ? 1 : size_bytes;
  CUdeviceptr address = 0;
  const CUresult status = cuda_.cuMemAlloc(&address, size);
  if (status == CUDA_ERROR_OUT_OF_MEMORY) {
    throw Error(MCT_RENDER_ERROR,
                "expected " + std::to_string(size >> 20) + " MiB of memory on the GPU, found " +
                    std::to_string(free_bytes() >> 20) +
                    " MiB free; close other programs, render smaller pictures, or plan with "
                    "--weight-streaming");
  }
  check(status, "allocate memory");
  const auto free = [device = shared_from_this()](void* pointer) {
    try {
      const Use in_use(*device);
      // Statuses are not looked at: there is nobody to tell them to.
      device->cuda_.cuCtxSynchronize();
      device->cuda_.cuMemFree(reinterpret_cast<CUdeviceptr>(pointer));
    } catch (...) {
    }
  };
  return {reinterpret_cast<void*>(address), free};
}

void Device::in_order(Stream stream, const std::function<void(CUstream)>& enqueue) {
  const CUstream given = stream_of(stream);
  const Use use(*this);
  const CUstream on = given == nullptr ? own_ : given;
  if (on != own_ || previous_ != own_) {
    check(cuda_.cuStreamWaitEvent(on, last_, CU_EVENT_WAIT_DEFAULT), "wait for an event");
  }
  previous_ = on;
  try {
    enqueue(on);
  } catch (...) {
    cuda_.cuEventRecord(last_, on);  // the first error is the one to tell
    throw;
  }
  check(cuda_.cuEventRecord(last_, on), "record an event");
}

std::unique_ptr<CapturedWork> Device::capture(const std::function<void(Stream)>& enqueue) {
  const Use use(*this);
  const CUgraph graph = recorded(enqueue);
  CUgraphExec native = nullptr;
  const CUresult made = cuda_.cuGraphInstantiate(&native, graph, 0);
  const CUresult freed = cuda_.cuGraphDestroy(graph);
  check(made, "make a CUDA graph");
  auto work = std::make_unique<DriverGraph>(shared_from_this(), native);
  check(freed, "free a CUDA graph");
  return work;
}

// On our own stream, which nobody else puts work on: a capture does not run anything.
CUgraph Device::recorded(const std::function<void(Stream)>& enqueue) {
  // As trtexec does: what is unsafe on this thread fails, other threads are left alone.
  check(cuda_.cuStreamBeginCapture(own_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "begin a capture");
  CUgraph graph = nullptr;
  try {
    enqueue(own_);
  } catch (...) {
    // Ended in any case, or the stream could not be used again.
    if (cuda_.cuStreamEndCapture(own_, &graph) == CUDA_SUCCESS && graph != nullptr) {
      cuda_.cuGraphDestroy(graph);
    }
    throw;
  }
  check(cuda_.cuStreamEndCapture(own_, &graph), "capture the calls");
  return graph;
}

void Device::wait() {
  const Use use(*this);
  check(cuda_.cuEventSynchronize(last_), "finish its work");
}

void Device::synchronize() {
  const Use use(*this);
  check(cuda_.cuCtxSynchronize(), "finish its work");
}

}  // namespace mct
