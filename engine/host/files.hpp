// Reading files, and their SHA-256.

#ifndef MEANCACHE_TRT_HOST_FILES_HPP
#define MEANCACHE_TRT_HOST_FILES_HPP

#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>

namespace mct {

// A user's file. Throws an input error where it is missing, a directory or unreadable.
std::string read_file(const std::filesystem::path& path);

// SHA-256 as 64 hexadecimal digits.
std::string digest_of(std::string_view content);

// SHA-256 of a file's bytes. Throws std::system_error where it cannot be read.
std::string sha256_of(const std::filesystem::path& path);

// SHA-256 of a file, hashed again only where its inode, size or times changed since the last full
// hash. The record of that lies in the user's cache directory and is the Python host's too
// (meancache/hashing.py). Throws std::system_error where the file cannot be read.
std::string verified_sha256(const std::filesystem::path& path);

// The user's cache directory of this project, as platformdirs has it on Linux: a relative
// XDG_CACHE_HOME counts as none. Empty where there is none.
std::filesystem::path cache_directory();

// Replace a file of a cache at once; its folder is made. False where it cannot be written, which is
// no error for a cache.
bool keep_file(const std::filesystem::path& path, std::string_view content);

// A system error's text alone, as Python's strerror.
std::string reason_of(const std::system_error& error);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_FILES_HPP
