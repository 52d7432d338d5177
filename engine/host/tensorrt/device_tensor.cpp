#include "tensorrt/device_tensor.hpp"

#include <algorithm>

namespace mct {

namespace {

CUdeviceptr address_of(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace

std::shared_ptr<DeviceTensor> DeviceTensor::zeros(std::shared_ptr<Device> device,
                                                  const Shape& shape, mct_dtype dtype) {
  const std::size_t size = std::max(elements_of(shape) * bytes_of(dtype), std::size_t{1});
  std::shared_ptr<void> memory = device->allocate(size);
  device->in_order(nullptr, [&](CUstream on) {
    device->check(device->cuda().cuMemsetD8Async(address_of(memory.get()), 0, size, on),
                  "clear memory");
  });
  return std::make_shared<DeviceTensor>(shape, dtype, std::move(device), std::move(memory));
}

void DeviceTensor::write(const void* source, mct_memory memory, Stream stream) {
  const std::size_t size = size_bytes();
  if (size == 0) {
    return;
  }
  device_->in_order(stream, [&](CUstream on) {
    const CudaFunctions& cuda = device_->cuda();
    if (memory == MCT_DEVICE) {
      device_->check(cuda.cuMemcpyDtoDAsync(address_of(pointer()), address_of(source), size, on),
                     "copy on the GPU");
      return;
    }
    device_->check(cuda.cuMemcpyHtoDAsync(address_of(pointer()), source, size, on),
                   "copy to the GPU");
    device_->check(cuda.cuStreamSynchronize(on), "finish its work");
  });
}

void DeviceTensor::read(void* target, mct_memory memory, Stream stream) const {
  const std::size_t size = size_bytes();
  if (size == 0) {
    return;
  }
  device_->in_order(stream, [&](CUstream on) {
    const CudaFunctions& cuda = device_->cuda();
    if (memory == MCT_DEVICE) {
      device_->check(cuda.cuMemcpyDtoDAsync(address_of(target), address_of(pointer()), size, on),
                     "copy on the GPU");
      return;
    }
    device_->check(cuda.cuMemcpyDtoHAsync(target, address_of(pointer()), size, on),
                   "copy from the GPU");
    device_->check(cuda.cuStreamSynchronize(on), "finish its work");
  });
}

TensorPtr DeviceTensor::view(Shape shape) const {
  return std::make_shared<DeviceTensor>(std::move(shape), dtype(), device_, memory_);
}

}  // namespace mct
