// The GPU by a driver of our own, fake_cuda.cpp: order, captures, memory, and every status.

#include <dlfcn.h>

#include "check.hpp"
#include "tensorrt/device_tensor.hpp"

namespace {

using mct::Device;
using mct::Stream;

// What the driver noted.
class Driver {
 public:
  Driver() : library_(::dlopen("libcuda.so.1", RTLD_NOW)) {}
  bool is_fake() const { return library_ != nullptr && ::dlsym(library_, "fake_log") != nullptr; }
  std::string log() const {
    std::string text = function<const char*()>("fake_log")();
    function<void()>("fake_forget")();
    return text;
  }
  void fail(const char* name, CUresult status) const {
    function<void(const char*, int)>("fake_fail")(name, status);
  }
  int live(const char* kind) const { return function<int(const char*)>("fake_live")(kind); }
  void work(Stream stream, const char* name) const {
    function<void(Stream, const char*)>("fake_work")(stream, name);
  }
  // A host's own.
  CUstream stream() const {
    CUstream made = nullptr;
    function<CUresult(CUstream*, unsigned)>("cuStreamCreate")(&made, 0);
    return made;
  }
  void destroy(CUstream stream) const {
    function<CUresult(CUstream)>("cuStreamDestroy_v2")(stream);
  }

 private:
  template <class Signature>
  Signature* function(const char* name) const {
    return reinterpret_cast<Signature*>(::dlsym(library_, name));
  }

  void* library_;
};

void a_gpu_is_found_by_its_index(const Driver& driver) {
  const auto device = std::make_shared<Device>(0);
  expect(device->product() == "Fake GPU" && device->compute_capability() == "8.9",
         "says what it is");
  expect_error([] { Device(1); }, "expected an NVIDIA GPU, but there are 1 GPUs, found no index 1");
  expect_error([] { Device(-1); }, "found no index -1");
  driver.fail("cuInit", CUDA_ERROR_NO_DEVICE);
  expect_error([] { Device(0); }, "the NVIDIA driver is there, but cuInit returned 100; use a");
  driver.fail("cuStreamCreate", CUDA_ERROR_UNKNOWN);
  expect_error([] { Device(0); }, "CUDA could not make a stream: CUDA_ERROR (words); after an");
}

void work_on_streams_of_the_host_waits_for_what_was_before(const Driver& driver) {
  const auto device = std::make_shared<Device>(0);
  CUstream host = nullptr;
  {
    const Device::Use use(*device);
    host = driver.stream();
  }
  const auto put = [&](Stream stream) {
    device->in_order(stream, [&](CUstream on) {
      expect(stream == nullptr ? on == device->own_stream() : on == stream, "on its stream");
      driver.work(on, "work");
    });
  };
  driver.log();
  put(nullptr);
  put(nullptr);
  expect(driver.log() == "work mark work mark ", "our own stream is in order by itself");
  put(host);
  put(host);
  put(nullptr);
  // A handle tells nothing: the host may have destroyed the stream that had it before.
  expect(driver.log() == "wait work mark wait work mark wait work mark ", "others wait");
  expect_error([&] { device->in_order(host, [](CUstream) { throw std::runtime_error("no"); }); },
               "no");
  expect(driver.log() == "wait mark ", "what failed midway is waited for, too");
  expect_error([&] { put(CU_STREAM_LEGACY); }, "found a default stream, which cannot be captured");
  expect_error([&] { put(CU_STREAM_PER_THREAD); }, "found a default stream");
  device->wait();
  const Device::Use use(*device);
  driver.destroy(host);
}

void captured_work_is_replayed_on_any_stream(const Driver& driver) {
  const auto device = std::make_shared<Device>(0);
  driver.log();
  const auto graph = device->capture([&](Stream on) {
    driver.work(on, "a");
    driver.work(on, "b");
  });
  expect(driver.log().empty(), "a capture runs nothing");
  expect(driver.live("graph") == 0 && driver.live("executable") == 1, "what it made stays");
  device->in_order(nullptr, [&](CUstream on) { graph->launch(on); });
  expect(driver.log() == "launch(ab) mark ", "all of it is launched");
}

void a_capture_that_fails_leaves_the_stream_usable(const Driver& driver) {
  const auto device = std::make_shared<Device>(0);
  expect_error([&] { device->capture([](Stream) { throw std::runtime_error("refused"); }); },
               "refused");
  // As TensorRT would at a first enqueue.
  expect_error([&] { device->capture([&](Stream) { device->allocate(1); }); },
               "CUDA could not allocate memory: ");
  for (const char* name : {"cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"}) {
    driver.fail(name, CUDA_ERROR_UNKNOWN);
    expect_error([&] { device->capture([](Stream) {}); }, "CUDA could not ");
  }
  expect(driver.live("graph") == 0 && driver.live("executable") == 0, "nothing is left of them");
  driver.log();
  const auto graph = device->capture([&](Stream on) { driver.work(on, "a"); });
  device->in_order(nullptr, [&](CUstream on) { graph->launch(on); });
  expect(driver.log() == "launch(a) mark ", "the next one succeeds");
}

void memory_is_freed_when_nothing_uses_it(const Driver& driver) {
  auto device = std::make_shared<Device>(0);
  std::shared_ptr<void> memory = device->allocate(1000);
  expect(reinterpret_cast<std::uintptr_t>(memory.get()) % mct::alignment_bytes == 0, "is aligned");
  expect(device->allocate(0) != nullptr, "has an address for nothing");
  expect(driver.live("memory") == 1, "goes with its object");
  driver.fail("cuMemAlloc", CUDA_ERROR_OUT_OF_MEMORY);
  expect_error([&] { device->allocate(std::size_t{30} << 30); },
               "expected 30720 MiB of memory on the GPU, found 20480 MiB free; close other "
               "programs, render smaller pictures, or plan with --weight-streaming");
  driver.log();
  device.reset();
  expect(driver.live(nullptr) == 1, "the GPU stays open for it");
  memory.reset();
  expect(driver.log() == "synchronize ", "waits first");
}

void tensors_are_written_and_read_from_both_sides(const Driver& driver) {
  const auto device = std::make_shared<Device>(0);
  const auto tensor = mct::DeviceTensor::zeros(device, {2, 2}, MCT_FLOAT32);
  const auto values_of = [](const mct::Tensor& read) {
    std::vector<float> values(4, -1);
    read.read(values.data(), MCT_HOST, nullptr);
    return values;
  };
  expect(values_of(*tensor) == std::vector<float>(4), "zeros at first");
  const std::vector<float> values = {1, 2, 3, 4};
  driver.log();
  tensor->write(values.data(), MCT_HOST, nullptr);
  expect(driver.log() == "copy mark ", "a copy in order");
  expect(values_of(*tensor) == values, "what was written");
  const auto other = mct::DeviceTensor::zeros(device, {4}, MCT_FLOAT32);
  other->write(tensor->pointer(), MCT_DEVICE, nullptr);
  expect(values_of(*other) == values, "from device memory");
  const auto third = mct::DeviceTensor::zeros(device, {4}, MCT_FLOAT32);
  other->read(third->pointer(), MCT_DEVICE, nullptr);
  expect(values_of(*third) == values, "to device memory");
  const mct::TensorPtr view = third->view({2, 2});
  expect(view->shape() == mct::Shape({2, 2}) && values_of(*view) == values, "the same memory");
  const auto empty = mct::DeviceTensor::zeros(device, {0, 4}, MCT_FLOAT32);
  empty->write(nullptr, MCT_HOST, nullptr);
  expect(empty->pointer() != nullptr, "has an address for nothing");
  for (const char* name : {"cuMemcpyHtoDAsync", "cuStreamSynchronize"}) {
    driver.fail(name, CUDA_ERROR_LAUNCH_FAILED);
    expect_error([&] { tensor->write(values.data(), MCT_HOST, nullptr); }, "CUDA could not ");
  }
}

void every_status_is_an_error(const Driver& driver) {
  const auto device = std::make_shared<Device>(0);
  driver.fail("cuEventSynchronize", CUDA_ERROR_LAUNCH_FAILED);
  expect_error([&] { device->wait(); },
               "CUDA could not finish its work: CUDA_ERROR_LAUNCH_FAILED (words); after an error "
               "of a kernel this process cannot use the GPU any more: start it again");
  driver.fail("cuCtxSynchronize", CUDA_ERROR_LAUNCH_FAILED);
  expect_error([&] { device->synchronize(); }, "CUDA could not finish its work");
  driver.fail("cuEventRecord", CUDA_ERROR_LAUNCH_FAILED);
  expect_error([&] { device->in_order(nullptr, [](CUstream) {}); }, "could not record an event");
  driver.fail("cuMemGetInfo", CUDA_ERROR_LAUNCH_FAILED);
  expect_error([&] { device->free_bytes(); }, "could not ask for free memory");
}

}  // namespace

int main() {
  const Driver driver;
  if (!driver.is_fake()) {
    std::cerr << "FAILED: this test needs fake_cuda.cpp as libcuda.so.1\n";
    return 1;
  }
  a_gpu_is_found_by_its_index(driver);
  work_on_streams_of_the_host_waits_for_what_was_before(driver);
  captured_work_is_replayed_on_any_stream(driver);
  a_capture_that_fails_leaves_the_stream_usable(driver);
  memory_is_freed_when_nothing_uses_it(driver);
  tensors_are_written_and_read_from_both_sides(driver);
  every_status_is_an_error(driver);
  for (const char* kind : {"memory", "stream", "graph", "executable"}) {
    expect(driver.live(kind) == 0, std::string("no leak of a ") + kind);
  }
  expect(driver.live(nullptr) == 0, "every GPU that was opened is closed");
  return failures == 0 ? 0 : 1;
}
