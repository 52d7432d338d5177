// Sidecars of plans, the shapes that they hold, and the file of compiled kernels.
//
// usage: plans_test SCRATCH_FOLDER

#include "tensorrt/plans.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "check.hpp"
#include "files.hpp"
#include "tensorrt/kernel_cache.hpp"

namespace {

using mct::PlanRecord;
using mct::Shapes;

const std::string sidecar = R"({
 "schema": "meancache-trt/plan/1",
 "key": {
  "component": "transformer/bfloat16", "graph": "00", "precision": "bfloat16",
  "profile": {"x": {"min": [1, 16, 4], "opt": [1, 16, 4], "max": [2, 64, 4]}},
  "flavour": "tensorrt_rtx", "version": "1.7.1.116", "compute_capability": "8.9",
  "options": {"builder_optimization_level": null, "workspace_bytes": null,
   "weight_streaming": true, "hardware_compatibility": "none",
   "tiling_optimization_level": "none", "max_aux_streams": 2}
 },
 "inputs": {"x": {"dtype": "bfloat16", "shape": [-1, -1, 4]},
  "t": {"dtype": "float32", "shape": [1]}},
 "outputs": {"v": {"dtype": "float32", "shape": [-1, -1, 4]}},
 "file": {"path": "plans/a.plan", "size_bytes": 3, "sha256": "11"},
 "fused_attention": 1, "build_s": 2.5, "peak_memory_bytes": 7,
 "built_at": "2026-01-01T00:00:00+00:00"
})";

std::string with(const std::string& old, const std::string& next) {
  std::string text = sidecar;
  text.replace(text.find(old), old.size(), next);
  return text;
}

void a_sidecar_is_read() {
  const PlanRecord record = mct::parse_plan_record(sidecar);
  expect(record.component == "transformer/bfloat16" && record.graph == "00", "component and graph");
  expect(record.flavour == "tensorrt_rtx" && record.version == "1.7.1.116", "library");
  expect(record.is_weight_streaming, "options");
  expect(record.inputs.at("x").shape == mct::Shape({-1, -1, 4}), "tensors");
  expect(record.file.path == "plans/a.plan" && record.file.sha256 == "11", "file");
}

void what_is_no_sidecar_is_refused_in_the_words_of_the_python_host() {
  const auto refused = [](const std::string& text, const std::string& words) {
    expect_error([&] { mct::parse_plan_record(text); }, words);
  };
  refused(sidecar.substr(0, 40), "not JSON, perhaps truncated: ");
  refused(with("plan/1", "plan/2"), "not a valid planrecord file: ");
  refused(with("\"build_s\": 2.5, ", ""),
          "not a valid planrecord file: Object missing required field `build_s`");
  refused(with("\"none\"", "\"some\""), "$.key.options.hardware_compatibility");
  refused(with("[1, 16, 4]", "[1, 1.5, 4]"), "Expected `int`, got `float`");
  refused(with("\"graph\"", "\"more\": 1, \"graph\""), "Object contains unknown field `more`");
}

void a_plan_serves_its_compute_capability_or_all_from_ampere_on() {
  PlanRecord record = mct::parse_plan_record(sidecar);
  expect(record.serves("8.9") && !record.serves("8.6") && !record.serves("12.0"), "its own alone");
  record.hardware_compatibility = "ampere_plus";
  expect(record.serves("8.0") && record.serves("12.0") && !record.serves("7.5"), "from Ampere on");
}

void the_first_plan_that_holds_the_shapes_is_taken() {
  const PlanRecord narrow = mct::parse_plan_record(sidecar);
  PlanRecord wide = narrow;
  wide.file.path = "plans/wide.plan";
  wide.profile.at("x").max = {4, 64, 4};
  const std::vector<PlanRecord> records = {narrow, wide};
  const auto chosen = [&](const Shapes& shapes) {
    return mct::plan_for("transformer", records, shapes).file.path;
  };
  expect(chosen({{"x", {2, 64, 4}}, {"t", {1}}}) == "plans/a.plan", "both hold: the first");
  expect(chosen({{"x", {3, 64, 4}}, {"t", {1}}}) == "plans/wide.plan", "the one that holds");
  const Shapes large = {{"t", {1}}, {"x", {5, 64, 4}}};
  expect_error([&] { chosen(large); },
               "no plan of transformer holds the shapes t 1, x 5×64×4; planned is x 1×16×4 to "
               "2×64×4; or x 1×16×4 to 4×64×4. Build one with `meancache-trt plan` and wider");
  expect_error([&] { chosen({{"x", {1, 16, 4}}, {"t", {2}}}); }, "holds the shapes t 2");
  expect_error([&] { chosen({{"x", {16, 4}}, {"t", {1}}}); }, "holds the shapes t 1, x 16×4");
}

void an_engine_has_the_tensors_that_its_record_says() {
  const PlanRecord record = mct::parse_plan_record(sidecar);
  mct::check_plan_tensors(record, record.inputs, {{"v", {"float32", {2, -1, 4}}}});
  expect_error(
      [&] { mct::check_plan_tensors(record, record.inputs, {{"v", {"float16", {-1, -1, 4}}}}); },
      "plans/a.plan is not what its record says: expected v float32(-1, -1, 4), found v "
      "float16(-1, -1, 4); build it again with `meancache-trt plan`");
  expect_error([&] { mct::check_plan_tensors(record, record.inputs, {}); }, "found ;");
  expect_error([&] { mct::check_plan_tensors(record, {}, record.outputs); }, "expected t float32");
}

void compiled_kernels_are_kept_and_replaced(const std::string& folder) {
  const mct::KernelCacheFile file("tensorrt_rtx", "1.7.1.116", "NVIDIA GeForce RTX 4090", "8.9",
                                  folder + "/new");
  expect(file.path().filename() == "tensorrt_rtx-1.7.1.116-NVIDIA-GeForce-RTX-4090-8.9.cache",
         "one file a version and GPU: " + file.path().string());
  expect(file.read().empty(), "nothing is there at first");
  expect(file.write("kernels") && file.read() == "kernels", "what is written is read");
  expect(file.write("more") && file.read() == "more", "and replaced");
}

void a_lock_that_another_holds_is_waited_for(const std::string& folder) {
  const mct::KernelCacheFile file("tensorrt_rtx", "1", "GPU", "8.9", folder);
  const std::string lock = file.path().string() + ".lock";
  const int handle = ::open(lock.c_str(), O_RDWR | O_CREAT, 0644);
  expect(::flock(handle, LOCK_EX | LOCK_NB) == 0, "the lock is free");
  const auto start = std::chrono::steady_clock::now();
  std::thread holder([handle, &lock] {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    ::unlink(lock.c_str());  // as filelock does
    ::close(handle);
  });
  expect(file.write("kernels"), "is written once the lock is free");
  expect(std::chrono::steady_clock::now() - start >= std::chrono::milliseconds(200), "and waits");
  holder.join();
}

void a_cache_that_cannot_be_written_is_no_error(const std::string& folder) {
  const mct::KernelCacheFile file("tensorrt_rtx", "1", "GPU", "8.9", folder + "/file/below");
  expect(mct::keep_file(folder + "/file", "no folder"), "a file stands in the way");
  expect(!file.write("kernels") && file.read().empty(), "nothing is kept");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "plans_test_scratch";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  a_sidecar_is_read();
  what_is_no_sidecar_is_refused_in_the_words_of_the_python_host();
  a_plan_serves_its_compute_capability_or_all_from_ampere_on();
  the_first_plan_that_holds_the_shapes_is_taken();
  an_engine_has_the_tensors_that_its_record_says();
  compiled_kernels_are_kept_and_replaced(folder);
  a_lock_that_another_holds_is_waited_for(folder);
  a_cache_that_cannot_be_written_is_no_error(folder);
  return failures == 0 ? 0 : 1;
}
