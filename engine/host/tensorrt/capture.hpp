// Calls that become one CUDA graph, and the memory for activations that they share: the mirror of
// engine/tensorrt/calls.py and the block of contexts.py. Knows neither CUDA nor TensorRT.

#ifndef MEANCACHE_TRT_HOST_TENSORRT_CAPTURE_HPP
#define MEANCACHE_TRT_HOST_TENSORRT_CAPTURE_HPP

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend.hpp"

namespace mct {

// What TensorRT asks of the address of every input, output and activation block (NvInferRuntime.h,
// setTensorAddress); CUDA's own allocations have it.
constexpr std::size_t alignment_bytes = 256;

// One block of device memory for all contexts of a runtime, whose work is in one order.
class ActivationBlock {
 public:
  using Allocate = std::function<std::shared_ptr<void>(std::size_t)>;

  // `wait` returns when nothing uses the block any more.
  ActivationBlock(Allocate allocate, std::function<void()> wait)
      : allocate_(std::move(allocate)), wait_(std::move(wait)) {}

  // Throws a render error where the last growth failed.
  void* pointer() const;
  std::size_t size_bytes() const { return memory_ ? size_bytes_ : 0; }
  // How often it moved: what was captured before holds an address that is gone.
  std::uint64_t generation() const { return generation_; }
  // Make it at least so large. Waits where it has to grow.
  void reserve(std::size_t size_bytes);

 private:
  Allocate allocate_;
  std::function<void()> wait_;
  std::shared_ptr<void> memory_;
  std::size_t size_bytes_ = 0;
  std::uint64_t generation_ = 0;
};

// A call as a sequence sees it. Nothing here orders or waits.
class Startable {
 public:
  virtual ~Startable() = default;
  virtual void start(Stream stream) = 0;
  // That of the activation block.
  virtual std::uint64_t generation() const = 0;
  // Why its work cannot become part of a CUDA graph; nothing where nothing speaks against it.
  virtual std::optional<std::string> why_not_captured() const = 0;
};

// What was captured. Addresses in it are those of the capture.
class CapturedWork {
 public:
  virtual ~CapturedWork() = default;
  virtual void launch(Stream stream) = 0;
};

// Records what `enqueue` puts on the stream that it is handed, instead of running it. Throws what
// `enqueue` throws, and can be used again then.
using Capture =
    std::function<std::unique_ptr<CapturedWork>(const std::function<void(Stream)>& enqueue)>;

// Calls in order: run one by one at first, captured at the second use, then replayed.
//
// The first run is a run like any other, whose results count: it lets TensorRT allocate and compile
// whatever it does at a first enqueue, which a capture cannot hold. So also after the activation
// block has moved. What cannot be captured stays a list of calls, and says so in `problem`.
class CapturedSequence {
 public:
  enum class Mode { unused, plain, captured };

  CapturedSequence(std::vector<std::shared_ptr<Startable>> calls, Capture capture)
      : calls_(std::move(calls)), capture_(std::move(capture)) {}

  void start(Stream stream);
  // How the last start ran.
  Mode mode() const { return mode_; }
  const std::optional<std::string>& problem() const { return problem_; }

 private:
  void run_plainly(Stream stream);
  void capture();

  std::vector<std::shared_ptr<Startable>> calls_;
  Capture capture_;
  std::unique_ptr<CapturedWork> graph_;  // last: it goes before what it runs
  std::uint64_t generation_ = 0;         // of the activation block at the last plain run
  Mode mode_ = Mode::unused;
  std::optional<std::string> problem_;
};

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_TENSORRT_CAPTURE_HPP
