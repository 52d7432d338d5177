// Decoding in overlapping tiles that are blended, the mirror of src/meancache_trt/tiling.py, bit
// for bit given the same decoded tiles.

#ifndef MEANCACHE_TRT_HOST_TILING_HPP
#define MEANCACHE_TRT_HOST_TILING_HPP

#include <functional>
#include <utility>
#include <vector>

#include "manifest.hpp"

namespace mct {

// A float32 array in host memory, row-major.
struct Array {
  Shape shape;
  std::vector<float> values;
};

using Decode = std::function<Array(const Array&)>;
using Level = std::vector<TiledAxis>;  // axes that are tiled together, the outer one first

// A tile along one axis: the latent positions that it reads; of what that decodes to, the first
// `dropped` samples are left out and the next ones are those of the image.
struct Piece {
  std::pair<std::int64_t, std::int64_t> latent;
  std::int64_t dropped;
  std::pair<std::int64_t, std::int64_t> image;
};

// The axes to tile: in time, then in space where that is asked for. Throws an input error where it
// is asked for and the decoder is not tiled in space.
std::vector<Level> levels(const Tiling& tiling, bool is_space_tiled);

// Whether a latent of this shape is too long along any axis of any level.
bool is_divided(const Shape& shape, const std::vector<Level>& chosen);

// `image`, the whole latent's, with the extents that a tile of shape `latent` has.
Shape image_shape(const Shape& latent, Shape image, const std::vector<Level>& chosen);

// The tiles along an axis, in order; their image parts are adjacent and cover it.
std::vector<Piece> pieces(const TiledAxis& axis, std::int64_t positions);

// Decode a latent, tiled at every level at which it is too long.
Array decode_tiled(const Array& latent, const std::vector<Level>& chosen, const Decode& decode);

// Let `tile` fade in over the end of `before`: its first sample is all `before`.
void blend(const Array& before, Array& tile, const TiledAxis& axis);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_TILING_HPP
