# What the host is built from: OpenSSL and nlohmann_json always, backends where they are found.

find_package(OpenSSL COMPONENTS Crypto)
find_package(nlohmann_json 3.9 CONFIG)
if(NOT OpenSSL_FOUND OR NOT nlohmann_json_FOUND)
  message(FATAL_ERROR "meancache_trt needs OpenSSL's libcrypto (SHA-256) and nlohmann_json, whose "
                      "Debian packages are libssl-dev and nlohmann-json3-dev; install them")
endif()

set(backends "")
set(left_out "")

if(NOT MEANCACHE_TRT_OPENVINO STREQUAL "OFF")
  # The wheel of a virtual environment in the checkout, where no other OpenVINO is named.
  file(GLOB wheels "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/openvino/cmake")
  find_package(OpenVINO QUIET COMPONENTS Runtime HINTS ${wheels})
endif()
if(TARGET openvino::runtime)
  list(APPEND backends "OpenVINO ${OpenVINO_VERSION}")
elseif(MEANCACHE_TRT_OPENVINO STREQUAL "ON")
  message(FATAL_ERROR "MEANCACHE_TRT_OPENVINO is ON, but OpenVINO is not found; "
                      "set OpenVINO_DIR to the folder of OpenVINOConfig.cmake (of the pip wheel: "
                      "site-packages/openvino/cmake)")
else()
  list(APPEND left_out "OpenVINO (set OpenVINO_DIR)")
endif()

# The seam: engine/host/backend.hpp. A backend is one translation unit, a definition and its
# libraries, added in engine/host/CMakeLists.txt. NVIDIA's driver is not linked: it is loaded when a
# GPU is first asked for.
set(TensorRT_FLAVOUR "")
if(NOT MEANCACHE_TRT_TENSORRT STREQUAL "OFF")
  set(TENSORRT_ROOT "$ENV{TENSORRT_ROOT}" CACHE PATH
    "Where include/ and lib/ of TensorRT or TensorRT for RTX are")
  file(GLOB wheels "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/tensorrt*_libs")
  find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h HINTS "${TENSORRT_ROOT}" PATH_SUFFIXES include)
  # A wheel has no name without a version.
  find_library(TensorRT_LIBRARY
    NAMES nvinfer tensorrt_rtx libnvinfer.so.11 libnvinfer.so.10 libtensorrt_rtx.so.1
    HINTS "${TENSORRT_ROOT}" ${wheels} PATH_SUFFIXES lib lib64)
  find_path(TensorRT_CUDA_INCLUDE_DIR cuda.h
    HINTS "${CUDAToolkit_ROOT}" ENV CUDAToolkit_ROOT ENV CUDA_PATH PATHS /usr/local/cuda
    PATH_SUFFIXES include)
  if(TensorRT_INCLUDE_DIR AND TensorRT_LIBRARY AND TensorRT_CUDA_INCLUDE_DIR)
    set(TensorRT_FLAVOUR tensorrt)
    if(TensorRT_LIBRARY MATCHES "tensorrt_rtx[^/]*$")
      set(TensorRT_FLAVOUR tensorrt_rtx)
    endif()
  endif()
endif()
if(TensorRT_FLAVOUR)
  list(APPEND backends "${TensorRT_FLAVOUR}")
  file(STRINGS "${TensorRT_INCLUDE_DIR}/NvInferVersion.h" rtx REGEX "define TRT_MAJOR_RTX ")
  if((rtx AND TensorRT_FLAVOUR STREQUAL "tensorrt")
      OR (NOT rtx AND TensorRT_FLAVOUR STREQUAL "tensorrt_rtx"))
    message(WARNING "TensorRT's headers in ${TensorRT_INCLUDE_DIR} are not those of "
                    "${TensorRT_LIBRARY}: this can be built, but the backend will not open on a GPU")
  endif()
elseif(MEANCACHE_TRT_TENSORRT STREQUAL "ON")
  message(FATAL_ERROR "MEANCACHE_TRT_TENSORRT is ON, but TensorRT is not found; set TENSORRT_ROOT, or "
                      "TensorRT_INCLUDE_DIR (found: ${TensorRT_INCLUDE_DIR}), TensorRT_LIBRARY "
                      "(found: ${TensorRT_LIBRARY}) and CUDAToolkit_ROOT or "
                      "TensorRT_CUDA_INCLUDE_DIR (found: ${TensorRT_CUDA_INCLUDE_DIR})")
else()
  list(APPEND left_out "TensorRT (set TENSORRT_ROOT and CUDAToolkit_ROOT)")
endif()

list(JOIN backends ", " backends)
list(JOIN left_out ", " left_out)
message(STATUS "meancache_trt: backends: ${backends}")
message(STATUS "meancache_trt: left out: ${left_out}")
