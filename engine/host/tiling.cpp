#include "tiling.hpp"

#include <algorithm>
#include <map>

#include "backend.hpp"
#include "error.hpp"

namespace mct {

namespace {

using Range = std::pair<std::int64_t, std::int64_t>;  // from, to
using Index = std::vector<std::size_t>;

std::int64_t sample_count(const TiledAxis& axis, std::int64_t positions) {
  return axis.first_samples + (positions - 1) * axis.samples;
}

std::size_t axis_of(std::int64_t axis, const Shape& shape) {
  if (axis < 0 || axis >= static_cast<std::int64_t>(shape.size())) {
    throw Error(MCT_BUNDLE_ERROR, "the manifest tiles axis " + text_of(axis) + " of " +
                                      std::to_string(shape.size()) + "; build the bundle again");
  }
  return static_cast<std::size_t>(axis);
}

std::vector<Range> whole(const Shape& shape) {
  std::vector<Range> ranges;
  for (const std::int64_t extent : shape) {
    ranges.emplace_back(0, extent);
  }
  return ranges;
}

Shape shape_of(const std::vector<Range>& ranges) {
  Shape shape;
  for (const Range& range : ranges) {
    shape.push_back(range.second - range.first);
  }
  return shape;
}

// Copy between a box of a large array and the head of a small one, a row of the last axis at a
// time.
template <class CopyRow>
void for_each_row(const Shape& large, const std::vector<Range>& box, const Shape& small,
                  CopyRow copy) {
  Shape position(large.size(), 0);  // within the box
  const Shape extents = shape_of(box);
  if (elements_of(extents) == 0) {
    return;
  }
  const std::size_t last = large.size() - 1;
  for (;;) {
    std::int64_t there = 0;
    std::int64_t here = 0;
    for (std::size_t axis = 0; axis < large.size(); ++axis) {
      there = there * large[axis] + box[axis].first + position[axis];
      here = here * small[axis] + position[axis];
    }
    copy(there, here, extents[last]);
    std::size_t axis = last;
    while (axis > 0 && ++position[axis - 1] == extents[axis - 1]) {
      position[--axis] = 0;
    }
    if (axis == 0) {
      return;
    }
  }
}

Array part(const Array& array, const std::vector<Range>& box) {
  Array result{shape_of(box), {}};
  result.values.resize(elements_of(result.shape));
  for_each_row(array.shape, box, result.shape,
               [&](std::int64_t there, std::int64_t here, std::int64_t count) {
                 std::copy_n(array.values.begin() + there, count, result.values.begin() + here);
               });
  return result;
}

void put(const Array& tile, const std::vector<Range>& box, Array& image) {
  for_each_row(image.shape, box, tile.shape,
               [&](std::int64_t there, std::int64_t here, std::int64_t count) {
                 std::copy_n(tile.values.begin() + here, count, image.values.begin() + there);
               });
}

// The tiles of one level, which are blended and put side by side.
//
// A tile fades in over those before it along each axis in turn, which have already done so with
// theirs. The order counts: where four tiles meet, diffusers' shares are not products of those
// along the axes.
class Mosaic {
 public:
  Mosaic(const Array& latent, const Level& level) : latent_(latent), level_(level) {
    for (const TiledAxis& axis : level) {
      plans_.push_back(pieces(axis, latent.shape[axis_of(axis.latent_axis, latent.shape)]));
    }
  }

  Array decode(const Decode& decode_tile) {
    Index index(level_.size(), 0);
    for (;;) {
      add(index, decode_tile(part(latent_, latent_box(index))));
      std::size_t place = level_.size();
      while (place > 0 && ++index[place - 1] == plans_[place - 1].size()) {
        index[--place] = 0;
      }
      if (place == 0) {
        return std::move(image_);
      }
    }
  }

 private:
  std::vector<Range> latent_box(const Index& index) const {
    std::vector<Range> box = whole(latent_.shape);
    for (std::size_t place = 0; place < level_.size(); ++place) {
      box[axis_of(level_[place].latent_axis, latent_.shape)] = plans_[place][index[place]].latent;
    }
    return box;
  }

  void add(const Index& index, const Array& decoded) {
    std::vector<Range> kept = whole(decoded.shape);
    std::vector<Range> target = kept;
    for (std::size_t place = 0; place < level_.size(); ++place) {
      const Piece& piece = plans_[place][index[place]];
      const std::size_t axis = axis_of(level_[place].image_axis, decoded.shape);
      kept[axis].first = std::min(piece.dropped, kept[axis].second);
      target[axis] = piece.image;
    }
    Array tile = part(decoded, kept);
    fade_in(index, tile);
    if (image_.shape.empty()) {
      make_image(tile.shape);
    }
    const Shape needed = shape_of(target);
    for (std::size_t axis = 0; axis < needed.size(); ++axis) {
      if (needed[axis] > tile.shape[axis]) {
        throw Error(MCT_BUNDLE_ERROR,
                    "a decoded tile is smaller than the manifest's tiling says; "
                    "build the bundle again");
      }
    }
    put(tile, target, image_);
    waiting_.insert_or_assign(index, std::move(tile));
  }

  void fade_in(const Index& index, Array& tile) {
    for (std::size_t place = 0; place < level_.size(); ++place) {
      if (index[place] == 0) {
        continue;
      }
      Index before = index;
      --before[place];
      blend(waiting_.at(before), tile, level_[place]);
      if (place == 0) {
        // Nothing else needs the one before along the outer axis: memory stays bounded.
        waiting_.erase(before);
      }
    }
  }

  void make_image(const Shape& tile) {
    image_.shape = tile;
    for (std::size_t place = 0; place < level_.size(); ++place) {
      image_.shape[axis_of(level_[place].image_axis, tile)] = plans_[place].back().image.second;
    }
    image_.values.resize(elements_of(image_.shape));
  }

  const Array& latent_;
  const Level& level_;
  std::vector<std::vector<Piece>> plans_;
  std::map<Index, Array> waiting_;  // tiles over which later ones fade in
  Array image_;
};

}  // namespace

std::vector<Level> levels(const Tiling& tiling, bool is_space_tiled) {
  if (is_space_tiled && tiling.space.empty()) {
    throw Error(MCT_INPUT_ERROR,
                "VAE tiling was asked for, but this bundle says of no tiles in which its VAE would "
                "decode as diffusers' does; render without it");
  }
  std::vector<Level> chosen;
  if (tiling.time) {
    chosen.push_back({*tiling.time});
  }
  if (is_space_tiled) {
    chosen.push_back(tiling.space);
  }
  return chosen;
}

bool is_divided(const Shape& shape, const std::vector<Level>& chosen) {
  for (const Level& level : chosen) {
    for (const TiledAxis& axis : level) {
      if (shape[axis_of(axis.latent_axis, shape)] > axis.longest_whole) {
        return true;
      }
    }
  }
  return false;
}

Shape image_shape(const Shape& latent, Shape image, const std::vector<Level>& chosen) {
  for (const Level& level : chosen) {
    for (const TiledAxis& axis : level) {
      image[axis_of(axis.image_axis, image)] =
          sample_count(axis, latent[axis_of(axis.latent_axis, latent)]);
    }
  }
  return image;
}

std::vector<Piece> pieces(const TiledAxis& axis, std::int64_t positions) {
  std::vector<Piece> found;
  for (std::int64_t start = 0; start < positions; start += axis.stride) {
    const std::int64_t stop = std::min(start + axis.tile, positions);
    const std::int64_t dropped = start == 0 ? 0 : axis.dropped;
    const std::int64_t begin = start * axis.samples + dropped;
    const std::int64_t count = sample_count(axis, stop - start) - dropped;
    const std::int64_t kept = axis.stride * axis.samples + axis.dropped - dropped;
    if (count > 0) {  // diffusers decodes a last tile that is all dropped for nothing
      found.push_back({{start, stop}, dropped, {begin, begin + std::min(count, kept)}});
    }
  }
  return found;
}

Array decode_tiled(const Array& latent, const std::vector<Level>& chosen, const Decode& decode) {
  if (chosen.empty()) {
    return decode(latent);
  }
  const std::vector<Level> inner(chosen.begin() + 1, chosen.end());
  if (!is_divided(latent.shape, {chosen.front()})) {
    return decode_tiled(latent, inner, decode);
  }
  Mosaic mosaic(latent, chosen.front());
  return mosaic.decode([&](const Array& tile) { return decode_tiled(tile, inner, decode); });
}

void blend(const Array& before, Array& tile, const TiledAxis& axis) {
  const std::size_t along = axis_of(axis.image_axis, tile.shape);
  const std::int64_t there = before.shape[along];
  const std::int64_t here = tile.shape[along];
  const std::int64_t extent = std::min({there, here, axis.blend});
  std::int64_t outer = 1;
  std::int64_t inner = 1;
  for (std::size_t k = 0; k < tile.shape.size(); ++k) {
    (k < along ? outer : inner) *= k == along ? 1 : tile.shape[k];
  }
  for (std::int64_t row = 0; row < outer; ++row) {
    for (std::int64_t k = 0; k < extent; ++k) {
      const double shares = static_cast<double>(k) / static_cast<double>(extent);
      // Each share is rounded before it multiplies, as torch does with a Python number.
      const auto old_share = static_cast<float>(1 - shares);
      const auto new_share = static_cast<float>(shares);
      const float* end =
          &before.values[static_cast<std::size_t>((row * there + there - extent + k) * inner)];
      float* head = &tile.values[static_cast<std::size_t>((row * here + k) * inner)];
      for (std::int64_t column = 0; column < inner; ++column) {
        head[column] = end[column] * old_share + head[column] * new_share;
      }
    }
  }
}

}  // namespace mct
