#include "safetensors_file.hpp"

#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace {

[[noreturn]] void fail(const std::string& path, const std::string& fault) {
  throw std::runtime_error("cannot read embeddings from " + path + ": " + fault +
                           "; make the file with `meancache-trt encode`");
}

std::size_t size_of(const std::string& dtype) {
  const std::map<std::string, std::size_t> sizes = {{"F64", 8}, {"F32", 4}, {"F16", 2},
                                                    {"I64", 8}, {"I32", 4}, {"BF16", 2},
                                                    {"U8", 1},  {"BOOL", 1}};
  const auto found = sizes.find(dtype);
  return found == sizes.end() ? 0 : found->second;
}

// One entry of the header; `data` is what lies behind it.
StoredTensor tensor_of(const nlohmann::json& entry, const std::string& data) {
  StoredTensor tensor;
  tensor.dtype = entry.at("dtype").get<std::string>();
  std::size_t expected = size_of(tensor.dtype);
  for (const auto& extent : entry.at("shape")) {
    tensor.shape.push_back(extent.get<std::int64_t>());
    expected *= static_cast<std::size_t>(tensor.shape.back());
  }
  const auto begin = entry.at("data_offsets").at(0).get<std::size_t>();
  const auto end = entry.at("data_offsets").at(1).get<std::size_t>();
  if (begin > end || end > data.size() || end - begin != expected) {
    throw std::runtime_error("a tensor's place does not fit its shape");
  }
  tensor.bytes.assign(data.begin() + static_cast<std::ptrdiff_t>(begin),
                      data.begin() + static_cast<std::ptrdiff_t>(end));
  return tensor;
}

}  // namespace

std::map<std::string, StoredTensor> read_safetensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string content((std::istreambuf_iterator<char>(file)),
                            std::istreambuf_iterator<char>());
  std::uint64_t length = 0;  // of the header; the format and this machine are little-endian
  if (content.size() < sizeof length) {
    fail(path, "it is missing or too short");
  }
  std::memcpy(&length, content.data(), sizeof length);
  if (length > content.size() - sizeof length) {
    fail(path, "its header is longer than the file");
  }
  const std::string data = content.substr(sizeof length + static_cast<std::size_t>(length));
  std::map<std::string, StoredTensor> tensors;
  try {
    const auto header = nlohmann::json::parse(content.substr(sizeof length, length));
    for (const auto& [name, entry] : header.items()) {
      if (name != "__metadata__") {
        tensors.emplace(name, tensor_of(entry, data));
      }
    }
  } catch (const std::exception& error) {
    fail(path, error.what());
  }
  return tensors;
}
