// One GPU by NVIDIA's driver, the mirror of engine/cuda/driver.py. The driver is loaded when a GPU
// is first asked for, so that a library with this in it opens where there is none.

#ifndef MEANCACHE_TRT_HOST_TENSORRT_CUDA_HPP
#define MEANCACHE_TRT_HOST_TENSORRT_CUDA_HPP

#include <cuda.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "tensorrt/capture.hpp"

// cuda.h maps some of these to newer ones by macros, which are expanded here.
#define MCT_CUDA_FUNCTIONS(use)                                                                \
  use(cuInit) use(cuDeviceGetCount) use(cuDeviceGet) use(cuDeviceGetName)                      \
      use(cuDeviceGetAttribute) use(cuDevicePrimaryCtxRetain) use(cuDevicePrimaryCtxRelease)   \
          use(cuCtxPushCurrent) use(cuCtxPopCurrent) use(cuCtxSynchronize) use(cuGetErrorName) \
              use(cuGetErrorString) use(cuMemGetInfo) use(cuMemAlloc) use(cuMemFree)           \
                  use(cuMemcpyHtoDAsync) use(cuMemcpyDtoHAsync) use(cuMemcpyDtoDAsync)         \
                      use(cuMemsetD8Async) use(cuStreamCreate) use(cuStreamDestroy)            \
                          use(cuStreamSynchronize) use(cuStreamWaitEvent) use(cuEventCreate)   \
                              use(cuEventDestroy) use(cuEventRecord) use(cuEventSynchronize)   \
                                  use(cuStreamBeginCapture) use(cuStreamEndCapture)            \
                                      use(cuGraphInstantiate) use(cuGraphDestroy)              \
                                          use(cuGraphLaunch) use(cuGraphExecDestroy)

namespace mct {

// The driver's functions, by the names that they have in cuda.h.
struct CudaFunctions {
#define MCT_MEMBER(name) decltype(&::name) name = nullptr;
  MCT_CUDA_FUNCTIONS(MCT_MEMBER)
#undef MCT_MEMBER
};

// A GPU's primary context, which CUDA's runtime, torch and TensorRT use too.
//
// All work is in one order, whatever stream it is put on, since contexts share memory: each piece
// waits for the one before it. Any thread may use it; one at a time does.
class Device : public std::enable_shared_from_this<Device> {
 public:
  // Throws a runtime-unavailable error where there is no driver, or no GPU of that index.
  explicit Device(int index);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device();

  const CudaFunctions& cuda() const { return cuda_; }
  const std::string& product() const { return product_; }                // "NVIDIA H200"
  const std::string& compute_capability() const { return capability_; }  // "8.9"

  // Throws a render error for any status but success, which says what could not be done.
  void check(CUresult status, const char* action) const;

  // The GPU is the calling thread's current one, and no other thread uses it, while this lives.
  class Use {
   public:
    explicit Use(Device& device);
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    ~Use();

   private:
    std::lock_guard<std::recursive_mutex> lock_;
    Device& device_;
  };

  // Where captures are made.
  CUstream own_stream() const { return own_; }
  std::size_t free_bytes();
  // Aligned memory with arbitrary contents, freed when nothing uses it any more. Throws a render
  // error where there is too little.
  std::shared_ptr<void> allocate(std::size_t size_bytes);
  // Call `enqueue` with the stream to put work on, null being our own, in order after all earlier
  // work. Throws an input error for a default stream.
  void in_order(Stream stream, const std::function<void(CUstream)>& enqueue);
  // Record what `enqueue` puts on the stream that it is handed; to be called in `in_order`.
  std::unique_ptr<CapturedWork> capture(const std::function<void(Stream)>& enqueue);
  // Wait for everything that was put in order so far.
  void wait();
  // Wait for all work on the GPU.
  void synchronize();

 private:
  CUgraph recorded(const std::function<void(Stream)>& enqueue);
  void open();

  CudaFunctions cuda_;
  std::recursive_mutex mutex_;
  CUdevice ordinal_ = 0;
  CUcontext context_ = nullptr;
  CUstream own_ = nullptr;
  CUstream previous_ = nullptr;  // where the last piece of work is; it may be gone
  CUevent last_ = nullptr;       // its end
  std::string product_;
  std::string capability_;
};

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_TENSORRT_CUDA_HPP
