"""Whether an export's second stage and the graphs of its second transformer belong together."""

from __future__ import annotations

from meancache_trt.errors import BundleError, InputError
from meancache_trt.manifest import Exported, TensorRecord, check_guidance
from meancache_trt.meancache.schedule import TRANSFORMERS

Tensors = dict[str, TensorRecord]


def check_second_stage(export: Exported) -> None:
    """Check that the second transformer is there exactly where a second stage is.

    Raises:
        BundleError: where it is not, or has other precisions or tensors than the first.
        InputError: for a guidance scale of its own that the model cannot take.
    """
    first, second = (_graphs(export, part) for part in TRANSFORMERS)
    if second != (first if export.second_stage else {}):
        raise BundleError(
            "a bundle has a second stage where it has graphs of transformer_2, each with the "
            f"tensors of one of transformer, found the stage {export.second_stage} and "
            f"transformer_2 in {sorted(second)} beside transformer in {sorted(first)}"
        )
    scale = export.second_guidance_scale
    if scale is not None and not export.guidance.is_classifier_free:
        raise InputError(
            "a second stage has a guidance scale of its own under classifier-free guidance only, "
            f"found {scale:g} and the rule {export.guidance.rule!r}; leave it out"
        )
    check_guidance(export.guidance, scale)


def _graphs(export: Exported, part: str) -> dict[str, tuple[Tensors, Tensors]]:
    """Inputs and outputs of a part's graphs by precision."""
    return {
        component.precision: (component.inputs, component.outputs)
        for name, component in export.components.items()
        if name.partition("/")[0] == part
    }
