// What the two files of C functions share: errors that become statuses, and structures of other
// versions.

#ifndef MEANCACHE_TRT_HOST_CAPI_HPP
#define MEANCACHE_TRT_HOST_CAPI_HPP

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "error.hpp"
#include "graphs.hpp"
#include "meancache_trt.h"

struct mct_bundle {
  std::shared_ptr<mct::SharedBundle> shared;
};

namespace mct {

// The text of the last error in this thread.
void remember(const char* text) noexcept;

// `work`, with what it throws as a status.
template <class Work>
mct_status guarded(Work work) noexcept {
  try {
    return work();
  } catch (const Error& error) {
    remember(error.what());
    return error.status();
  } catch (const std::bad_alloc&) {
    remember("out of memory; use a smaller size or batch");
  } catch (const std::exception& error) {
    remember(error.what());
  } catch (...) {
    remember("an unknown exception inside the library");
  }
  return MCT_INTERNAL_ERROR;
}

template <class Pointer>
void expect(Pointer pointer, const char* what) {
  if (pointer == nullptr) {
    throw Error(MCT_INPUT_ERROR, std::string("expected ") + what + ", found NULL");
  }
}

// Throws unless the size that a structure states can be one of this or a later version.
template <class Struct>
void check_size(const Struct* given, const char* what) {
  expect(given, what);
  if (given->struct_size < sizeof(Struct)) {
    throw Error(MCT_INPUT_ERROR, std::string(what) + " states a struct_size of " +
                                     std::to_string(given->struct_size) + ", expected " +
                                     std::to_string(sizeof(Struct)) +
                                     "; set it to the structure's sizeof");
  }
}

// What the caller passed. A longer structure is a later version's: it may not ask for what this
// version does not know.
template <class Struct>
Struct taken(const Struct* given, const char* what) {
  check_size(given, what);
  const char* bytes = reinterpret_cast<const char*>(given);
  if (std::any_of(bytes + sizeof(Struct), bytes + given->struct_size,
                  [](char byte) { return byte != 0; })) {
    throw Error(MCT_INPUT_ERROR, std::string(what) +
                                     " asks for something of a later version of the library; "
                                     "update the library");
  }
  return *given;
}

// Hand back a structure; what a longer one has besides becomes zero.
template <class Struct>
void give(Struct value, Struct* target, const char* what) {
  check_size(target, what);
  const std::size_t size = target->struct_size;
  value.struct_size = size;
  std::memset(static_cast<void*>(target), 0, size);
  std::memcpy(static_cast<void*>(target), &value, sizeof(Struct));
}

// Fill a fixed array of a structure.
inline void fill(const Shape& shape, std::size_t& rank, std::int64_t (&target)[MCT_MAX_RANK]) {
  rank = std::min<std::size_t>(shape.size(), MCT_MAX_RANK);
  std::copy_n(shape.begin(), rank, target);
}

mct_tensor described(const std::string& name, const Shape& shape, mct_dtype dtype);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_CAPI_HPP
