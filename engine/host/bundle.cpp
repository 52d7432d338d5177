#include "bundle.hpp"

#include <algorithm>

#include "error.hpp"
#include "files.hpp"

namespace mct {

namespace fs = std::filesystem;

namespace {

const char* const manifest_name = "manifest.json";
const std::string schedules_folder = "schedules/";

[[noreturn]] void fail(const std::string& text) { throw Error(MCT_BUNDLE_ERROR, text); }

Manifest read_manifest(const fs::path& directory) {
  const fs::path path = directory / manifest_name;
  std::error_code ignored;
  if (!fs::is_directory(directory, ignored) || !fs::is_regular_file(path, ignored)) {
    const bool is_there = fs::exists(directory, ignored);
    fail("expected a bundle at " + directory.string() + ", found " +
         (is_there ? "no manifest.json in it" : "no such directory") +
         "; make one with `meancache-trt build MODEL -o " + directory.string() + "`");
  }
  return parse_manifest(read_file(path), path.string());
}

std::string found_digest(const fs::path& path, const FileRecord& record, bool is_full_check) {
  const auto size = static_cast<std::int64_t>(fs::file_size(path));
  if (size != record.size_bytes) {
    fail(path.string() + " is damaged: expected " + text_of(record.size_bytes) + " bytes, found " +
         text_of(size) + "; restore the file or build the bundle again");
  }
  const bool is_weights = path.extension() == ".safetensors";
  return is_weights && !is_full_check ? verified_sha256(path) : sha256_of(path);
}

void check_file(const fs::path& directory, const FileRecord& record, bool is_full_check) {
  const fs::path path = directory / record.path;
  std::string found;
  try {
    found = found_digest(path, record, is_full_check);
  } catch (const std::system_error& error) {
    std::error_code ignored;
    const bool is_link = fs::is_symlink(path, ignored);
    const std::string what =
        path.string() + (is_link ? ", a link to " + fs::read_symlink(path, ignored).string() : "");
    fail("the bundle lacks " + what + ": " + reason_of(error) +
         "; restore the file or build the bundle again");
  }
  if (found != record.sha256) {
    fail(path.string() + " was altered: expected SHA-256 " + record.sha256.substr(0, 16) +
         "…, found " + found.substr(0, 16) + "…; restore the file or build the bundle again");
  }
}

// Plans are not checked here: the backend that loads one compares its record with the library and
// the GPU, and hashes it then.
void check_files(const fs::path& directory, const Manifest& manifest, bool is_full_check) {
  for (const FileRecord& record : manifest.files) {
    check_file(directory, record, is_full_check);
  }
  for (const auto& [name, record] : manifest.additions) {
    if (name.rfind(schedules_folder, 0) == 0) {
      check_file(directory, record, is_full_check);
    }
  }
}

Manifest checked_manifest(const fs::path& directory, bool is_full_check) {
  Manifest manifest = read_manifest(directory);
  for (;;) {
    try {
      check_files(directory, manifest, is_full_check);
      return manifest;
    } catch (const Error&) {
      Manifest newer = read_manifest(directory);
      if (newer.digest == manifest.digest) {
        throw;
      }
      manifest = std::move(newer);  // somebody replaced a schedule meanwhile
    }
  }
}

std::vector<NamedSchedule> read_schedules(const fs::path& directory, const Manifest& manifest) {
  std::vector<NamedSchedule> schedules;
  for (const auto& [name, record] : manifest.additions) {
    if (name.rfind(schedules_folder, 0) == 0) {
      schedules.push_back(
          {name.substr(schedules_folder.size()), load_schedule(directory / record.path)});
    }
  }
  std::sort(schedules.begin(), schedules.end(), [](const auto& one, const auto& other) {
    const auto left = one.schedule.budget();
    const auto right = other.schedule.budget();
    return left != right ? left > right : one.name < other.name;
  });
  return schedules;
}

}  // namespace

Bundle::Bundle(const fs::path& directory, bool is_full_check)
    : directory_(directory), manifest_(checked_manifest(directory, is_full_check)) {}

fs::path Bundle::path_of(const Component& component) const { return directory_ / component.path; }

const std::vector<NamedSchedule>& Bundle::schedules() const {
  std::call_once(is_read_, [this] { schedules_ = read_schedules(directory_, manifest_); });
  return schedules_;
}

const Schedule& Bundle::schedule(const std::string& name) const {
  std::vector<std::string> names;
  for (const NamedSchedule& entry : schedules()) {
    if (entry.name == name) {
      return entry.schedule;
    }
    names.push_back(entry.name);
  }
  fail(directory_.string() + " has no schedule " + repr_of(name) + "; expected one of " +
       (names.empty() ? "none yet" : joined(names)) +
       ", or the path of a schedule file. Make one with `meancache-trt bake`");
}

}  // namespace mct
