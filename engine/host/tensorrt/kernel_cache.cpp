#include "tensorrt/kernel_cache.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cctype>
#include <chrono>
#include <thread>

#include "error.hpp"
#include "files.hpp"

namespace mct {

namespace fs = std::filesystem;

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds lock_timeout(10);  // writing takes far less
constexpr std::chrono::milliseconds lock_poll(50);

// The lock of Python's filelock: flock on a file that may go with the lock.
class FileLock {
 public:
  explicit FileLock(const fs::path& path) {
    const auto end = Clock::now() + lock_timeout;
    do {
      handle_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
      if (handle_ < 0) {
        return;
      }
      if (::flock(handle_, LOCK_EX | LOCK_NB) == 0 && is_still_at(path)) {
        return;
      }
      ::close(handle_);
      handle_ = -1;
      std::this_thread::sleep_for(lock_poll);
    } while (Clock::now() < end);
  }
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;
  ~FileLock() {
    if (handle_ >= 0) {
      ::close(handle_);  // lets the lock go
    }
  }

  bool is_held() const { return handle_ >= 0; }

 private:
  // Whether the file that is locked is the one that others will lock.
  bool is_still_at(const fs::path& path) const {
    struct stat locked{}, there{};
    return ::fstat(handle_, &locked) == 0 && ::stat(path.c_str(), &there) == 0 &&
           locked.st_dev == there.st_dev && locked.st_ino == there.st_ino;
  }

  int handle_ = -1;
};

// Runs of what does not suit a file's name become a dash.
std::string named(const std::string& words) {
  std::string name;
  bool is_gap = false;
  for (const char letter : words) {
    const bool is_kept =
        std::isalnum(static_cast<unsigned char>(letter)) != 0 || letter == '.' || letter == '_';
    if (is_kept) {
      name += letter;
    } else if (!is_gap) {
      name += '-';
    }
    is_gap = !is_kept;
  }
  return name;
}

fs::path lock_of(const fs::path& path) { return path.string() + ".lock"; }

}  // namespace

KernelCacheFile::KernelCacheFile(const std::string& flavour, const std::string& version,
                                 const std::string& product, const std::string& capability,
                                 const fs::path& directory) {
  const fs::path user = cache_directory();
  const fs::path base = !directory.empty() ? directory : user.empty() ? user : user / "tensorrt";
  if (!base.empty()) {
    path_ = base / (named(flavour + "-" + version + "-" + product + "-" + capability) + ".cache");
  }
}

std::string KernelCacheFile::read() const {
  std::error_code ignored;
  if (path_.empty() || !fs::exists(path_, ignored)) {
    return {};
  }
  const FileLock lock(lock_of(path_));
  if (!lock.is_held()) {
    return {};
  }
  try {
    return read_file(path_);
  } catch (const Error&) {
    return {};
  }
}

bool KernelCacheFile::write(std::string_view content) const {
  if (path_.empty()) {
    return false;
  }
  std::error_code ignored;
  fs::create_directories(path_.parent_path(), ignored);
  const FileLock lock(lock_of(path_));
  return lock.is_held() && keep_file(path_, content);
}

}  // namespace mct
