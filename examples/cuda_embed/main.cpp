// meancache-trt inside a CUDA program: its own stream, its own device buffers, no copy to the host
// between the prompt and the latent.
//
// usage: cuda_embed BUNDLE
//
// The session is bound once. Conditioning and noise are read from device memory, the loop is put on
// the program's stream behind whatever made them, and the final latent lands in a device buffer in
// the order of the same stream. It needs a library with a backend that runs on a GPU; with others
// the library says that it takes no device memory.

#include <cuda_runtime.h>

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>

#include "meancache_trt.hpp"

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(status));
  }
}

struct FreeDevice {
  void operator()(void* memory) const noexcept { cudaFree(memory); }
};
using DeviceMemory = std::unique_ptr<void, FreeDevice>;

DeviceMemory device_zeros(std::size_t size_bytes, cudaStream_t stream) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, size_bytes));
  DeviceMemory owned(memory);
  check(cudaMemsetAsync(memory, 0, size_bytes, stream));
  return owned;
}

struct DestroyStream {
  void operator()(CUstream_st* stream) const noexcept { cudaStreamDestroy(stream); }
};

void embed(const char* path) {
  cudaStream_t created = nullptr;
  check(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking));
  const std::unique_ptr<CUstream_st, DestroyStream> stream(created);

  const meancache_trt::Bundle bundle(path);
  meancache_trt::Session session(bundle, {});
  const mct_session_info info = session.info();

  // Stand-ins for what the program's own kernels write.
  for (const meancache_trt::Tensor& tensor : session.conditioning()) {
    const DeviceMemory memory = device_zeros(tensor.size_bytes, stream.get());
    check(cudaStreamSynchronize(stream.get()));
    session.set_conditioning(tensor.name, memory.get(), tensor.size_bytes, MCT_DEVICE);
  }
  const DeviceMemory noise = device_zeros(info.noise_count * sizeof(float), stream.get());
  const DeviceMemory latent = device_zeros(info.latent_count * sizeof(float), stream.get());

  auto options = meancache_trt::sized<mct_run_options>();
  options.noise = static_cast<const float*>(noise.get());
  options.noise_count = info.noise_count;
  options.noise_memory = MCT_DEVICE;
  options.stream = stream.get();
  session.enqueue(options);
  meancache_trt::check(mct_session_read_latent(session.get(), static_cast<float*>(latent.get()),
                                               info.latent_count, MCT_DEVICE));
  check(cudaStreamSynchronize(stream.get()));
  std::printf("%zu floats of latent are on the device after %lld evaluations\n", info.latent_count,
              static_cast<long long>(info.budget));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: cuda_embed BUNDLE\n");
    return 2;
  }
  try {
    embed(arguments[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
