"""The bundle: a directory that holds everything a host needs to render.

    manifest.json            what is here, and the SHA-256 of every file
    schedules/NAME.*.json    any number of baked schedules
    transformer/ vae_decoder/ update/ prepare.onnx     graphs, beside the weights they point into
    plans/                   what TensorRT built, and for what
    measured/                what a backend took here
    pipeline/                tokenizers and text encoders in diffusers' layout

A bundle is built in a temporary directory and renamed, so that it is there whole or not at all.
Schedules and plans are added later, each by an atomic write under a lock; so are resolutions, which
are entries of the manifest alone. `bundle_id` covers graphs, weights and the second stage, not what
is added: pictures with one `bundle_id` and one schedule are comparable.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, Self

import msgspec
from filelock import FileLock

from meancache_trt.errors import BundleError, InputError, MeanCacheError, ScheduleError
from meancache_trt.manifest import Component, Exported, Resolution
from meancache_trt.meancache.files import (
    atomic_write,
    decode_text,
    encode_json,
    made_directory,
    read_bytes,
    write_json,
)
from meancache_trt.meancache.hashing import digest_of, sha256_of, verified_sha256
from meancache_trt.meancache.schedule import Schedule, load_schedule
from meancache_trt.second_stage import check_second_stage
from meancache_trt.shapes import Range

Version = Literal["meancache-trt/bundle/1"]
MANIFEST = "manifest.json"


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and SHA-256 of a file in the bundle."""

    size_bytes: int
    sha256: str


class Addition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A schedule or plan: its file, named after its contents, with size and SHA-256."""

    path: str
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`manifest.json`. `digest` is the SHA-256 of the rest of it, as this module writes it.

    `files` are by path, `additions` by name, such as "schedules/b10".
    """

    schema: Version = "meancache-trt/bundle/1"
    bundle_id: str
    tools: dict[str, str]
    export: Exported
    files: dict[str, FileRecord]
    additions: dict[str, Addition] = {}
    digest: str = ""

    def sealed(self) -> Manifest:
        """This manifest with its digest computed."""
        blank = msgspec.structs.replace(self, digest="")
        return msgspec.structs.replace(blank, digest=digest_of(encode_json(blank)))


class Bundle:
    """An opened bundle whose files are the ones that its manifest names."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def open(cls, directory: Path | str, *, is_full_check: bool = False) -> Self:
        """Open a bundle and check its files.

        Graphs, schedules and the manifest are hashed each time. Weights are hashed when their
        inode, size or times differ from those of the last full hash, or with `is_full_check`.

        Raises:
            BundleError: where the directory is no bundle, or a file is missing or was altered.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        while True:
            try:
                _check_files(directory, manifest, is_full_check=is_full_check)
            except BundleError:
                newer = _read_manifest(directory)
                if newer.digest == manifest.digest:
                    raise
                manifest = newer  # somebody replaced a schedule or plan meanwhile
            else:
                return cls(directory, manifest)

    def refresh(self) -> None:
        """Take up what others added since this bundle was opened. Checks the manifest alone."""
        self.manifest = _read_manifest(self.directory)

    @property
    def export(self) -> Exported:
        """What the export says about itself."""
        return self.manifest.export

    def component_path(self, component: Component) -> Path:
        """Where a component's graph is."""
        return self.directory / component.path

    def names(self, kind: str) -> list[str]:
        """Names of the additions of a kind: "schedules", "plans" or "measured"."""
        paths = [PurePosixPath(name) for name in self.manifest.additions]
        return [path.name for path in paths if path.parent.name == kind]

    def schedule_names(self) -> list[str]:
        """Names of the schedules in the bundle, most evaluations first."""
        names = self.names("schedules")
        return sorted(names, key=lambda name: (-self.schedule(name).budget, name))

    def schedule(self, name: str) -> Schedule:
        """Load a schedule by name. Raises `BundleError` that lists the names there are."""
        addition = self.manifest.additions.get(f"schedules/{name}")
        if addition is None:
            known = ", ".join(self.schedule_names()) or "none yet"
            raise BundleError(
                f"{self.directory} has no schedule {name!r}; expected one of {known}, or the "
                "path of a schedule file. Make one with `meancache-trt bake`"
            )
        return load_schedule(self.directory / addition.path)

    def add_schedule(self, schedule: Schedule) -> Path:
        """Add a schedule under its name, replacing one of that name; returns its path."""
        name = schedule.name
        if not name or Path(name).name != name or name.startswith("."):
            raise ScheduleError(f"a schedule's name is a plain file name, found {name!r}")
        return self.add_file(f"schedules/{name}", encode_json(schedule))

    def add_file(self, name: str, content: bytes) -> Path:
        """Add a JSON file under a name such as "measured/cpu", replacing what had that name.

        The file is named after its contents and the manifest switches to it at once, so that the
        bundle is whole at every moment, also for those who are reading it.
        """
        digest = digest_of(content)
        addition = Addition(f"{name}.{digest[:8]}.json", len(content), digest)
        target = self.directory / addition.path
        with self._locked(name):
            is_new = not target.exists()
            with atomic_write(target) as temporary:
                temporary.write_bytes(content)
            manifest = _read_manifest(self.directory)
            additions = {**manifest.additions, name: addition}
            changed = msgspec.structs.replace(manifest, additions=dict(sorted(additions.items())))
            try:
                self._switch(changed)
            except InputError:
                if is_new:
                    target.unlink()
                raise
            before = manifest.additions.get(name)
            if before is not None and before.path != addition.path:
                (self.directory / before.path).unlink(missing_ok=True)
        return target

    def remove_files(self, names: Collection[str]) -> None:
        """Remove additions by name; those that are not there are left out."""
        with self._locked(MANIFEST):
            manifest = _read_manifest(self.directory)
            additions = dict(manifest.additions)
            gone = [additions.pop(name) for name in names if name in additions]
            self._switch(msgspec.structs.replace(manifest, additions=additions))
            for addition in gone:
                (self.directory / addition.path).unlink(missing_ok=True)

    def extend(
        self, resolutions: Sequence[Resolution] = (), batch: Range | None = None
    ) -> list[Resolution]:
        """List more resolutions behind those there are, and say which batches are meant.

        Returns the resolutions that were not listed yet. The graphs serve every resolution of their
        checkpoint, so that the manifest alone changes, by one switch under the lock. Resolutions
        are of this bundle's text length; None leaves the batch as it is.
        """
        if _extended(self.export, resolutions, batch) == self.export:
            return []  # a bundle that cannot be written may already have all of it
        with self._locked("a resolution"):
            self.manifest = _read_manifest(self.directory)
            there = self.export
            export = _extended(there, resolutions, batch)
            if export != there:
                self._switch(msgspec.structs.replace(self.manifest, export=export))
        return list(export.resolutions[len(there.resolutions) :])

    def _switch(self, manifest: Manifest) -> None:
        """Put a manifest in the place of the one there is; the lock is held."""
        sealed = manifest.sealed()
        write_json(self.directory / MANIFEST, sealed)
        self.manifest = sealed

    @contextlib.contextmanager
    def _locked(self, addition: str) -> Iterator[None]:
        lock = FileLock(self.directory / ".lock")
        try:
            (self.directory / addition).parent.mkdir(exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise InputError(
                f"cannot add {addition} to {self.directory}: {error.strerror}; make it writable"
            ) from error
        try:
            yield
        finally:
            lock.release()


def _extended(there: Exported, resolutions: Sequence[Resolution], batch: Range | None) -> Exported:
    asked = {resolution.size: resolution for resolution in resolutions}
    new = [found for size, found in asked.items() if size not in there.sizes]
    return msgspec.structs.replace(
        there, resolutions=(*there.resolutions, *new), batch=batch or there.batch
    )


def create_bundle(
    directory: Path, export: Callable[[Path], Exported], tools: dict[str, str]
) -> Bundle:
    """Build a bundle beside its final place, then rename it there.

    `export` fills the empty directory that it is given. An existing bundle at `directory` is
    replaced only when the new one is complete; anything else there is left alone.

    Raises:
        InputError: where something that is no bundle stands at `directory`, or its parent cannot
            be written.
        MeanCacheError: as `check_second_stage` does.
    """
    directory = directory.absolute()
    if directory.exists() and not (directory / MANIFEST).is_file() and not _is_empty(directory):
        raise InputError(
            f"{directory} exists and is no bundle; nothing was changed. Give another output path"
        )
    with made_directory(directory.parent):
        building = _temporary_beside(directory)
        try:
            exported = export(building)
            _write_manifest(building, exported, tools)
            building.chmod(0o755)
            _replace(building, directory)
        except OSError as error:
            raise InputError(
                f"cannot write {directory}: {error.strerror}; nothing was left behind. Free some "
                "space or give another output path"
            ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return Bundle.open(directory)


def _temporary_beside(directory: Path) -> Path:
    try:
        prefix = f".{directory.name}.building-"
        return Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    except OSError as error:
        raise InputError(
            f"cannot create {directory}: {error.strerror}; give an output path that is writable"
        ) from error


def _write_manifest(building: Path, exported: Exported, tools: dict[str, str]) -> None:
    check_second_stage(exported)
    hashed = {file.path: file.sha256 for file in exported.weight_files()}
    paths = sorted(path for path in building.rglob("*") if path.is_file())
    files = {}
    for path in paths:
        name = path.relative_to(building).as_posix()
        files[name] = FileRecord(path.stat().st_size, hashed.get(name) or sha256_of(path))
    contents = [(name, record.sha256) for name, record in files.items()]
    stages = [] if exported.second_stage is None else [exported.second_stage]
    bundle_id = digest_of(encode_json([exported.family, contents, *stages]))
    manifest = Manifest(bundle_id=bundle_id, tools=tools, export=exported, files=files)
    write_json(building / MANIFEST, manifest.sealed())


def _replace(building: Path, directory: Path) -> None:
    """Put `building` in the place of `directory`, keeping the old bundle until the last moment."""
    if not directory.exists():
        building.rename(directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
    directory.rename(old / directory.name)
    try:
        building.rename(directory)
    except OSError:
        (old / directory.name).rename(directory)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_empty(directory: Path) -> bool:
    contents: Iterable[Path] = directory.iterdir() if directory.is_dir() else [directory]
    return next(iter(contents), None) is None


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not directory.is_dir() or not path.is_file():
        what = "no such directory" if not directory.exists() else f"no {MANIFEST} in it"
        raise BundleError(
            f"expected a bundle at {directory}, found {what}; make one with "
            f"`meancache-trt build MODEL -o {directory}`"
        )
    text = read_bytes(path)
    try:
        manifest = decode_text(text, Manifest, BundleError)
        check_second_stage(manifest.export)
    except MeanCacheError as error:
        raise BundleError(f"{path}: {error}; build the bundle again") from error
    if not _has_its_digest(text, manifest.digest):
        raise BundleError(
            f"{path} does not have the digest that it states, so it was edited or damaged; build "
            "the bundle again"
        )
    return manifest


def _has_its_digest(text: bytes, digest: str) -> bool:
    """Whether it is that of the text in which it is "".

    Of the text as it stands, since a bundle of an older version lacks fields that this one writes.
    """
    endings = [f'\n "digest": "{value}"\n}}\n'.encode() for value in (digest, "")]
    rest = text.removesuffix(endings[0])
    return rest != text and digest_of(rest + endings[1]) == digest


def _check_files(directory: Path, manifest: Manifest, *, is_full_check: bool) -> None:
    for path, record in manifest.files.items():
        _check_file(directory / path, record, is_full_check=is_full_check)
    for addition in manifest.additions.values():
        _check_file(directory / addition.path, addition, is_full_check=is_full_check)


def _check_file(path: Path, record: FileRecord | Addition, *, is_full_check: bool) -> None:
    try:
        size = path.stat().st_size
        if size != record.size_bytes:
            raise BundleError(
                f"{path} is damaged: expected {record.size_bytes} bytes, found {size}; restore the "
                "file or build the bundle again"
            )
        is_weights = path.suffix == ".safetensors"
        found = verified_sha256(path) if is_weights and not is_full_check else sha256_of(path)
    except OSError as error:
        what = f"{path}, a link to {path.readlink()}" if path.is_symlink() else f"{path}"
        raise BundleError(
            f"the bundle lacks {what}: {error.strerror}; restore the file or build the bundle again"
        ) from error
    if found != record.sha256:
        raise BundleError(
            f"{path} was altered: expected SHA-256 {record.sha256[:16]}…, found {found[:16]}…; "
            "restore the file or build the bundle again"
        )
