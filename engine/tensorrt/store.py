"""The plans of a bundle: found by what they were built from and for, never by name."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.library import Flavour
from meancache_trt.engine.tensorrt.record import PlanFile, PlanKey, PlanRecord
from meancache_trt.engine.tensorrt.target import has_bfloat16
from meancache_trt.errors import BundleError, InputError, PlanMismatchError
from meancache_trt.manifest import Component
from meancache_trt.meancache.files import decode_json, encode_json, sync_folder
from meancache_trt.meancache.hashing import digest_of, remember_sha256, sha256_of, verified_sha256

KIND = "plans"

# plans/transformer-bfloat16.sm89.0123456789ab: component, GPU, beginning of the key's digest. A
# finished plan adds the beginning of its own digest, one in the making a dot before and letters.
_STEM = r"[\w-]+\.sm\d+\.[0-9a-f]{12}"
_NAME = re.compile(rf"{KIND}/{_STEM}")
_FILE = re.compile(rf"\.?({_STEM})(?:\.\w+)*\.(?:plan|building|json)")


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
        names = [name for name in self.bundle.manifest.additions if _NAME.fullmatch(name)]
        found = [record for name in names if (record := self._record(name)) is not None]
        return sorted(found, key=lambda record: record.built_at, reverse=True)

    def find(self, key: PlanKey) -> PlanRecord | None:
        """The plan of a key in the bundle as it is now on disk, or None."""
        self.bundle.refresh()
        record = self._record(f"{KIND}/{_stem(key)}")
        return record if record is not None and record.key.digest == key.digest else None

    def _record(self, name: str) -> PlanRecord | None:
        """The sidecar of an addition; again where somebody just replaced it."""
        while (addition := self.bundle.manifest.additions.get(name)) is not None:
            try:
                return decode_json(self.bundle.directory / addition.path, PlanRecord, BundleError)
            except InputError:
                self.bundle.refresh()
                if self.bundle.manifest.additions.get(name) == addition:
                    raise
        return None

    @contextlib.contextmanager
    def lock(self, key: PlanKey, wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold a key, so that nobody else builds it; `wait` is called where somebody does.

        The lock goes with the process that holds it. Raises `InputError` where the bundle cannot
        be written.
        """
        lock = self._key_lock(_stem(key))
        try:
            self._folder.mkdir(exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                wait()
                lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def building(self, key: PlanKey) -> Iterator[Path]:
        """An empty file in the bundle for a plan in the making; what is left of it is removed."""
        try:
            handle, name = tempfile.mkstemp(
                prefix=f".{_stem(key)}.", suffix=".building", dir=self._folder
            )
        except OSError as error:
            raise self._unwritable(error) from error
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def add(self, record: PlanRecord, plan: Path) -> PlanRecord:
        """Move a plan into the bundle and switch its key to it; the record with its place.

        `plan` is from `building` and synced, the key's lock is held, and `record.file` says the
        plan's size and digest. The plan is there under its final name before the manifest says so,
        and one that it replaces goes afterwards. Raises `InputError` where the bundle cannot be
        written.
        """
        before = self.find(record.key)
        stem = _stem(record.key)
        path = f"{KIND}/{stem}.{record.file.sha256[:8]}.plan"
        file = PlanFile(path, record.file.size_bytes, record.file.sha256)
        target = self.bundle.directory / path
        try:
            plan.chmod(0o644)
            plan.replace(target)
        except OSError as error:
            raise self._unwritable(error) from error
        sync_folder(self._folder)
        placed = msgspec.structs.replace(record, file=file)
        is_other = before is None or before.file.path != path
        try:
            self.bundle.add_file(f"{KIND}/{stem}", encode_json(placed))
        except InputError:
            if is_other:
                target.unlink(missing_ok=True)
            raise
        remember_sha256(target, file.sha256)
        if before is not None and is_other:
            (self.bundle.directory / before.file.path).unlink(missing_ok=True)
        return placed

    def outdated(self, versions: Mapping[str, str]) -> list[PlanRecord]:
        """Plans of graphs that the bundle no longer has, or of another version of a flavour.

        `versions` has those that are installed; of other flavours every version is kept.
        """
        components = self.bundle.export.components
        graphs = {name: graph_digest(self.bundle, part) for name, part in components.items()}
        return [
            record
            for record in self.records()
            if graphs.get(record.key.component) != record.key.graph
            or versions.get(record.key.flavour, record.key.version) != record.key.version
        ]

    def remove(self, records: Sequence[PlanRecord]) -> None:
        """Remove plans; the manifest forgets them before their files go."""
        self.bundle.remove_files([f"{KIND}/{_stem(record.key)}" for record in records])
        for record in records:
            (self.bundle.directory / record.file.path).unlink(missing_ok=True)

    def clean(self) -> list[Path]:
        """Remove files of builds that ended midway, and return them; those in progress stay."""
        orphans = []
        for path in self._strangers():
            lock = self._key_lock(_matched(path))
            with contextlib.suppress(Timeout, OSError), lock.acquire(timeout=0):
                if path in self._strangers():  # still so, now that nobody builds it
                    path.unlink(missing_ok=True)
                    orphans.append(path)
        return orphans

    def _strangers(self) -> list[Path]:
        """Files named as plans are that the manifest on disk does not know."""
        self.bundle.refresh()
        additions = self.bundle.manifest.additions.values()
        known = {*(addition.path for addition in additions)}
        known |= {record.file.path for record in self.records()}
        files = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        return [
            path
            for path in files
            if _FILE.fullmatch(path.name) and f"{KIND}/{path.name}" not in known
        ]

    @property
    def _folder(self) -> Path:
        return self.bundle.directory / KIND

    def _key_lock(self, stem: str) -> FileLock:
        return FileLock(self._folder / f".{stem}.lock")

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"cannot add plans to {self.bundle.directory}: {error.strerror}; make it writable"
        )

    def loadable(
        self, name: str, component: Component, *, flavour: Flavour, version: str, capability: str
    ) -> list[PlanRecord]:
        """Plans of a component that this library and GPU can load, the last built first.

        Raises `PlanMismatchError` that says what there is instead, and how to build one.
        """
        wanted = (graph_digest(self.bundle, component), flavour, version)
        of_component = [record for record in self.records() if record.key.component == name]
        found = [
            record
            for record in of_component
            if _made_by(record) == wanted and serves(record.key, capability)
        ]
        if not found:
            others = "; ".join(sorted({_described(record) for record in of_component}))
            raise PlanMismatchError(
                f"expected a plan of {name} by {flavour} {version} for compute capability "
                f"{capability}, found {others or 'none'}; build it with `meancache-trt plan "
                f"{self.bundle.directory}`"
            )
        return found

    def checked_path(self, record: PlanRecord, *, is_full_check: bool = False) -> Path:
        """Where a plan is, once its size and SHA-256 are those of its record.

        It is hashed when its inode, size or times differ from those of the last full hash, or with
        `is_full_check`. Raises `PlanMismatchError` where it is missing or was altered.
        """
        path = self.bundle.directory / record.file.path
        remedy = f"build it again with `meancache-trt plan {self.bundle.directory}`"
        try:
            found = sha256_of(path) if is_full_check else verified_sha256(path)
        except OSError as error:
            raise PlanMismatchError(f"cannot read {path}: {error.strerror}; {remedy}") from error
        if found != record.file.sha256:
            raise PlanMismatchError(
                f"{path} was altered: expected SHA-256 {record.file.sha256[:16]}…, found "
                f"{found[:16]}…; {remedy}"
            )
        return path


def _made_by(record: PlanRecord) -> tuple[str, str, str]:
    return record.key.graph, record.key.flavour, record.key.version


def serves(key: PlanKey, capability: str) -> bool:
    """Whether a plan runs on GPUs of a compute capability."""
    if key.options.hardware_compatibility == "ampere_plus":
        return has_bfloat16(capability)  # Ampere was the first that has it
    return key.compute_capability == capability


def _stem(key: PlanKey) -> str:
    component = re.sub(r"[^\w-]", "-", key.component)
    return f"{component}.sm{key.compute_capability.replace('.', '')}.{key.digest[:12]}"


def _matched(path: Path) -> str:
    found = _FILE.fullmatch(path.name)
    assert found is not None
    return found[1]


def _described(record: PlanRecord) -> str:
    key = record.key
    return f"{key.flavour} {key.version} for {key.compute_capability}"
