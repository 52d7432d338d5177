"""Starts the HunyuanVideo stand-in from what the FLUX stand-in knows of pictures.

The two transformers have the same blocks under the same names. With one latent frame, and words'
states in place of a text encoder's, the video network then is the picture network; it learns time,
its text encoder and the words of motion.
"""

from __future__ import annotations

from collections.abc import Iterator

import hunyuan_video_model as model
import text_models
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from meancache_trt import standins
from meancache_trt.standins.captions import split_prompts

SINGLE_BLOCKS = (0, 2, 3, 4)
"""FLUX's five without the one that is missed least, for the size of the folder."""

_SPACE = "\u2581"


def start(network: model.HunyuanVideoNetwork, tokenizers: model.Tokenizers) -> None:
    """Puts the packaged FLUX stand-in's weights into an untrained network."""
    pipeline = FluxPipeline.from_pretrained(standins.path("flux")).to(torch.float32)
    start_transformer(network.transformer, pipeline.transformer.state_dict())
    _start_clip(network.clip, tokenizers.clip, pipeline)
    with torch.no_grad():
        table = network.llama.embed_tokens.weight
        for token, state in _word_states(pipeline):
            for name in (token, token.removeprefix(_SPACE)):
                index = tokenizers.llama.convert_tokens_to_ids(name)
                if index != tokenizers.llama.unk_token_id:
                    table[index] = state


def start_transformer(network: nn.Module, flat: dict[str, Tensor]) -> None:
    """FLUX's weights by name; the refiner at first passes projected text on."""
    sources = {_renamed(name): tensor for name, tensor in flat.items() if _is_kept(name)}
    weights = network.state_dict()
    for name, tensor in sources.items():
        weights[name] = tensor.reshape(weights[name].shape)
    network.load_state_dict(weights)
    refiner = network.get_submodule("context_embedder.token_refiner")
    for block in refiner.refiner_blocks:
        nn.init.zeros_(block.norm_out.linear.weight)
        nn.init.zeros_(block.norm_out.linear.bias)


def _is_kept(name: str) -> bool:
    kind, index, *_ = name.split(".")
    return kind != "single_transformer_blocks" or int(index) in SINGLE_BLOCKS


def _renamed(name: str) -> str:
    kind, index, *rest = name.split(".")
    if kind == "single_transformer_blocks":
        return ".".join([kind, str(SINGLE_BLOCKS.index(int(index))), *rest])
    renamed = {"x_embedder": "x_embedder.proj", "context_embedder": "context_embedder.proj_in"}
    return ".".join([renamed.get(kind, kind), index, *rest])


def _start_clip(
    clip: CLIPTextModel, tokenizer: PreTrainedTokenizerBase, pipeline: FluxPipeline
) -> None:
    """The pictures' CLIP; words and positions that it lacks stay untrained."""
    flat, weights = pipeline.text_encoder.state_dict(), clip.state_dict()
    for name, tensor in flat.items():
        if name.endswith("position_embedding.weight"):
            weights[name][: len(tensor)] = tensor
        elif name.endswith("token_embedding.weight"):
            for token, index in pipeline.tokenizer.get_vocab().items():
                weights[name][tokenizer.convert_tokens_to_ids(token)] = tensor[index]
        elif weights[name].shape == tensor.shape:
            weights[name] = tensor
    clip.load_state_dict(weights)


@torch.no_grad()
def _word_states(pipeline: FluxPipeline) -> Iterator[tuple[str, Tensor]]:
    """The mean state, over captions, of each token of T5's that they have, by Llama's name."""
    ids = text_models.token_ids(pipeline.tokenizer_2, split_prompts("calibration"))
    states = pipeline.text_encoder_2(ids).last_hidden_state
    for index in ids.unique().tolist():
        token = pipeline.tokenizer_2.convert_ids_to_tokens(index)
        yield {"</s>": "<|eot_id|>"}.get(token, token), states[ids == index].mean(0)
