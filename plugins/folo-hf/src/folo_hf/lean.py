"""Imports torch and transformers without what only training, sharding and compiling need.

Most of a cold start is imports, and more than half of transformers' own serve work that a process which only
generates never does. With ``FOLO_LEAN_START=1``, which the ``folo`` command sets for itself, that part is spared:

- transformers is told that torch has no ``torch.distributed``, a build of torch that it supports.
- ``torch._dynamo``, which transformers imports for a few decorators, is run when something first asks it for more.
- What calculates shapes on the ``meta`` device in Python is run when a ``meta`` block, a fake tensor or the compiler
  first needs it; building a module of which the weights come from a file does not.
- The list of transformers' modules, for which it reads thousands of files, is kept in Folo's cache.

A program that uses Folo as a library keeps the transformers that it would have without Folo.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import threading
from contextlib import contextmanager
from functools import partial, wraps
from importlib import metadata
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from folo_hf.cache import cache_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

VARIABLE = "FOLO_LEAN_START"
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR")
"""Set for each process of a distributed launch, which needs all of transformers."""

_IMPORT_UTILS = "transformers.utils.import_utils"
_DYNAMO = "torch._dynamo"
_META = "torch._meta_registrations"
_TRACING = f"{_DYNAMO}._trace_wrapped_higher_order_op"


_lock = threading.RLock()
_put_off: list[ModuleType] = []
"""Holds torch's shape calculations while they have not run."""


def asked() -> bool:
    """Whether this process asks for a lean start."""
    return os.environ.get(VARIABLE, "").strip().lower() in {"1", "true", "yes", "on"}


def install() -> None:
    """Make the imports that follow lean, if that is asked for and nothing speaks against it."""
    if not asked() or "transformers" in sys.modules or any(name in os.environ for name in LAUNCHED):
        return
    _import_torch()
    sys.meta_path.insert(0, _TransformersTuner())
    if _DYNAMO not in sys.modules:
        decorators = {"allow_in_graph": _allow_in_graph, "assume_constant_result": _constant, "disable": _disable}
        _defer(_DYNAMO, decorators)
        sys.meta_path.insert(0, _DynamoFirst())
        _defer(_TRACING, {"TransformGetItemToIndex": _real("TransformGetItemToIndex")})


def _import_torch() -> None:
    """Import torch and put off what calculates shapes on ``meta``, a fifth of its import."""
    if "torch" in sys.modules:
        return
    sys.modules[_META] = ModuleType(_META)
    try:
        importlib.import_module("torch")
    finally:
        placeholder = sys.modules.pop(_META)
    device = importlib.import_module("torch.utils._device").DeviceContext
    fake = importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode
    for mode in (device, fake):
        mode.__init__ = _completing(mode.__init__)
    _put_off.append(placeholder)


def complete_torch() -> None:
    """Run what ``_import_torch`` put off."""
    with _lock:
        if _put_off:
            _put_off.clear()
            importlib.import_module(_META)


@contextmanager
def incomplete_torch() -> Iterator[None]:
    """Enter the ``meta`` device in a block without completing torch: for what needs no shapes calculated there."""
    held, _put_off[:] = _put_off[:], []
    try:
        yield
    finally:
        _put_off.extend(held)


def _completing(function: Callable[..., None]) -> Callable[..., None]:
    """A constructor of what has torch calculate shapes, after which torch is whole."""

    @wraps(function)
    def call(self: Any, *args: Any, **options: Any) -> None:  # noqa: ANN401 (the function's own)
        function(self, *args, **options)
        if _put_off and str(getattr(self, "device", "meta")) == "meta":
            complete_torch()

    return call


class _TransformersTuner:
    """Adapts ``transformers.utils.import_utils`` as soon as it has run, before anything has asked it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _IMPORT_UTILS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_adapt(module: ModuleType) -> None:
            run(module)
            _adapt(module)

        spec.loader.exec_module = run_and_adapt  # type: ignore[method-assign]
        return spec


def _adapt(module: ModuleType) -> None:
    if hasattr(module, "is_torch_distributed_available"):
        module.is_torch_distributed_available = _no  # type: ignore[attr-defined]
    if hasattr(module, "create_import_structure_from_path"):
        models = Path(module.__file__ or "").parents[1] / "models"
        scan = module.create_import_structure_from_path
        module.create_import_structure_from_path = _Structures(models, scan)  # type: ignore[attr-defined]


def _no(*_args: object, **_options: object) -> bool:
    return False


class _Structures:
    """transformers' list of the modules of a folder; that of all its models comes from Folo's cache."""

    def __init__(self, models: Path, scan: Callable[[Any], Any]) -> None:
        self._models, self._scan = models, scan
        self._known: dict[str, Any] = {}

    def __call__(self, folder: Any) -> Any:  # noqa: ANN401 (transformers' own types)
        path = Path(folder)
        if path.suffix == ".py":
            path = path.parent
        if path == self._models:
            self._known = self._known or self._all()
            return self._known
        part = self._known.get(path.name) if path.parent == self._models else None
        return self._scan(folder) if part is None else part

    def _all(self) -> dict[str, Any]:
        name = release_of(self._models)
        if name is None:
            return dict(self._scan(self._models))
        file = cache_folder() / "transformers" / f"{name}.json"
        try:
            return dict(_decode(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            scanned = dict(self._scan(self._models))
            write_json(file, _encode(scanned))
            return scanned


def release_of(models: Path) -> str | None:
    """Name of the installed transformers; none for a working copy, whose modules change without a new version."""
    try:
        distribution = metadata.distribution("transformers")
        record = Path(str(distribution.locate_file(f"transformers-{distribution.version}.dist-info/RECORD"))).stat()
    except (OSError, metadata.PackageNotFoundError):
        return None
    if Path(str(distribution.locate_file("transformers/models"))) != models:
        return None
    return f"{distribution.version}-{record.st_size:x}-{record.st_mtime_ns:x}"


def _encode(structure: Any) -> Any:  # noqa: ANN401 (nested dicts)
    """Write a structure as JSON: its keys are names, or sets of backends; its leaves are sets of names."""
    if isinstance(structure, dict):
        return [
            [sorted(key) if isinstance(key, frozenset) else key, _encode(value)] for key, value in structure.items()
        ]
    return {"names": sorted(structure)}


def _decode(value: Any) -> Any:  # noqa: ANN401 (as above)
    if isinstance(value, dict):
        return set(value["names"])
    return {frozenset(key) if isinstance(key, list) else str(key): _decode(each) for key, each in value}


_allowed: list[Any] = []
"""What the stand-in of ``allow_in_graph`` was given."""


class _Deferred(ModuleType):
    """A module that runs when something asks it for a name that it lacks."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the module has)
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        run(self)
        return getattr(self, name)


class _DynamoFirst:
    """Runs the deferred package before any submodule: they import one another in the order that it sets."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package = sys.modules.get(_DYNAMO)
        if not name.startswith(f"{_DYNAMO}.") or type(package) is not _Deferred:
            return None
        sys.meta_path.remove(self)
        run(package)
        return ModuleSpec(name, _Loaded()) if name in sys.modules else None


class _Loaded(Loader):
    """Gives an importer the module that is there already."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it has run."""


def _defer(name: str, stand_ins: dict[str, Any]) -> None:
    parent, _, leaf = name.rpartition(".")
    package = sys.modules[parent]
    spec = PathFinder.find_spec(name, package.__path__)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    _become(module, _Deferred)
    vars(module).update(stand_ins, _stand_ins=tuple(stand_ins))
    sys.modules[name] = module
    setattr(package, leaf, module)


def _become(module: ModuleType, kind: type[ModuleType]) -> None:
    module.__class__ = kind


def run(module: ModuleType) -> None:
    """Run a deferred module, once."""
    with _lock:
        if type(module) is not _Deferred or module.__spec__ is None or module.__spec__.loader is None:
            return
        complete_torch()
        _become(module, ModuleType)
        for name in vars(module).pop("_stand_ins"):
            vars(module).pop(name, None)
        module.__spec__.loader.exec_module(module)
        if module.__name__ == _DYNAMO:
            for function in _allowed:
                vars(module)["allow_in_graph"](function)
            _allowed.clear()


def _allow_in_graph(function: Any) -> Any:  # noqa: ANN401 (as torch's own)
    """Remember the function for torch's own, which notes it for the compiler."""
    _allowed.append(function)
    return function


def _constant(function: Any) -> Any:  # noqa: ANN401 (as torch's own)
    """All that torch's own does."""
    function._dynamo_marked_constant = True  # noqa: SLF001
    return function


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:  # noqa: ANN401, FBT001, FBT002
    """Keep the compiler out of a function; while the compiler has not run, there is nothing to keep out."""
    if function is None:
        return partial(_disable, recursive=recursive, **options)
    disabled: list[Any] = []

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:  # noqa: ANN401 (the function's own)
        module = sys.modules[_DYNAMO]
        if type(module) is _Deferred:
            return function(*args, **named)
        if not disabled:
            disabled.append(vars(module)["disable"](function, recursive, **options))
        return disabled[0](*args, **named)

    return call


def _real(name: str) -> Callable[..., Any]:
    """Stands in for a class that is only ever called: makes one of the real class."""

    def make(*args: Any, **options: Any) -> Any:  # noqa: ANN401 (whatever the class takes)
        module = sys.modules[_TRACING]
        run(sys.modules[_DYNAMO])
        run(module)
        return getattr(module, name)(*args, **options)

    return make
