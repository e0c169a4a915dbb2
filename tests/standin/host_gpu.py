"""GPUs that are played by the CPU, for what goes wrong on one without a kernel of one.

`play()` makes torch believe in CUDA and NCCL: device.cpp has the tensors and the process groups, this file the parts of
`torch.cuda` that Python code reads. It must be imported before torch, which looks for CUDA once. As a user would:

    PYTHONPATH=tests/standin python -m moecompile recipe=deepseek_ep mesh.device=cuda

Not played: kernels, streams (all work is done when a call returns), memory that is full, the speed of anything.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_SOURCE = Path(__file__).with_name("device.cpp")
_FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=standin_device")
WAITS = "MOECOMPILE_STANDIN_WAITS"
"""A variable with the file in which each wait is told."""
_LIBRARIES = ("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python")


def _built() -> Path:
    """The library of device.cpp for the torch that is installed, in the user's cache; one process builds it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    made_of = (_SOURCE.read_text(), (torch / "version.py").read_text(), str(torch), *_FLAGS)
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecompile"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"standin-{key}.so"
    with (folder / "standin.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            includes = (torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"])
            links = (*_LIBRARIES, f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib")
            made = library.with_suffix(".made")
            command = ("g++", *_FLAGS, *(f"-I{each}" for each in includes), str(_SOURCE), "-o", str(made), *links)
            subprocess.run(command, check=True)
            made.rename(library)
    return library


def _loaded(library: Path) -> Any:
    """The module `standin_device`: loaded first as a library, whose hooks torch finds when it is imported."""
    ctypes.CDLL(str(library))
    import torch

    assert torch.__version__
    loader = ExtensionFileLoader("standin_device", str(library))
    spec = importlib.util.spec_from_file_location("standin_device", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


device = _loaded(_built())

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._C._distributed_c10d import Backend  # noqa: E402
from torch.distributed import distributed_c10d  # noqa: E402


def _index(place: Any = None) -> int:
    index = place if isinstance(place, int) or place is None else torch.device(place).index
    return device.current_device() if index is None else index


class Stream:
    """All work of the device is done when a call returns, so nothing waits."""

    def __init__(self, *_: object, **__: object) -> None:
        self.device, self.stream_id, self.device_type = torch.device("cuda", _index()), 0, 1

    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class Event:
    """Of a stream; what it waits for is done."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def record(self, stream: object = None) -> None: ...
    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1.0


@contextmanager
def _on_stream(stream: object) -> Iterator[None]:
    yield


@contextmanager
def _on_device(place: Any) -> Iterator[None]:
    before = _index()
    device.set_device(_index(place))
    try:
        yield
    finally:
        device.set_device(before)


def tell_waits(path: str) -> None:
    """Writes a line for each op for which the host waits for the device: the op, where it was called, and where in ours."""

    def tell(name: str) -> None:
        frames = traceback.extract_stack()[:-1]
        ours = next((frame for frame in reversed(frames) if "/moecompile/" in frame.filename), frames[-1])
        places = (f"{frame.filename.rpartition('/site-packages/')[2]}:{frame.lineno}" for frame in (frames[-1], ours))
        with open(f"{path}.{os.environ.get('RANK', '0')}", "a") as file:
            file.write("\t".join((name, *places)) + "\n")

    device.watch_waits(tell)
    atexit.register(device.watch_waits, None)


def play(devices: int = 8) -> None:
    """From now on torch has `devices` GPUs, and NCCL."""
    device.set_device_count(devices)
    properties = SimpleNamespace(
        name="played by the CPU", major=8, minor=0, total_memory=80 << 30
    )  # no e4m3, no Triton
    state, set_state = torch.get_rng_state, torch.set_rng_state
    for name, value in {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": lambda: None, "_lazy_init": lambda: None,
        "device_count": device.device_count, "current_device": device.current_device, "device": _on_device,
        "set_device": lambda place: device.set_device(_index(place)), "synchronize": lambda place=None: None,
        "Stream": Stream, "Event": Event, "stream": _on_stream, "set_stream": lambda stream: None,
        "current_stream": Stream, "default_stream": Stream, "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda place=None: state(), "set_rng_state": lambda given, device=None: set_state(given),
        "get_rng_state_all": lambda: [state()] * device.device_count(), "set_rng_state_all": lambda all: set_state(all[0]),
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "get_device_capability": lambda place=None: (properties.major, properties.minor),
        "get_device_name": lambda place=None: properties.name, "get_device_properties": lambda place=None: properties,
        "is_bf16_supported": lambda *_, **__: True, "empty_cache": lambda: None, "memory_stats": lambda place=None: {},
        "mem_get_info": lambda place=None: (properties.total_memory, properties.total_memory),
        "memory_allocated": lambda place=None: device.memory_allocated(),
        "max_memory_allocated": lambda place=None: device.max_memory_allocated(),
        "reset_peak_memory_stats": lambda place=None: device.reset_peak(),
    }.items():  # fmt: skip
        setattr(torch.cuda, name, value)
    torch.cuda.nccl.version = lambda: (2, 27, 5)
    _play_storage()
    _play_profiler()
    _play_nccl()
    if WAITS in os.environ:
        tell_waits(os.environ[WAITS])


def _play_storage() -> None:
    on_host = {name: getattr(torch.UntypedStorage, name) for name in ("resize_", "clone", "copy_")}

    def whole(storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),))

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        device.resize(whole(storage), size)
        return storage

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        return whole(storage).clone().untyped_storage()

    def copy_(storage: torch.UntypedStorage, other: torch.UntypedStorage, *_: object) -> torch.UntypedStorage:
        whole(storage).copy_(whole(other))
        return storage

    def play(name: str, played: Callable[..., Any]) -> None:
        def either(*arguments: Any) -> Any:
            storages = (each for each in arguments if isinstance(each, torch.UntypedStorage))
            return (played if any(each.device.type == "cuda" for each in storages) else on_host[name])(*arguments)

        setattr(torch.UntypedStorage, name, either)

    for each in (resize_, clone, copy_):
        play(each.__name__, each)


def _play_profiler() -> None:
    """It looks at the host alone: there are no kernels to see."""
    begin = torch.autograd.profiler.profile.__init__

    def on_host(self: Any, *arguments: Any, **keywords: Any) -> None:
        begin(self, *arguments, **{**keywords, "use_device": None})

    torch.autograd.profiler.profile.__init__ = on_host


class Options(Backend.Options):
    """Of a group, as torch fills them in."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__("nccl")
        self.is_high_priority_stream, self.config = False, SimpleNamespace()

    def __deepcopy__(self, memo: object) -> Options:
        return Options()


class ProcessGroupNCCL(device.Group):
    """A group of tensors on the device, over gloo."""

    Options = Options

    def __init__(self, store: dist.Store, rank: int, size: int, options: Options) -> None:
        super().__init__(dist.ProcessGroupGloo(store, rank, size, options._timeout), rank, size)


def _play_nccl() -> None:
    for module in (distributed_c10d, dist):
        module.ProcessGroupNCCL, module.is_nccl_available = ProcessGroupNCCL, lambda: True
    distributed_c10d._NCCL_AVAILABLE, distributed_c10d.default_pg_nccl_timeout = True, timedelta(minutes=10)
    # Of the class that C++ knows: torch makes new objects of the groups that it holds.
    for name in ("_set_default_timeout", "perform_nocolor_split", "eager_connect_single_device", "abort"):
        setattr(device.Group, name, lambda self, *_: None)
    device.Group.options = property(lambda self: Options())
    device.split_by(lambda *made_of: device.Group(dist.ProcessGroupGloo(*made_of), *made_of[1:3]))
