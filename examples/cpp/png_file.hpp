// PNG files of 8-bit RGB.

#ifndef MEANCACHE_TRT_EXAMPLES_PNG_FILE_HPP
#define MEANCACHE_TRT_EXAMPLES_PNG_FILE_HPP

#include <cstdint>
#include <string>

// Write `rgb`, (height, width, 3). Throws std::runtime_error where the file cannot be written.
void write_png(const std::string& path, const std::uint8_t* rgb, std::uint32_t width,
               std::uint32_t height);

#endif  // MEANCACHE_TRT_EXAMPLES_PNG_FILE_HPP
