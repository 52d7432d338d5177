// Tensors in device memory, at fixed addresses.

#ifndef MEANCACHE_TRT_HOST_TENSORRT_DEVICE_TENSOR_HPP
#define MEANCACHE_TRT_HOST_TENSORRT_DEVICE_TENSOR_HPP

#include "backend.hpp"
#include "tensorrt/cuda.hpp"

namespace mct {

class DeviceTensor : public Tensor {
 public:
  DeviceTensor(Shape shape, mct_dtype dtype, std::shared_ptr<Device> device,
               std::shared_ptr<void> memory)
      : Tensor(std::move(shape), dtype), device_(std::move(device)), memory_(std::move(memory)) {}

  // A new one. Throws a render error where there is too little memory.
  static std::shared_ptr<DeviceTensor> zeros(std::shared_ptr<Device> device, const Shape& shape,
                                             mct_dtype dtype);

  void* pointer() const { return memory_.get(); }
  // Host memory is the caller's again when these return; device memory is used when the work runs.
  void write(const void* source, mct_memory memory, Stream stream) override;
  void read(void* target, mct_memory memory, Stream stream) const override;
  TensorPtr view(Shape shape) const override;

 private:
  std::shared_ptr<Device> device_;
  std::shared_ptr<void> memory_;
};

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_TENSORRT_DEVICE_TENSOR_HPP
