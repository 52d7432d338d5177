"""The plans of a bundle: found by what they were built from and for, never by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.library import Flavour
from meancache_trt.engine.tensorrt.record import PlanRecord
from meancache_trt.errors import BundleError, PlanMismatchError
from meancache_trt.manifest import Component
from meancache_trt.meancache.files import decode_json, encode_json
from meancache_trt.meancache.hashing import digest_of, verified_sha256

KIND = "plans"


def graph_digest(bundle: Bundle, component: Component) -> str:
    """SHA-256 over the graph's file and its weight files, as the manifest has them."""
    graph = bundle.manifest.files[component.path].sha256
    return digest_of(encode_json([graph, *(file.sha256 for file in component.weights)]))


class PlanStore:
    """The plans of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def records(self) -> list[PlanRecord]:
        """The sidecar of every plan, the last built first."""
        found = [
            decode_json(self.bundle.directory / addition.path, PlanRecord, BundleError)
            for name, addition in self.bundle.manifest.additions.items()
            if name.startswith(f"{KIND}/")
        ]
        return sorted(found, key=lambda record: record.built_at, reverse=True)

    def loadable(
        self, name: str, component: Component, *, flavour: Flavour, version: str, capability: str
    ) -> list[PlanRecord]:
        """Plans of a component that this library and GPU can load, the last built first.

        Raises `PlanMismatchError` that says what there is instead, and how to build one.
        """
        graph = graph_digest(self.bundle, component)
        wanted = (graph, flavour, version, capability)
        of_component = [record for record in self.records() if record.key.component == name]
        found = [record for record in of_component if _made_for(record) == wanted]
        if not found:
            others = "; ".join(sorted({_described(record) for record in of_component}))
            raise PlanMismatchError(
                f"expected a plan of {name} by {flavour} {version} for compute capability "
                f"{capability}, found {others or 'none'}; build it with `meancache-trt plan "
                f"{self.bundle.directory}`"
            )
        return found

    def checked_path(self, record: PlanRecord) -> Path:
        """Where a plan is, once its size and SHA-256 are those of its record.

        Raises `PlanMismatchError` where it is missing or was altered.
        """
        path = self.bundle.directory / record.file.path
        remedy = f"build it again with `meancache-trt plan {self.bundle.directory}`"
        try:
            found = verified_sha256(path)
        except OSError as error:
            raise PlanMismatchError(f"cannot read {path}: {error.strerror}; {remedy}") from error
        if found != record.file.sha256:
            raise PlanMismatchError(
                f"{path} was altered: expected SHA-256 {record.file.sha256[:16]}…, found "
                f"{found[:16]}…; {remedy}"
            )
        return path


def profile_text(profile: Mapping[str, object]) -> str:
    """A profile for a message."""
    return ", ".join(f"{name} {shapes}" for name, shapes in profile.items())


def _made_for(record: PlanRecord) -> tuple[str, str, str, str]:
    key = record.key
    return key.graph, key.flavour, key.version, key.compute_capability


def _described(record: PlanRecord) -> str:
    key = record.key
    return f"{key.flavour} {key.version} for {key.compute_capability}"
