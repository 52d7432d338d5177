from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from meancache_trt.bundle import Bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.encoding import BundleEncoder, GraphEncoder, encoder_digest
from meancache_trt.errors import BundleError, InputError, RuntimeUnavailableError
from meancache_trt.export.text import PromptEncoder
from meancache_trt.manifest import Exported
from meancache_trt.render import Pipeline, load

PROMPT = "large plain red circle left gray"
PROMPTS = ["", PROMPT, "UPPER, don't  café 🦊 東京", "a long walk " * 300]


class Encoders:
    """Which prompts were really encoded, by which encoder."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        for kind in (GraphEncoder, PromptEncoder):
            patch.setattr(kind, "encode", self._watched(kind))

    def _watched(self, kind: type) -> object:
        original = kind.encode  # type: ignore[attr-defined]

        def encode(encoder: object, prompts: list[str]) -> object:
            self.calls += [(kind.__name__, prompt) for prompt in prompts]
            return original(encoder, prompts)

        return encode


@pytest.fixture
def encoders() -> Iterator[Encoders]:
    with pytest.MonkeyPatch.context() as patch:
        yield Encoders(patch)


def changed(bundle: Path, **changes: object) -> Bundle:
    """The bundle as opened, with other facts in its manifest."""
    opened = Bundle.open(bundle)
    export = msgspec.structs.replace(opened.export, **changes)
    return Bundle(bundle, msgspec.structs.replace(opened.manifest, export=export))


def without_text_graphs(bundle: Path) -> Bundle:
    """As an export of a family without text graphs would be."""
    opened = Bundle.open(bundle)
    others = {name: part for name, part in opened.export.components.items() if not part.tokenizer}
    gone = {"model.onnx", "tokenizer.json"}
    files = {
        path: record
        for path, record in opened.manifest.files.items()
        if "/text_encoder" not in path or Path(path).name not in gone
    }
    without = changed(bundle, components=others)
    return Bundle(bundle, msgspec.structs.replace(without.manifest, files=files))


def pipeline(bundle: Bundle | Path, cache: Path | str, **options: object) -> Pipeline:
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return Pipeline(opened, embedding_cache=cache, **options)


def test_text_graphs_and_torch_encode_alike(shared_bundle, encoders):
    by_graph = pipeline(shared_bundle, "off").encode(PROMPTS)
    by_torch = pipeline(without_text_graphs(shared_bundle), "off").encode(PROMPTS)
    assert {kind for kind, _ in encoders.calls} == {"GraphEncoder", "PromptEncoder"}
    assert by_graph.tensors.keys() == by_torch.tensors.keys()
    assert by_graph.encoder_digest == by_torch.encoder_digest
    for name, tensor in by_torch.tensors.items():
        assert tensor.dtype == by_graph.tensors[name].dtype
        # float32 sums in another order over two layers; measured 1.3e-6 with values up to 3
        assert np.abs(by_graph.tensors[name] - tensor).max() <= 1e-5


def test_a_bundle_whose_graphs_make_only_part_of_it_encodes_with_torch(shared_bundle):
    components = dict(Bundle.open(shared_bundle).export.components)
    del components["text_encoder"]
    assert changed(shared_bundle, components=components).export.text_graphs() == {}


def test_an_embedding_does_not_depend_on_the_other_prompts(shared_bundle):
    encoding = pipeline(shared_bundle, "off")
    among = encoding.encode(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        alone = encoding.encode([prompt])
        for name, tensor in alone.tensors.items():
            assert np.array_equal(tensor[0], among.tensors[name][index])


def test_the_second_call_encodes_nothing_also_in_another_process(shared_bundle, tmp_path, encoders):
    first = pipeline(shared_bundle, tmp_path).encode(PROMPTS)
    assert [prompt for _, prompt in encoders.calls] == PROMPTS
    encoders.calls.clear()
    second = pipeline(shared_bundle, tmp_path).encode(PROMPTS)
    assert encoders.calls == []
    assert second.prompts == first.prompts
    assert second.encoder_digest == first.encoder_digest
    for name, tensor in first.tensors.items():
        assert np.array_equal(second.tensors[name], tensor)


def test_a_prompt_given_twice_is_encoded_once(shared_bundle, encoders):
    made = pipeline(shared_bundle, "off").encode([PROMPT, "", PROMPT])
    assert [prompt for _, prompt in encoders.calls] == [PROMPT, ""]
    assert made.prompts == (PROMPT, "", PROMPT)
    for tensor in made.tensors.values():
        assert np.array_equal(tensor[0], tensor[2])
        assert not np.array_equal(tensor[0], tensor[1])


@pytest.mark.parametrize("cache", ["off", "kept"])
def test_it_is_known_how_many_prompts_have_to_be_encoded(shared_bundle, tmp_path, cache):
    directory = "off" if cache == "off" else tmp_path
    opened = pipeline(shared_bundle, directory)
    encoder = opened.encoder_on(opened.graphs)
    assert encoder.missing(["a", "b", "a"]) == 2
    encoder.encode(["a"])
    assert encoder.missing(["a", "b"]) == 1
    other = opened.encoder_on(opened.graphs)  # knows what lies on the disk
    assert other.missing(["a", "b"]) == (2 if cache == "off" else 1)


def test_what_differs_in_anything_that_matters_is_a_miss(shared_bundle, bundle, tmp_path, encoders):
    pipeline(shared_bundle, tmp_path).encode([PROMPT])
    encoders.calls.clear()
    pipeline(shared_bundle, tmp_path).encode([PROMPT + " "])
    pipeline(changed(shared_bundle, text_tokens=31), tmp_path).encode([PROMPT])
    pipeline(shared_bundle, tmp_path, text_precision="checkpoint").encode([PROMPT])
    pipeline(other_encoders(bundle), tmp_path).encode([PROMPT])
    assert len(encoders.calls) == 4
    encoders.calls.clear()
    pipeline(shared_bundle, tmp_path).encode([PROMPT])
    assert encoders.calls == []


def other_encoders(bundle: Path) -> Bundle:
    """A bundle whose manifest has another hash for T5's weights."""
    opened = Bundle.open(bundle)
    name = "pipeline/text_encoder_2/model.safetensors"
    record = msgspec.structs.replace(opened.manifest.files[name], sha256="0" * 64)
    files = {**opened.manifest.files, name: record}
    return Bundle(bundle, msgspec.structs.replace(opened.manifest, files=files))


@pytest.mark.parametrize(
    ("name", "is_part"),
    [
        ("pipeline/text_encoder/model.safetensors", True),
        ("pipeline/text_encoder_2/config.json", True),
        ("pipeline/tokenizer_2/tokenizer.json", True),
        ("pipeline/text_encoder/model.onnx", False),
        ("pipeline/text_encoder/tokenizer.json", False),
        ("pipeline/scheduler/scheduler_config.json", False),
        ("transformer/diffusion_pytorch_model.safetensors", False),
    ],
)
def test_the_digest_covers_what_encodes_and_nothing_made_of_it(shared_bundle, name, is_part):
    opened = Bundle.open(shared_bundle)
    before = encoder_digest(opened)
    record = msgspec.structs.replace(opened.manifest.files[name], sha256="0" * 64)
    files = {**opened.manifest.files, name: record}
    other = Bundle(shared_bundle, msgspec.structs.replace(opened.manifest, files=files))
    assert (encoder_digest(other) != before) == is_part


def test_a_cache_that_cannot_be_used_changes_nothing(shared_bundle, tmp_path):
    (tmp_path / "file").write_text("in the way")
    expected = pipeline(shared_bundle, "off").render([PROMPT], schedule="b6")[0]
    found = pipeline(shared_bundle, tmp_path / "file" / "cache").render([PROMPT], schedule="b6")[0]
    assert np.array_equal(found.pixels, expected.pixels)


def test_a_damaged_entry_is_encoded_again(shared_bundle, tmp_path, encoders):
    expected = pipeline(shared_bundle, tmp_path).encode([PROMPT])
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    encoders.calls.clear()
    found = pipeline(shared_bundle, tmp_path).encode([PROMPT])
    assert len(encoders.calls) == 1
    for name, tensor in expected.tensors.items():
        assert np.array_equal(found.tensors[name], tensor)


def test_stored_precision_differs_by_its_rounding(shared_bundle, encoders):
    exact = pipeline(shared_bundle, "off").encode([PROMPT])
    rounded = pipeline(shared_bundle, "off", text_precision="checkpoint").encode([PROMPT])
    assert encoders.calls[-1] == ("PromptEncoder", PROMPT)
    for name, tensor in exact.tensors.items():
        assert rounded.tensors[name].dtype == np.float32
        # float16 has 11 bits: 5e-4 of values up to 3, over two layers; measured 3.3e-3
        assert 0 < np.abs(rounded.tensors[name] - tensor).max() <= 2e-2


def test_embeddings_of_other_encoders_are_refused_with_both_digests(shared_bundle, tmp_path):
    own = pipeline(shared_bundle, "off")
    made = own.encode([PROMPT])
    file = tmp_path / "prompts.safetensors"
    Conditioning(made.prompts, made.tensors, "f" * 64).save(file)
    with pytest.raises(InputError, match=rf"{made.encoder_digest[:12]}.*f{{12}}.*encode"):
        own.render(Conditioning.load(file), schedule="b6")


def test_embeddings_say_in_their_file_what_made_them(shared_bundle, tmp_path):
    made = pipeline(shared_bundle, "off").encode([PROMPT, ""])
    made.save(tmp_path / "prompts.safetensors")
    read = Conditioning.load(tmp_path / "prompts.safetensors")
    assert read.encoder_digest == made.encoder_digest == encoder_digest(Bundle.open(shared_bundle))
    assert read.select(1).encoder_digest == made.encoder_digest
    assert read.followed_by(made).encoder_digest == made.encoder_digest


def test_embeddings_that_do_not_say_are_taken(shared_bundle):
    own = pipeline(shared_bundle, "off")
    made = own.encode([PROMPT])
    (found,) = own.render(Conditioning(made.prompts, made.tensors), schedule="b6")
    (expected,) = own.render(made, schedule="b6")
    assert np.array_equal(found.pixels, expected.pixels)


@pytest.mark.parametrize("prompts", [[], ["a\udcff"]])
def test_what_cannot_be_encoded_is_an_input_error(shared_bundle, prompts):
    with pytest.raises(InputError, match=r"no prompts|is not Unicode text.*UTF-8"):
        pipeline(shared_bundle, "off").encode(prompts)


def test_one_text_is_not_taken_for_a_list(shared_bundle):
    with load(shared_bundle, embedding_cache="off") as pipeline:
        for call in (pipeline.encode, pipeline.render):
            with pytest.raises(InputError, match=r"prompts are a list.*give \['fox'\]"):
                call("fox")


def test_embeddings_of_another_length_are_refused_with_both(shared_bundle):
    with load(shared_bundle, embedding_cache="off") as pipeline:
        made = pipeline.encode(["fox"])
        short = {
            name: tensor[:, :7] if tensor.ndim == 3 else tensor
            for name, tensor in made.tensors.items()
        }
        with pytest.raises(InputError, match=r"of shape \(32, 64\) .* found \(7, 64\)"):
            pipeline.render(Conditioning(made.prompts, short))


def test_encoders_can_be_freed_before_the_network_runs(shared_bundle):
    with load(shared_bundle, embedding_cache="off", keep_encoders=False) as pipeline:
        (first,) = pipeline.render(["fox"], schedule="b6")
        loaded = [path for path in pipeline.graphs._loaded if "text_encoder" in path]
        (second,) = pipeline.render(["fox"], schedule="b6")
    assert not loaded
    assert np.array_equal(first.latent, second.latent)


def test_a_missing_tokenizers_library_is_told_with_the_remedy(shared_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeUnavailableError, match=r"tokenizers.*meancache-trt\[cpu\]"):
        pipeline(shared_bundle, "off").encode([PROMPT])


def test_a_tokenizer_that_cannot_be_read_is_told(bundle):
    opened = Bundle.open(bundle)
    path = bundle / "pipeline" / "text_encoder" / "tokenizer.json"
    path.unlink()
    path.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read.*build the bundle"):
        pipeline(opened, "off").encode([PROMPT])


FORBIDDEN = ("torch", "diffusers", "transformers", "accelerate", "onnx", "onnxscript", "tensorrt")


def run_without_torch(*arguments: object) -> None:
    """The command line in a process where importing torch or what needs it raises."""
    script = f"""
import sys
sys.modules.update(dict.fromkeys({FORBIDDEN!r}))
from meancache_trt.cli import main
main({[str(argument) for argument in arguments]!r})
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_prompt_becomes_a_picture_without_torch(shared_bundle: Path, tmp_path: Path):
    run_without_torch(
        *("render", shared_bundle, "--prompt", PROMPT, "--schedule", "b6", "--seed", 3),
        *("-o", tmp_path / "out", "--embedding-cache", "off"),
    )
    (path,) = (tmp_path / "out").glob("*.png")
    # The reference encodes with torch, so a conditioning that differs by 1e-6 is let through.
    reference = pipeline(without_text_graphs(shared_bundle), "off")
    expected = reference.render([PROMPT], schedule="b6", seed=3)[0]
    with Image.open(path) as picture:
        difference = np.asarray(picture).astype(int) - np.asarray(expected.image).astype(int)
    assert np.abs(difference).max() <= 1  # of 255: where rounding to 8 bits falls otherwise


def test_prompts_are_encoded_into_a_file_without_torch(shared_bundle: Path, tmp_path: Path):
    file = tmp_path / "prompts.safetensors"
    run_without_torch(
        *("encode", shared_bundle, "--prompt", PROMPT, "-o", file),
        *("--embedding-cache", tmp_path / "cache"),
    )
    expected = pipeline(shared_bundle, tmp_path / "cache").encode([PROMPT])
    read = Conditioning.load(file)
    assert all(np.array_equal(read.tensors[n], value) for n, value in expected.tensors.items())
    assert read.encoder_digest == expected.encoder_digest


def test_cached_prompts_render_without_torch_where_only_torch_encodes(
    shared_bundle: Path, tmp_path: Path
):
    bundle = without_text_graphs(shared_bundle)
    pipeline(bundle, tmp_path).encode([PROMPT])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptEncoder, "encode", lambda *_: pytest.fail("must not load"))
        assert pipeline(bundle, tmp_path).render([PROMPT], schedule="b6")


def test_nothing_is_loaded_before_a_prompt_needs_it(shared_bundle):
    with pipeline(shared_bundle, "off") as own:
        assert isinstance(own._encoder, BundleEncoder)
        assert own.graphs._loaded == {}


def test_text_graphs_of_the_manifest_make_all_conditioning(shared_bundle):
    export: Exported = Bundle.open(shared_bundle).export
    made = {name for part in export.text_graphs().values() for name in part.outputs}
    inputs = export.components["transformer"].inputs
    assert made == {name for name, record in inputs.items() if record.role == "conditioning"}
