"""Children that die with us on Windows: a job object whose last handle is ours, and which kills when that closes.

The child is created suspended, put into the job, and only then let run, so that it is never outside. Importable
everywhere; the calls exist on Windows only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

from mesh.errors import EngineError
from mesh.supervise.launch import PipedChild, check_program
from mesh.supervise.output import Output

CREATE_SUSPENDED = 0x00000004
CREATE_NO_WINDOW = 0x08000000
CREATE_NEW_PROCESS_GROUP = 0x00000200
PROCESS_TERMINATE = 0x0001
PROCESS_SET_QUOTA = 0x0100
JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION = 0x00000400
JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE = 0x00002000
EXTENDED_LIMIT_INFORMATION = 9


class _BasicLimits(ctypes.Structure):
    _fields_ = (
        ("per_process_user_time_limit", ctypes.c_int64),
        ("per_job_user_time_limit", ctypes.c_int64),
        ("limit_flags", ctypes.c_uint32),
        ("minimum_working_set_size", ctypes.c_size_t),
        ("maximum_working_set_size", ctypes.c_size_t),
        ("active_process_limit", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("priority_class", ctypes.c_uint32),
        ("scheduling_class", ctypes.c_uint32),
    )


class ExtendedLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = (
        ("basic", _BasicLimits),
        ("io_counters", ctypes.c_uint64 * 6),
        ("process_memory_limit", ctypes.c_size_t),
        ("job_memory_limit", ctypes.c_size_t),
        ("peak_process_memory_used", ctypes.c_size_t),
        ("peak_job_memory_used", ctypes.c_size_t),
    )


def load_kernel32() -> Any:
    """kernel32 with the signatures that matter: a handle is a pointer, not an int."""
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    handle, number = ctypes.c_void_p, ctypes.c_uint32
    for name, result, arguments in (
        ("CreateJobObjectW", handle, [ctypes.c_void_p, ctypes.c_wchar_p]),
        ("SetInformationJobObject", ctypes.c_int, [handle, ctypes.c_int, ctypes.c_void_p, number]),
        ("AssignProcessToJobObject", ctypes.c_int, [handle, handle]),
        ("OpenProcess", handle, [number, ctypes.c_int, number]),
        ("CloseHandle", ctypes.c_int, [handle]),
    ):
        function = getattr(kernel32, name)
        function.restype, function.argtypes = result, arguments
    return kernel32


class Job:
    """Processes that the system kills when this process ends. Its handle is never inherited, so ours is the last.

    Raises:
        EngineError: the system refused.
    """

    def __init__(self, kernel32: Any) -> None:
        self._kernel32 = kernel32
        self._handle = kernel32.CreateJobObjectW(None, None)
        if not self._handle:
            raise self._refused("create a job object")
        limits = ExtendedLimits()
        # Dying on an unhandled exception: no dialog box that waits for somebody to press OK.
        limits.basic.limit_flags = JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE | JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION
        size = ctypes.sizeof(limits)
        if not kernel32.SetInformationJobObject(self._handle, EXTENDED_LIMIT_INFORMATION, ctypes.byref(limits), size):
            raise self._refused("limit a job object")

    def add(self, pid: int) -> None:
        process = self._kernel32.OpenProcess(PROCESS_SET_QUOTA | PROCESS_TERMINATE, False, pid)
        if not process:
            raise self._refused(f"open process {pid}")
        try:
            if not self._kernel32.AssignProcessToJobObject(self._handle, process):
                raise self._refused(f"tie process {pid} to mesh")
        finally:
            self._kernel32.CloseHandle(process)

    def _refused(self, what: str) -> EngineError:
        code = getattr(ctypes, "get_last_error", lambda: 0)()
        return EngineError(f"Windows did not let mesh {what} (error {code})")


class WindowsChild(PipedChild):
    """A member of the job."""

    def kill(self) -> None:
        if self._exit_code is None and self.transport is not None:
            with contextlib.suppress(psutil.Error, OSError):
                self.transport.kill()


class WindowsLauncher:
    """Starts programs inside one job for the life of this process."""

    def __init__(self, kernel32: Any = None) -> None:
        self._job = Job(load_kernel32() if kernel32 is None else kernel32)

    async def launch(
        self, argv: Sequence[str], env: Mapping[str, str], output: Output, book: Callable[[int], None]
    ) -> WindowsChild:
        check_program(argv)
        loop = asyncio.get_running_loop()
        try:
            _, child = await loop.subprocess_exec(
                lambda: WindowsChild(output),
                *argv,
                env=env,
                stdin=subprocess.DEVNULL,
                creationflags=CREATE_SUSPENDED | CREATE_NO_WINDOW | CREATE_NEW_PROCESS_GROUP,
            )
        except OSError as error:
            raise EngineError(f"cannot start {argv[0]}: {error.strerror}") from error
        try:
            self._job.add(child.pid)
            book(child.pid)
            psutil.Process(child.pid).resume()
        except BaseException:
            child.kill()
            await child.wait()
            raise
        return child
