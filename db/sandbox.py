"""The only place where untrusted bytes are parsed: warm children with CPU, memory, time limits.

The child is not trusted: its answer is JSON and raw arrays, never pickle, and its size is capped.
"""

import contextlib
import ctypes
import importlib
import json
import math
import os
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from db.errors import ChildDied, NodeError, PermanentError
from db.faults import VARIABLE

Answer = tuple[dict[str, Any], list[NDArray[Any]]]

_LENGTH = struct.Struct("<I")
_MAX_JSON_BYTES = 64 * 2**20
_MAX_MESSAGE_CHARS = 300
_KINDS = frozenset("biuf")  # what an array may hold: plain numbers
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# A child gets no secrets of ours: the environment is not inherited but for these.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", VARIABLE)


class Unreadable(PermanentError):
    """The sandboxed function failed on these bytes; the message is the exception's type alone."""

    code = "unreadable"


class Sandbox:
    """A pool of children, each serving one call at a time; any thread may call."""

    def __init__(
        self,
        size: int = 1,
        memory_mb: int = 2048,
        cpu_s: float = 30.0,
        *,
        max_answer_mb: int = 8192,
    ) -> None:
        """Start `size` children.

        Parameters
        ----------
        memory_mb : address space of one child, its libraries (about 300 MB) included
        cpu_s : CPU seconds of one call
        max_answer_mb : arrays of one answer
        """
        self._memory_mb, self._cpu_s, self._max_answer = memory_mb, cpu_s, max_answer_mb * 2**20
        # A child dies with the *thread* that started it (prctl 2), so one thread starts them all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox")
        self._free: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        self._size = size
        self._is_closed = False
        for _ in range(size):
            self._free.put(self._start())

    def run(self, function: Callable[..., Answer], *args: Any, timeout_s: float) -> Answer:
        """Call a module's function in a child; waits for a free one.

        Parameters
        ----------
        function : of an importable module; takes JSON values, returns a JSON object and arrays
        timeout_s : wall-clock seconds for the call, the wait for a free child not included

        Raises
        ------
        NodeError
            The one that the function raised, as the same class.
        Unreadable
            For any other exception.
        ChildDied
            If the child crashed, hung or passed a limit. Another stands ready.
        """
        if "." in function.__qualname__ or function.__module__ == "__main__":
            raise ValueError(f"not a function of a module: {function.__qualname__}")
        request = {"module": function.__module__, "name": function.__name__, "args": args}
        child = self._free.get()
        try:
            if self._is_closed:
                raise RuntimeError("the sandbox is closed")
            child = child or self._start()
            answer = child.call(request, timeout_s, self._max_answer)
        except ChildDied:
            if child:
                child.kill()
            child = None if self._is_closed else self._start()
            raise
        finally:
            self._free.put(child)
        return _unwrap(*answer)

    def close(self) -> None:
        """End the children; waits for calls that still run."""
        if self._is_closed:
            return
        self._is_closed = True
        for _ in range(self._size):
            if child := self._free.get():
                child.kill()
        for _ in range(self._size):
            self._free.put(None)  # whoever still waits learns that it is closed
        self._starter.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> "_Child":
        return self._starter.submit(_Child, self._memory_mb, self._cpu_s).result()


class _Child:
    """The parent's end of one child."""

    def __init__(self, memory_mb: int, cpu_s: float) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).resolve()) for p in sys.path)
        # One thread each: arenas and stacks of BLAS threads would eat the address space.
        environment |= {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
        }
        limits = [str(theirs.fileno()), str(memory_mb), str(cpu_s), str(os.getpid())]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "db.sandbox", *limits],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # decoders print what they read
                pass_fds=[theirs.fileno()],
                env=environment,
                cwd="/",
                start_new_session=True,  # an interrupt at the terminal is for the parent
            )

    def call(
        self, request: dict[str, Any], timeout_s: float, max_answer: int
    ) -> tuple[dict[str, Any], list[NDArray[Any]]]:
        deadline = time.monotonic() + timeout_s
        try:
            self._socket.settimeout(timeout_s)
            _send(self._socket, json.dumps(request).encode())
            answer = json.loads(_receive(self._socket, deadline))
            shapes = answer.get("arrays", [])
            arrays = [np.empty(shape, dtype) for shape, dtype in _checked(shapes, max_answer)]
            for array in arrays:
                _fill(self._socket, array.reshape(-1).view(np.uint8).data, deadline)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
            raise ChildDied(f"a sandboxed child gave no answer ({type(error).__name__})") from None
        return answer, arrays

    def kill(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _checked(shapes: Any, max_answer: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """The arrays that the child announces; ValueError unless plain numbers within the cap."""
    found = []
    total = 0
    for shape, name in shapes:
        dtype = np.dtype(str(name))
        if dtype.kind not in _KINDS or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("not an array of numbers")
        total += math.prod(shape) * dtype.itemsize
        found.append((tuple(shape), dtype))
    if total > max_answer or len(found) > 100_000:
        raise ValueError("the answer is too large")
    return found


def _unwrap(answer: dict[str, Any], arrays: list[NDArray[Any]]) -> Answer:
    if answer.get("ok") is True and isinstance(answer.get("value"), dict):
        return answer["value"], arrays
    message = str(answer.get("message", ""))[:_MAX_MESSAGE_CHARS]
    if (code := answer.get("code")) is None:
        raise Unreadable(message)
    raise _error_class(str(code))(message)


def _error_class(code: str) -> type[NodeError]:
    waiting: list[type[NodeError]] = [NodeError]
    while waiting:
        found = waiting.pop()
        if found.code == code:
            return found
        waiting.extend(found.__subclasses__())
    return PermanentError


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(data)))
    connection.sendall(data)


def _receive(connection: socket.socket, deadline: float | None = None) -> bytes:
    head = bytearray(_LENGTH.size)
    _fill(connection, memoryview(head), deadline)
    (length,) = _LENGTH.unpack(head)
    if length > _MAX_JSON_BYTES:
        raise ValueError("message too long")
    data = bytearray(length)
    _fill(connection, memoryview(data), deadline)
    return bytes(data)


def _fill(connection: socket.socket, view: memoryview, deadline: float | None) -> None:
    while len(view):
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 1e-6))
        got = connection.recv_into(view)
        if got == 0:
            raise ConnectionResetError("the other end is gone")
        view = view[got:]


# --- the child ---------------------------------------------------------------------------------


def _serve(connection: socket.socket, cpu_s: float) -> None:
    while True:
        try:
            request = json.loads(_receive(connection))
        except ConnectionResetError:
            return  # the parent closed or died
        used = resource.getrusage(resource.RUSAGE_SELF)
        allowed = math.ceil(used.ru_utime + used.ru_stime + cpu_s)
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))
        answer, arrays = _call(request)
        _send(connection, json.dumps(answer).encode())
        for array in arrays:
            if array.size:
                connection.sendall(array.reshape(-1).view(np.uint8).data)


def _call(request: dict[str, Any]) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    try:
        function = getattr(importlib.import_module(request["module"]), request["name"])
        value, arrays = function(*request["args"])
        arrays = [np.asarray(array, order="C") for array in arrays]
        shapes = [[list(array.shape), array.dtype.str] for array in arrays]
        return {"ok": True, "value": value, "arrays": shapes}, arrays
    except MemoryError:
        os._exit(1)  # the limit: a heap in this state is not used again
    except NodeError as error:
        return {"ok": False, "code": error.code, "message": str(error)}, []
    except Exception as error:  # noqa: BLE001 - the sandbox's purpose: bytes may raise anything
        return {"ok": False, "message": type(error).__name__}, []


def _confine(memory_mb: int, parent: int) -> None:
    """Give up what parsing does not need, before any bytes are read."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked to die with it
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file
    with contextlib.suppress(ValueError, OSError):  # a lower hard limit stands already
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, memory_mb * 2**20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _main() -> None:
    fd, memory_mb, cpu_s, parent = sys.argv[1:]
    _confine(int(memory_mb), int(parent))
    _serve(socket.socket(fileno=int(fd)), float(cpu_s))


if __name__ == "__main__":
    _main()
