// The library of TensorRT itself, as far as it goes without a GPU.
//
// usage: tensorrt_test SCRATCH_FOLDER

#include <dlfcn.h>

#include <filesystem>

#include "check.hpp"
#include "files.hpp"
#include "tensorrt/cuda.hpp"
#include "tensorrt/library.hpp"

namespace {

void headers_and_library_have_one_version() {
  mct::check_headers(110100, 110100);
  expect_error([] { mct::check_headers(110100, 10701); },
               " 11.1.0, whose headers this was compiled with, found the library 1.7.1; ");
  expect_error([] { mct::check_headers(110100, 110101); }, "found the library 11.1.1; ");
}

void the_log_keeps_errors_once_and_forgets_what_it_said() {
  mct::ErrorLog log;
  expect(log.reason() == "it does not say why", "nothing at first");
  log.log(nvinfer1::ILogger::Severity::kWARNING, "slow");
  log.log(nvinfer1::ILogger::Severity::kERROR, "one");
  log.log(nvinfer1::ILogger::Severity::kINTERNAL_ERROR, "two");
  log.log(nvinfer1::ILogger::Severity::kERROR, "one");
  expect(log.reason() == "one; two", "errors, oldest first");
  expect(log.reason() == "it does not say why", "each is said once");
}

void shapes_go_there_and_back() {
  const mct::Shape shape = {2, -1, 64};
  expect(mct::shape_of(mct::dims_of(shape)) == shape, "the same shape");
  expect(mct::shape_of(mct::dims_of({})).empty(), "a scalar");
  expect_error([] { mct::dims_of(mct::Shape(9, 1)); }, "a tensor has at most 8 axes");
}

// The library is called here even where its headers are another's: what is called has the same
// place in both, which the backend itself does not rely on.
void a_file_that_is_no_plan_is_refused_with_the_words_of_tensorrt(const std::string& folder) {
  mct::NativeRuntime runtime;
  mct::PlanRecord record;
  record.flavour = mct::library_flavour();
  record.version = mct::library_version();
  record.file.path = "plans/a.plan";
  const std::filesystem::path plan = folder + "/a.plan";
  expect(mct::keep_file(plan, std::string(4096, 'x')), "a file");
  const auto load = [&] { runtime.engine(plan, record, "a.mcb", "8.9"); };
  const std::string words = record.flavour + " " + record.version +
                            " does not take plans/a.plan on this GPU of compute capability 8.9: ";
  expect_error(load, words);
  expect_error(load, "; build it again with `meancache-trt plan a.mcb`");
  try {
    load();
  } catch (const mct::Error& error) {
    std::cout << error.what() << '\n';
    expect(std::string(error.what()).find("it does not say why") == std::string::npos,
           "TensorRT says why");
  }
  std::filesystem::remove(plan);
  expect_error(load, "cannot read " + plan.string() + ": No such file or directory");
}

void without_a_driver_the_gpu_is_missed_at_once() {
  if (::dlopen("libcuda.so.1", RTLD_NOW) != nullptr) {
    expect_error([] { mct::Device(1 << 20); }, "expected an NVIDIA GPU, but ");
    return;
  }
  expect_error([] { mct::Device(0); },
               "expected an NVIDIA GPU, but there is no NVIDIA driver (libcuda.so.1 is not found); "
               "use a backend that runs on the CPU, such as openvino, or see `meancache-trt "
               "doctor`");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "tensorrt_test_scratch";
  std::filesystem::create_directories(folder);
  headers_and_library_have_one_version();
  the_log_keeps_errors_once_and_forgets_what_it_said();
  shapes_go_there_and_back();
  without_a_driver_the_gpu_is_missed_at_once();
  a_file_that_is_no_plan_is_refused_with_the_words_of_tensorrt(folder);
  return failures == 0 ? 0 : 1;
}
