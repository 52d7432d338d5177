// Which backends were compiled in.

#include <functional>

#include "backend.hpp"
#include "error.hpp"

namespace mct {

#if defined(MEANCACHE_TRT_HAS_OPENVINO)
std::shared_ptr<Runtime> open_openvino(const RuntimeOptions& options, const Bundle& bundle);
#endif
#if defined(MEANCACHE_TRT_HAS_TENSORRT)
std::shared_ptr<Runtime> open_tensorrt(const RuntimeOptions& options, const Bundle& bundle);
#endif

namespace {

struct Backend {
  std::string name;
  std::function<std::shared_ptr<Runtime>(const RuntimeOptions&, const Bundle&)> open;
};

const std::vector<Backend>& backends() {
  static const std::vector<Backend> table = {
#if defined(MEANCACHE_TRT_HAS_TENSORRT)
      {MEANCACHE_TRT_TENSORRT_FLAVOUR, open_tensorrt},
#endif
#if defined(MEANCACHE_TRT_HAS_OPENVINO)
      {"openvino", open_openvino},
#endif
  };
  return table;
}

std::shared_ptr<Runtime> open_first(const RuntimeOptions& options, const Bundle& bundle) {
  std::string reasons;
  for (const Backend& backend : backends()) {
    try {
      std::shared_ptr<Runtime> runtime = backend.open(options, bundle);
      runtime->check(bundle);
      return runtime;
    } catch (const Error& error) {
      reasons += "; " + backend.name + ": " + error.what();
    }
  }
  throw Error(MCT_RUNTIME_UNAVAILABLE_ERROR,
              "no backend of this library runs here" +
                  (reasons.empty() ? "; it was built without any: configure it where OpenVINO or "
                                     "TensorRT is found"
                                   : reasons));
}

class CallSequence : public Call {
 public:
  explicit CallSequence(std::vector<CallPtr> calls) : calls_(std::move(calls)) {}
  void enqueue(Stream stream) override {
    for (const CallPtr& call : calls_) {
      call->enqueue(stream);
    }
  }

 private:
  std::vector<CallPtr> calls_;
};

}  // namespace

std::size_t bytes_of(mct_dtype dtype) {
  switch (dtype) {
    case MCT_FLOAT64:
    case MCT_INT64:
      return 8;
    case MCT_FLOAT32:
    case MCT_INT32:
      return 4;
    case MCT_FLOAT16:
    case MCT_BFLOAT16:
      return 2;
    case MCT_BOOL:
      break;
  }
  return 1;
}

std::size_t elements_of(const Shape& shape) {
  constexpr std::size_t most = std::size_t{1} << 44;  // 16 Ti elements
  std::size_t count = 1;
  for (const std::int64_t extent : shape) {
    const auto size = static_cast<std::size_t>(extent);
    if (extent < 0 || (size != 0 && count > most / size)) {
      throw Error(MCT_BUNDLE_ERROR, "a tensor of shape " + tuple_of(shape) +
                                        " cannot be held in memory; build the bundle again");
    }
    count *= size;
  }
  return count;
}

CallPtr Runtime::sequence(std::vector<CallPtr> calls) {
  return std::make_shared<CallSequence>(std::move(calls));
}

std::string backend_names() {
  std::string names;
  for (const Backend& backend : backends()) {
    names += (names.empty() ? "" : ",") + backend.name;
  }
  return names;
}

std::shared_ptr<Runtime> open_runtime(const std::string& name, const RuntimeOptions& options,
                                      const Bundle& bundle) {
  if (name.empty()) {
    return open_first(options, bundle);
  }
  for (const Backend& backend : backends()) {
    if (backend.name == name) {
      return backend.open(options, bundle);
    }
  }
  const std::string known = backend_names();
  throw Error(MCT_INPUT_ERROR,
              "unknown backend " + repr_of(name) + "; expected one of " +
                  (known.empty() ? "none: this library was built without any" : known));
}

}  // namespace mct
