#include "files.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <vector>

#include "error.hpp"
#include "json.hpp"

namespace mct {

namespace fs = std::filesystem;

namespace {

[[noreturn]] void fail_system(int code) { throw std::system_error(code, std::generic_category()); }

// A file that is open for reading; closes itself.
class Reader {
 public:
  explicit Reader(const fs::path& path) : handle_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (handle_ < 0) {
      fail_system(errno);
    }
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() { ::close(handle_); }

  // Bytes that were read, 0 at the end.
  std::size_t read(char* target, std::size_t size) {
    for (;;) {
      const ssize_t count = ::read(handle_, target, size);
      if (count >= 0) {
        return static_cast<std::size_t>(count);
      }
      if (errno != EINTR) {
        fail_system(errno);
      }
    }
  }

 private:
  int handle_;
};

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), &EVP_MD_CTX_free) {
    check(context_ != nullptr && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
  }

  void add(const void* data, std::size_t size) {
    check(EVP_DigestUpdate(context_.get(), data, size) == 1);
  }

  std::string hexadecimal() {
    std::array<unsigned char, 32> bytes{};
    check(EVP_DigestFinal_ex(context_.get(), bytes.data(), nullptr) == 1);
    constexpr char digits[] = "0123456789abcdef";
    std::string text;
    for (const unsigned char byte : bytes) {
      text += digits[byte >> 4];
      text += digits[byte & 15];
    }
    return text;
  }

 private:
  static void check(bool is_done) {
    if (!is_done) {
      throw Error(MCT_INTERNAL_ERROR, "OpenSSL's libcrypto cannot make a SHA-256; update it");
    }
  }

  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

std::int64_t nanoseconds(const timespec& time) {
  return static_cast<std::int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

// Device, inode, size, and the times of the last change of contents and of the entry.
using State = std::vector<std::int64_t>;

State state_of(const fs::path& path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) {
    fail_system(errno);
  }
  return {static_cast<std::int64_t>(status.st_dev), static_cast<std::int64_t>(status.st_ino),
          static_cast<std::int64_t>(status.st_size), nanoseconds(status.st_mtim),
          nanoseconds(status.st_ctim)};
}

std::string known_digest(const fs::path& record, const State& state) {
  try {
    const JsonValue root = parse_json(read_file(record));
    const JsonValue* known = root.find("state");
    const JsonValue* digest = root.find("sha256");
    if (known == nullptr || digest == nullptr) {
      return {};
    }
    return list_of(Json(*known), to_integer) == state ? digest->text : std::string();
  } catch (const std::exception&) {
    return {};  // no record, or one that cannot be used
  }
}

// JSON text of a path; other bytes than printable ASCII are not needed to read the record.
std::string json_text(const std::string& text) {
  std::string result = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') {
      result += '\\';
    }
    result += static_cast<unsigned char>(letter) < 0x20 ? '?' : letter;
  }
  return result + "\"";
}

std::string record_text(const fs::path& path, const State& state, const std::string& digest) {
  std::string numbers;
  for (std::size_t k = 0; k < state.size(); ++k) {
    numbers += (k == 0 ? "\n  " : ",\n  ") + std::to_string(state[k]);
  }
  return "{\n \"path\": " + json_text(path.string()) + ",\n \"state\": [" + numbers +
         "\n ],\n \"sha256\": \"" + digest + "\"\n}\n";
}

}  // namespace

fs::path cache_directory() {
  const char* chosen = std::getenv("XDG_CACHE_HOME");
  if (chosen != nullptr && chosen[0] == '/') {
    return fs::path(chosen) / "meancache-trt";
  }
  const char* home = std::getenv("HOME");
  return home != nullptr && home[0] == '/' ? fs::path(home) / ".cache" / "meancache-trt"
                                           : fs::path();
}

bool keep_file(const fs::path& path, std::string_view content) {
  std::error_code ignored;
  fs::create_directories(path.parent_path(), ignored);
  std::string name = (path.parent_path() / ("." + path.filename().string() + ".XXXXXX")).string();
  const int handle = ::mkstemp(name.data());
  if (handle < 0) {
    return false;
  }
  const bool is_written =
      ::write(handle, content.data(), content.size()) == static_cast<ssize_t>(content.size()) &&
      ::fchmod(handle, 0644) == 0 && ::fsync(handle) == 0;
  ::close(handle);
  if (!is_written || ::rename(name.c_str(), path.c_str()) != 0) {
    ::unlink(name.c_str());
    return false;
  }
  return true;
}

std::string read_file(const fs::path& path) {
  try {
    Reader reader(path);
    std::string content;
    std::array<char, 1 << 16> block;
    while (const std::size_t count = reader.read(block.data(), block.size())) {
      content.append(block.data(), count);
    }
    return content;
  } catch (const std::system_error& error) {
    if (error.code().value() == ENOENT) {
      throw Error(MCT_INPUT_ERROR,
                  "expected a file at " + path.string() + ", found nothing; check the path");
    }
    throw Error(MCT_INPUT_ERROR, "cannot read " + path.string() + ": " + reason_of(error) +
                                     "; check the path and its rights");
  }
}

std::string digest_of(std::string_view content) {
  Sha256 hash;
  hash.add(content.data(), content.size());
  return hash.hexadecimal();
}

std::string sha256_of(const fs::path& path) {
  Reader reader(path);
  Sha256 hash;
  std::vector<char> block(std::size_t{1} << 20);
  while (const std::size_t count = reader.read(block.data(), block.size())) {
    hash.add(block.data(), count);
  }
  return hash.hexadecimal();
}

std::string verified_sha256(const fs::path& path) {
  const State state = state_of(path);
  const fs::path cache = cache_directory();
  if (cache.empty()) {
    return sha256_of(path);
  }
  // By inode, so that a hard link shares the record of the checkpoint's own file.
  const fs::path record =
      cache / "verified" / (std::to_string(state[0]) + "-" + std::to_string(state[1]) + ".json");
  const std::string known = known_digest(record, state);
  if (!known.empty()) {
    return known;
  }
  const std::string found = sha256_of(path);
  std::error_code ignored;
  keep_file(record, record_text(fs::canonical(path, ignored), state, found));
  return found;
}

std::string reason_of(const std::system_error& error) { return error.code().message(); }

}  // namespace mct
