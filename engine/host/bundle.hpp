// A bundle whose files are the ones that its manifest names, the mirror of
// src/meancache_trt/bundle.py. Immutable once open, so that threads may share it.

#ifndef MEANCACHE_TRT_HOST_BUNDLE_HPP
#define MEANCACHE_TRT_HOST_BUNDLE_HPP

#include <filesystem>
#include <mutex>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "schedule.hpp"

namespace mct {

// A schedule and the name that it has in the bundle.
struct NamedSchedule {
  std::string name;
  Schedule schedule;
};

class Bundle {
 public:
  // Open and check. With `is_full_check` weights are hashed even where they look unchanged. Throws
  // a bundle error where the directory is no bundle, or a file is missing or was altered.
  Bundle(const std::filesystem::path& directory, bool is_full_check);

  const std::filesystem::path& directory() const { return directory_; }
  const Manifest& manifest() const { return manifest_; }
  const Exported& exported() const { return manifest_.exported; }
  std::filesystem::path path_of(const Component& component) const;

  // All schedules, most evaluations first; read at the first call.
  const std::vector<NamedSchedule>& schedules() const;
  // Throws a bundle error that lists the names there are.
  const Schedule& schedule(const std::string& name) const;

 private:
  std::filesystem::path directory_;
  Manifest manifest_;
  mutable std::once_flag is_read_;
  mutable std::vector<NamedSchedule> schedules_;
};

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_BUNDLE_HPP
