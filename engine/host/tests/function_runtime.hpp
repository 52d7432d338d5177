// A runtime whose graphs are plain functions.

#ifndef MEANCACHE_TRT_HOST_TESTS_FUNCTION_RUNTIME_HPP
#define MEANCACHE_TRT_HOST_TESTS_FUNCTION_RUNTIME_HPP

#include <cstring>
#include <functional>

#include "backend.hpp"

namespace mct {

class FunctionTensor : public Tensor {
 public:
  explicit FunctionTensor(const Shape& shape)
      : Tensor(shape, MCT_FLOAT32), values(elements_of(shape)) {}
  void write(const void* source, mct_memory, Stream) override {
    std::memcpy(values.data(), source, size_bytes());
  }
  void read(void* target, mct_memory, Stream) const override {
    std::memcpy(target, values.data(), size_bytes());
  }
  TensorPtr view(Shape) const override { return nullptr; }

  std::vector<float> values;
};

inline std::vector<float>& values_of(const Bindings& tensors, const std::string& name) {
  return static_cast<FunctionTensor&>(*tensors.at(name)).values;
}

using Work = std::function<void(const Bindings&)>;

class FunctionCall : public Call {
 public:
  FunctionCall(Work work, Bindings tensors)
      : work_(std::move(work)), tensors_(std::move(tensors)) {}
  void enqueue(Stream) override { work_(tensors_); }

 private:
  Work work_;
  Bindings tensors_;
};

class FunctionGraph : public Graph {
 public:
  explicit FunctionGraph(Work work) : work_(std::move(work)) {}
  CallPtr bind(const Bindings& tensors) override {
    return std::make_shared<FunctionCall>(work_, tensors);
  }

 private:
  Work work_;
};

class FunctionRuntime : public Runtime {
 public:
  std::string name() const override { return "functions"; }
  std::string version() const override { return "0"; }
  bool is_on_device() const override { return false; }
  const std::vector<std::string>& precisions() const override { return precisions_; }
  std::shared_ptr<Graph> load(const GraphSource&) override { return nullptr; }
  TensorPtr zeros(const Shape& shape, mct_dtype) override {
    return std::make_shared<FunctionTensor>(shape);
  }
  void synchronize(Stream) override {}

 private:
  std::vector<std::string> precisions_ = {"float32"};
};

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_TESTS_FUNCTION_RUNTIME_HPP
