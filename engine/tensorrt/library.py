"""Which TensorRT is installed, and what it says when it refuses."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, get_args

from meancache_trt.errors import RuntimeUnavailableError

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
EXTRAS: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
"""The extra of this package that installs a flavour."""


@dataclass(frozen=True)
class Library:
    """An imported flavour. `module` is `tensorrt` or `tensorrt_rtx`, `version` its exact one."""

    flavour: Flavour
    version: str
    module: Any


class ErrorLog:
    """A logger for TensorRT that keeps errors: its calls return None and say why only there.

    Warnings are kept apart: some options and files are refused by no more than one.

    Attributes:
        logger: an `ILogger` of the library, to pass to it.
    """

    def __init__(self, library: Library) -> None:
        errors: list[str] = []
        warnings: list[str] = []
        self._errors, self._warnings = errors, warnings
        base: Any = library.module.ILogger
        error, warning = base.Severity.ERROR, base.Severity.WARNING

        class Logger(base):  # type: ignore[misc]  # known at run time only
            def __init__(self) -> None:
                super().__init__()

            def log(self, severity: Any, message: str) -> None:
                if severity <= error:
                    errors.append(message)
                elif severity == warning:
                    warnings.append(message)

        self.logger = Logger()

    def reason(self, *, besides: str | None = None) -> str:
        """Errors since the last call, oldest first, or that there were none.

        Those that contain `besides` are left out, unless there are no others.
        """
        errors = list(dict.fromkeys(self._errors))
        self._errors.clear()
        telling = [error for error in errors if besides is None or besides not in error]
        return "; ".join(telling or errors) or "it does not say why"

    def warnings(self) -> list[str]:
        """Warnings since the last call, each once, oldest first."""
        said = list(dict.fromkeys(self._warnings))
        self._warnings.clear()
        return said


def installed_flavours() -> list[Flavour]:
    """The flavours whose package is there, without importing it."""
    return [name for name in FLAVOURS if importlib.util.find_spec(name) is not None]


def load_library(flavour: Flavour | None = None) -> Library:
    """Import a flavour; None means the one that is installed, `tensorrt` before `tensorrt_rtx`.

    Raises `RuntimeUnavailableError` where it is not installed or cannot be imported.
    """
    wanted = [flavour] if flavour else installed_flavours()
    if not wanted:
        raise RuntimeUnavailableError(
            f"expected one of the packages {' and '.join(FLAVOURS)}, found neither; run "
            "`pip install 'meancache-trt[rtx]'`"
        )
    name = wanted[0]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"expected the package {name}, found {error}; run "
            f"`pip install 'meancache-trt[{EXTRAS[name]}]'`"
        ) from error
    return Library(name, str(module.__version__), module)
