// A libcuda.so.1 of our own, so that the real calls are made where there is no GPU: one GPU, whose
// work is done when it is enqueued, or noted where a stream captures. It is strict: what needs a
// current context has to have one, and nothing is allocated, freed or waited for in a capture.
//
// Every call that does something to a stream is written to a log, and objects are counted.

#include <cuda.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

// Something on a stream: its name in the log, and what it does.
struct Work {
  std::string name;
  std::function<void()> run;
};

struct CUstream_st {
  bool is_capturing = false;
  std::vector<Work> captured;
};
struct CUevent_st {};
struct CUctx_st {};
struct CUgraph_st {
  std::vector<Work> work;
};
struct CUgraphExec_st {
  std::vector<Work> work;
};

namespace {

CUctx_st primary;
thread_local std::vector<CUcontext> current;
std::set<CUstream> streams;
std::map<std::string, int> live;
std::map<std::string, CUresult> failures;  // by function, for its next call
std::string log_text;
int retained = 0;

bool is_capturing() {
  for (CUstream stream : streams) {
    if (stream->is_capturing) {
      return true;
    }
  }
  return false;
}

// What a call is to return before it does anything.
CUresult checked(const char* name, bool is_legal_in_capture = true) {
  if (const auto failure = failures.find(name); failure != failures.end()) {
    const CUresult status = failure->second;
    failures.erase(failure);
    return status;
  }
  if (current.empty() || current.back() != &primary || retained == 0) {
    return CUDA_ERROR_INVALID_CONTEXT;
  }
  return !is_legal_in_capture && is_capturing() ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
                                                : CUDA_SUCCESS;
}

void put(CUstream stream, const std::string& name, const std::function<void()>& run = nullptr) {
  if (stream->is_capturing) {
    stream->captured.push_back({name, run});
    return;
  }
  log_text += name + " ";
  if (run) {
    run();
  }
}

CUresult copy(const char* name, CUstream stream, void* target, const void* source,
              std::size_t size) {
  const CUresult status = checked(name);
  if (status == CUDA_SUCCESS) {
    std::memcpy(target, source, size);
    put(stream, "copy");
  }
  return status;
}

}  // namespace

extern "C" {

// For the tests.
const char* fake_log() { return log_text.c_str(); }
void fake_forget() { log_text.clear(); }
void fake_fail(const char* name, int status) { failures[name] = static_cast<CUresult>(status); }
int fake_live(const char* kind) { return kind == nullptr ? retained : live[kind]; }
void fake_work(CUstream stream, const char* name) { put(stream, name); }
bool fake_is_capturing(CUstream stream) { return stream->is_capturing; }
void fake_run(CUstream stream, const char* name, const std::function<void()>* run) {
  put(stream, name, *run);
}

CUresult cuInit(unsigned) {
  const auto failure = failures.find("cuInit");
  if (failure == failures.end()) {
    return CUDA_SUCCESS;
  }
  const CUresult status = failure->second;
  failures.erase(failure);
  return status;
}
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = 7 + index, CUDA_SUCCESS; }
CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  std::strncpy(name, "Fake GPU", static_cast<std::size_t>(size));
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 8 : 9;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  ++retained;
  return *context = &primary, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) { return --retained, CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { return current.push_back(context), CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext* context) {
  *context = current.back();
  return current.pop_back(), CUDA_SUCCESS;
}
CUresult cuCtxSynchronize() {
  log_text += "synchronize ";
  return checked("cuCtxSynchronize", false);
}
CUresult cuGetErrorName(CUresult status, const char** name) {
  *name = status == CUDA_ERROR_LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** words) { return *words = "words", CUDA_SUCCESS; }
CUresult cuMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = std::size_t{20} << 30;
  *total = std::size_t{24} << 30;
  return checked("cuMemGetInfo");
}
CUresult cuMemAlloc(CUdeviceptr* address, std::size_t size) {
  const CUresult status = checked("cuMemAlloc", false);
  if (status == CUDA_SUCCESS) {
    *address = reinterpret_cast<CUdeviceptr>(std::aligned_alloc(256, (size / 256 + 1) * 256));
    ++live["memory"];
  }
  return status;
}
CUresult cuMemFree(CUdeviceptr address) {
  const CUresult status = checked("cuMemFree", false);
  if (status == CUDA_SUCCESS) {
    std::free(reinterpret_cast<void*>(address));
    --live["memory"];
  }
  return status;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, std::size_t size,
                           CUstream stream) {
  return copy("cuMemcpyHtoDAsync", stream, reinterpret_cast<void*>(target), source, size);
}
CUresult cuMemcpyDtoHAsync(void* target, CUdeviceptr source, std::size_t size, CUstream stream) {
  return copy("cuMemcpyDtoHAsync", stream, target, reinterpret_cast<const void*>(source), size);
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, std::size_t size,
                           CUstream stream) {
  return copy("cuMemcpyDtoDAsync", stream, reinterpret_cast<void*>(target),
              reinterpret_cast<const void*>(source), size);
}
CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, std::size_t size, CUstream) {
  std::memset(reinterpret_cast<void*>(target), value, size);
  return checked("cuMemsetD8Async");
}
CUresult cuStreamCreate(CUstream* stream, unsigned) {
  const CUresult status = checked("cuStreamCreate");
  if (status == CUDA_SUCCESS) {
    *stream = new CUstream_st;
    streams.insert(*stream);
    ++live["stream"];
  }
  return status;
}
CUresult cuStreamDestroy(CUstream stream) {
  streams.erase(stream);
  delete stream;
  return --live["stream"], CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream) { return checked("cuStreamSynchronize", false); }
CUresult cuStreamWaitEvent(CUstream stream, CUevent, unsigned) {
  const CUresult status = checked("cuStreamWaitEvent");
  if (status == CUDA_SUCCESS) {
    put(stream, "wait");
  }
  return status;
}
CUresult cuEventCreate(CUevent* event, unsigned) {
  *event = new CUevent_st;
  return ++live["event"], checked("cuEventCreate");
}
CUresult cuEventDestroy(CUevent event) {
  delete event;
  return --live["event"], CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent, CUstream stream) {
  const CUresult status = checked("cuEventRecord");
  if (status == CUDA_SUCCESS) {
    put(stream, "mark");
  }
  return status;
}
CUresult cuEventSynchronize(CUevent) { return checked("cuEventSynchronize", false); }
CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode) {
  const CUresult status = checked("cuStreamBeginCapture", false);
  if (status == CUDA_SUCCESS) {
    stream->is_capturing = true;
  }
  return status;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  const CUresult status = checked("cuStreamEndCapture");
  stream->is_capturing = false;
  *graph = status == CUDA_SUCCESS ? new CUgraph_st{stream->captured} : nullptr;
  live["graph"] += *graph != nullptr ? 1 : 0;
  stream->captured.clear();
  return status;
}
CUresult cuGraphInstantiate(CUgraphExec* native, CUgraph graph, unsigned long long) {
  const CUresult status = checked("cuGraphInstantiate");
  if (status == CUDA_SUCCESS) {
    *native = new CUgraphExec_st{graph->work};
    ++live["executable"];
  }
  return status;
}
CUresult cuGraphDestroy(CUgraph graph) {
  delete graph;
  return --live["graph"], CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec native, CUstream stream) {
  const CUresult status = checked("cuGraphLaunch");
  if (status == CUDA_SUCCESS) {
    std::string name = "launch(";
    for (const Work& part : native->work) {
      name += part.name;
    }
    put(stream, name + ")", [work = native->work] {
      for (const Work& part : work) {
        if (part.run) {
          part.run();
        }
      }
    });
  }
  return status;
}
CUresult cuGraphExecDestroy(CUgraphExec native) {
  delete native;
  return --live["executable"], CUDA_SUCCESS;
}

}  // extern "C"
