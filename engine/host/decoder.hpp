// The VAE decoder, bound to where the loop leaves its latent, in tiles where it is too large; the
// mirror of src/meancache_trt/decoder.py.

#ifndef MEANCACHE_TRT_HOST_DECODER_HPP
#define MEANCACHE_TRT_HOST_DECODER_HPP

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend.hpp"
#include "tiling.hpp"

namespace mct {

// The decoder graph for one size and batch. A whole latent is read where it lies; tiles pass
// through the host, and their buffers are made once for each shape that a tile has.
class Decoder {
 public:
  // latent: in the shape that the graph takes. image_shape: what all of it decodes to.
  Decoder(Runtime& runtime, std::shared_ptr<Graph> graph, const Component& component,
          TensorPtr latent, Shape image_shape, std::vector<Level> levels);

  // The images, (B, 3, H, W) or (B, 3, frames, H, W), not clipped; waits. Valid until the next
  // call.
  const Array& run(Stream stream);

 private:
  struct Bound {
    TensorPtr latent;
    TensorPtr image;
    CallPtr call;
  };
  Bound bind(TensorPtr latent);
  Array decode(const Array& tile, Stream stream);

  Runtime& runtime_;
  std::shared_ptr<Graph> graph_;
  std::string input_;
  std::string output_;
  mct_dtype image_dtype_;
  TensorPtr latent_;
  Shape image_shape_;
  std::vector<Level> levels_;
  std::map<Shape, Bound> tiles_;
  Bound whole_;  // without a call where the latent is divided
  Array images_;
};

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_DECODER_HPP
