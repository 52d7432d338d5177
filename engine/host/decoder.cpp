#include "decoder.hpp"

#include "error.hpp"

namespace mct {

namespace {

Array read(const Tensor& tensor, Stream stream) {
  Array array{tensor.shape(), {}};
  array.values.resize(elements_of(array.shape));
  tensor.read(array.values.data(), MCT_HOST, stream);
  return array;
}

}  // namespace

Decoder::Decoder(Runtime& runtime, std::shared_ptr<Graph> graph, const Component& component,
                 TensorPtr latent, Shape image_shape, std::vector<Level> levels)
    : runtime_(runtime),
      graph_(std::move(graph)),
      input_(component.input_named(Role::latent_grid)),
      output_(component.output_named(Role::image)),
      image_dtype_(component.outputs.at(output_).dtype),
      latent_(std::move(latent)),
      image_shape_(std::move(image_shape)),
      levels_(std::move(levels)) {
  if (image_dtype_ != MCT_FLOAT32) {
    throw Error(MCT_BUNDLE_ERROR, "a decoder gives float32 images; build the bundle again");
  }
  if (!is_divided(latent_->shape(), levels_)) {
    whole_ = bind(latent_);
    images_ = {image_shape_, std::vector<float>(elements_of(image_shape_))};
  }
}

const Array& Decoder::run(Stream stream) {
  if (whole_.call) {
    whole_.call->enqueue(stream);
    whole_.image->read(images_.values.data(), MCT_HOST, stream);
  } else {
    images_ = decode_tiled(read(*latent_, stream), levels_,
                           [&](const Array& tile) { return decode(tile, stream); });
  }
  return images_;
}

Array Decoder::decode(const Array& tile, Stream stream) {
  auto found = tiles_.find(tile.shape);
  if (found == tiles_.end()) {
    found = tiles_.emplace(tile.shape, bind(runtime_.zeros(tile.shape, latent_->dtype()))).first;
  }
  const Bound& bound = found->second;
  bound.latent->write(tile.values.data(), MCT_HOST, stream);
  bound.call->enqueue(stream);
  return read(*bound.image, stream);
}

Decoder::Bound Decoder::bind(TensorPtr latent) {
  const Shape shape = image_shape(latent->shape(), image_shape_, levels_);
  const TensorPtr image = runtime_.zeros(shape, image_dtype_);
  CallPtr call = graph_->bind({{input_, latent}, {output_, image}});
  return {std::move(latent), image, std::move(call)};
}

}  // namespace mct
