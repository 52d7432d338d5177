// Embeddings as `meancache-trt encode` writes them: a safetensors file, tensors by name, one prompt
// a row.

#ifndef MEANCACHE_TRT_EXAMPLES_SAFETENSORS_FILE_HPP
#define MEANCACHE_TRT_EXAMPLES_SAFETENSORS_FILE_HPP

#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct StoredTensor {
  std::string dtype;  // such as "F32" or "I64"
  std::vector<std::int64_t> shape;
  std::vector<char> bytes;
};

// All tensors of a file. Throws std::runtime_error where it is no safetensors file.
std::map<std::string, StoredTensor> read_safetensors(const std::string& path);

#endif  // MEANCACHE_TRT_EXAMPLES_SAFETENSORS_FILE_HPP
