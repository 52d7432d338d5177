"""How diffusers' VAEs decode in tiles, from their own settings to `manifest.TiledAxis` records."""

from __future__ import annotations

from meancache_trt.manifest import TiledAxis


def causal_time_axis(
    tile: int, stride: int, *, unit: int, latent_axis: int, image_axis: int
) -> TiledAxis:
    """Frames in tiles of `tile`, each beginning `stride` after the one before.

    Of a decoder that makes one frame of a tile's first latent frame and `unit` of every other one.
    diffusers hands it a latent frame more than the tile has, and drops the first frame of all
    tiles but the first.
    """
    return TiledAxis(
        latent_axis=latent_axis,
        image_axis=image_axis,
        longest_whole=tile // unit,
        tile=tile // unit + 1,
        stride=stride // unit,
        samples=unit,
        first_samples=1,
        dropped=1,
        blend=tile - stride,
    )


def space_axes(
    tile: int, stride: int, *, unit: int, latent_axis: int, image_axis: int
) -> tuple[TiledAxis, ...]:
    """Rows and columns in tiles of `tile` pixels, each beginning `stride` after the one before.

    `unit` is how many pixels a position of the latent grid has a side, several of diffusers' where
    the latent is packed. The axes are those of the rows; columns are the next ones. Empty where
    tiles do not begin and end between positions, so that diffusers' cannot be had.
    """
    if tile % unit or stride % unit:
        return ()
    return tuple(
        TiledAxis(
            latent_axis=latent_axis + place,
            image_axis=image_axis + place,
            longest_whole=tile // unit,
            tile=tile // unit,
            stride=stride // unit,
            samples=unit,
            first_samples=unit,
            dropped=0,
            blend=tile - stride,
        )
        for place in range(2)
    )
