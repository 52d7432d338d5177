# Install: header, libraries, package files for CMake and pkg-config.

include(CMakePackageConfigHelpers)

set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/meancache_trt)
if(BUILD_SHARED_LIBS)
  # Backends that are not on the linker's usual path, such as the OpenVINO of a wheel, are found
  # where they were at build time. INSTALL_RPATH_USE_LINK_PATH would leave out what lies in the
  # checkout, as .venv does.
  set(backend_folders "")
  if(TARGET openvino::runtime)
    list(APPEND backend_folders $<TARGET_FILE_DIR:openvino::runtime>)
  endif()
  if(TensorRT_FLAVOUR)
    get_filename_component(folder ${TensorRT_LIBRARY} DIRECTORY)
    list(APPEND backend_folders ${folder})
  endif()
  set_target_properties(meancache_trt PROPERTIES INSTALL_RPATH "${backend_folders}")
endif()

if(SKBUILD)
  # Inside a Python package the libraries of other wheels are beside it.
  set_target_properties(meancache_trt PROPERTIES
    INSTALL_RPATH "$ORIGIN/../openvino/libs;$ORIGIN/../tensorrt_libs;$ORIGIN/../tensorrt_rtx_libs")
  install(TARGETS meancache_trt LIBRARY DESTINATION meancache_trt)
  return()
endif()

# Two sets: a program that takes the shared library needs nothing of what the static one is made of.
set(libraries meancache_trt_static)
if(BUILD_SHARED_LIBS)
  list(APPEND libraries meancache_trt)
endif()
foreach(library ${libraries})
  install(TARGETS ${library} EXPORT ${library}_targets)
  install(EXPORT ${library}_targets NAMESPACE meancache_trt:: DESTINATION ${package_folder})
endforeach()
install(FILES engine/include/meancache_trt.h engine/include/meancache_trt.hpp TYPE INCLUDE)

set(has_openvino OFF)
if(TARGET openvino::runtime)
  set(has_openvino ON)
endif()
configure_package_config_file(cmake/meancache_trtConfig.cmake.in
  ${PROJECT_BINARY_DIR}/meancache_trtConfig.cmake INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/meancache_trtConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/meancache_trtConfig.cmake
              ${PROJECT_BINARY_DIR}/meancache_trtConfigVersion.cmake
  DESTINATION ${package_folder})

# The prefix as seen from the file, so that the installed tree may move.
file(RELATIVE_PATH pc_prefix "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
configure_file(cmake/meancache_trt.pc.in ${PROJECT_BINARY_DIR}/meancache_trt.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/meancache_trt.pc
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
