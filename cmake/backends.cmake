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

# The seam: engine/host/backend.hpp. A backend is one translation unit, a definition
# MEANCACHE_TRT_HAS_TENSORRT and its libraries, added in engine/host/CMakeLists.txt.
if(MEANCACHE_TRT_TENSORRT STREQUAL "ON")
  message(FATAL_ERROR "MEANCACHE_TRT_TENSORRT is ON, but its backend is not part of this version")
endif()
list(APPEND left_out "TensorRT (its backend is not part of this version)")

list(JOIN backends ", " backends)
list(JOIN left_out ", " left_out)
message(STATUS "meancache_trt: backends: ${backends}")
message(STATUS "meancache_trt: left out: ${left_out}")
