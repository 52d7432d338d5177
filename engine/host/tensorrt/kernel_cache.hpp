// The file of kernels that TensorRT for RTX compiled at run time, the Python host's too: the mirror
// of engine/tensorrt/runtime_cache.py. Knows neither CUDA nor TensorRT.

#ifndef MEANCACHE_TRT_HOST_TENSORRT_KERNEL_CACHE_HPP
#define MEANCACHE_TRT_HOST_TENSORRT_KERNEL_CACHE_HPP

#include <filesystem>
#include <string>
#include <string_view>

namespace mct {

// One file for each version and GPU, in the user's cache directory, read and replaced under a lock
// that is also the Python host's.
class KernelCacheFile {
 public:
  // `product` is the GPU's name. In `directory`, or by default the user's own.
  KernelCacheFile(const std::string& flavour, const std::string& version,
                  const std::string& product, const std::string& capability,
                  const std::filesystem::path& directory = {});

  const std::filesystem::path& path() const { return path_; }
  // What is stored; empty where nothing is or it cannot be read.
  std::string read() const;
  // Replace it. False where it cannot be written, which costs time at the next start alone.
  bool write(std::string_view content) const;

 private:
  std::filesystem::path path_;  // empty where there is no cache directory
};

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_TENSORRT_KERNEL_CACHE_HPP
