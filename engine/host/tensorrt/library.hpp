// TensorRT itself, of the flavour that this was compiled with: its version, its words where it
// refuses, and plans deserialised into engines. The mirror of engine/tensorrt/library.py and
// engines.py; nothing here asks for a GPU.

#ifndef MEANCACHE_TRT_HOST_TENSORRT_LIBRARY_HPP
#define MEANCACHE_TRT_HOST_TENSORRT_LIBRARY_HPP

#include <NvInferRuntime.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tensorrt/kernel_cache.hpp"
#include "tensorrt/plans.hpp"

namespace mct {

// "tensorrt" or "tensorrt_rtx".
const char* library_flavour();
// Of the library that was loaded, as its Python package has it, such as "1.7.1.116".
std::string library_version();
// Throws a runtime-unavailable error where the library's version is not the headers': calls would
// reach other functions than the ones that they name. Both are TensorRT's own numbers.
void check_headers(long headers, long library);

// A logger that keeps errors: TensorRT's calls return null and say why only there.
class ErrorLog : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override;
  // Errors since the last call, each once, oldest first, or that there were none.
  std::string reason();

 private:
  std::mutex mutex_;
  std::vector<std::string> errors_;
};

// TensorRT's runtime. Not thread-safe.
class NativeRuntime {
 public:
  // Throws a runtime-unavailable error where it cannot start.
  NativeRuntime();

  ErrorLog& log() { return log_; }
  // A plan's engine. `refused` makes an error of TensorRT's words.
  std::unique_ptr<nvinfer1::ICudaEngine> engine(const std::filesystem::path& plan,
                                                const PlanRecord& record,
                                                const std::string& directory,
                                                const std::string& capability);

 private:
  void check_validity(const void* plan, std::size_t size, std::string& words);

  ErrorLog log_;  // first: it outlives the runtime
  std::unique_ptr<nvinfer1::IRuntime> native_;
};

// Dimensions as a shape, and back.
Shape shape_of(const nvinfer1::Dims& dims);
nvinfer1::Dims dims_of(const Shape& shape);

// Kernels compiled at run time, kept between processes by TensorRT for RTX; another flavour has
// none, and then this does nothing.
class KernelCache {
 public:
  explicit KernelCache(KernelCacheFile file) : file_(std::move(file)) {}

  // Let an engine's runtime configuration use it. A file that TensorRT rejects is replaced.
  void attach(nvinfer1::IRuntimeConfig& config);
  // Keep what was compiled since; the contexts that use it still live.
  void save();

 private:
  KernelCacheFile file_;
  std::string stored_;
#if defined(TRT_MAJOR_RTX)
  std::unique_ptr<nvinfer1::IRuntimeCache> native_;
#endif
};

// An execution context and what has to outlive it.
struct NativeContext {
  std::unique_ptr<nvinfer1::IRuntimeConfig> config;
  std::unique_ptr<nvinfer1::IExecutionContext> context;  // null where TensorRT refuses
};

// A context whose activations are given to it.
NativeContext make_context(nvinfer1::ICudaEngine& engine, KernelCache& cache);

// Whether the context's work can be captured on a stream, where the flavour can tell.
bool is_capturable(nvinfer1::IExecutionContext& context, cudaStream_t stream);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_TENSORRT_LIBRARY_HPP
