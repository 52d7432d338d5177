#include "png_file.hpp"

#include <png.h>

#include <stdexcept>

void write_png(const std::string& path, const std::uint8_t* rgb, std::uint32_t width,
               std::uint32_t height) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.format = PNG_FORMAT_RGB;
  image.width = width;
  image.height = height;
  if (png_image_write_to_file(&image, path.c_str(), 0, rgb, 0, nullptr) == 0) {
    throw std::runtime_error("cannot write " + path + ": " + image.message);
  }
}
