// What the loop asks of a backend, the mirror of meancache/runtime.py: load a graph, hold tensors,
// bind calls and enqueue them.
//
// A backend is a Runtime in one translation unit of its own and a line in backends.cpp. Everything
// above this file is the same on every device. To add one on a GPU:
// - tensors are device memory of the runtime, 256-byte aligned; `write` and `read` take host or
//   device pointers and put their copies on the stream;
// - `bind` is called once for each evaluation and component, `sequence` once for a whole loop and
//   once for each evaluation: the place for contexts and for CUDA graphs;
// - `enqueue` and the copies are ordered by the stream that they are given, where null is the
//   runtime's own; nothing waits but `synchronize` and reads into host memory;
// - `load` is given the bundle and the component's name: what it needs to find a plan and check it.

#ifndef MEANCACHE_TRT_HOST_BACKEND_HPP
#define MEANCACHE_TRT_HOST_BACKEND_HPP

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bundle.hpp"
#include "manifest.hpp"

namespace mct {

using Stream = void*;  // a backend's own kind of queue; null is its default one

std::size_t bytes_of(mct_dtype dtype);
// The number of elements. Throws a bundle error where memory could never hold them.
std::size_t elements_of(const Shape& shape);

// Memory that a runtime owns, of fixed shape and type.
class Tensor {
 public:
  Tensor(Shape shape, mct_dtype dtype) : shape_(std::move(shape)), dtype_(dtype) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  virtual ~Tensor() = default;

  const Shape& shape() const { return shape_; }
  mct_dtype dtype() const { return dtype_; }
  std::size_t size_bytes() const { return elements_of(shape_) * bytes_of(dtype_); }

  // Copy size_bytes() in or out. Device pointers are only handed to runtimes that are on a device.
  // A read into host memory waits for the work before it.
  virtual void write(const void* source, mct_memory memory, Stream stream) = 0;
  virtual void read(void* target, mct_memory memory, Stream stream) const = 0;
  // The same memory, row-major, in another shape of as many elements.
  virtual std::shared_ptr<Tensor> view(Shape shape) const = 0;

 private:
  Shape shape_;
  mct_dtype dtype_;
};

using TensorPtr = std::shared_ptr<Tensor>;
using Bindings = std::map<std::string, TensorPtr>;

// One or more graph executions with every address fixed. It keeps what it is bound to alive.
class Call {
 public:
  virtual ~Call() = default;
  // Start the work in order after what is on the stream; may return before it is done.
  virtual void enqueue(Stream stream) = 0;
};

using CallPtr = std::shared_ptr<Call>;

// A loaded graph that can be bound any number of times, also by several threads at a time.
class Graph {
 public:
  virtual ~Graph() = default;
  // Fix the memory of every input and output, by name.
  virtual CallPtr bind(const Bindings& tensors) = 0;
};

// A graph to load.
struct GraphSource {
  const Bundle& bundle;
  std::string name;  // the component's
  const Component& component;

  // No weights, only elementwise work and moves.
  bool is_light() const { return component.weight_bytes == 0; }
};

struct RuntimeOptions {
  int threads = 0;      // on a CPU; 0: all
  int device = 0;       // of the GPU
  int concurrency = 1;  // sessions that run side by side on a CPU

  bool operator<(const RuntimeOptions& other) const {
    return std::tie(threads, device, concurrency) <
           std::tie(other.threads, other.device, other.concurrency);
  }
};

class Runtime {
 public:
  virtual ~Runtime() = default;

  virtual std::string name() const = 0;
  virtual std::string version() const = 0;  // of the library that executes
  // Whether it has streams and takes device pointers.
  virtual bool is_on_device() const = 0;
  // Which graphs it runs where a bundle has several of one network, the preferred first.
  virtual const std::vector<std::string>& precisions() const = 0;

  virtual std::shared_ptr<Graph> load(const GraphSource& source) = 0;
  virtual TensorPtr zeros(const Shape& shape, mct_dtype dtype) = 0;
  // Calls that always run in this order, as one (a CUDA graph where there is one).
  virtual CallPtr sequence(std::vector<CallPtr> calls);
  virtual void synchronize(Stream stream) = 0;
  // Throws where it lacks what a render of the bundle needs; asked where the choice is left to us.
  virtual void check(const Bundle& /*bundle*/) const {}
};

// The backends that this library was compiled with, in the order in which they are tried.
std::string backend_names();

// Open a backend; an empty name is the first that runs here. Throws an input error for an unknown
// name, a runtime-unavailable error where it cannot run here or was left out. It will load graphs
// of the bundle alone.
std::shared_ptr<Runtime> open_runtime(const std::string& backend, const RuntimeOptions& options,
                                      const Bundle& bundle);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_BACKEND_HPP
