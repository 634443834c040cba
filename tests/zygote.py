"""Processes that need no imports: a zygote has done them, and every process is a fork of it.

Starting `python sft.py` takes four seconds, of which torch and transformers take nearly all. The forks
run the same file from its first line to its last, with their own arguments, environment, folder and
limits; only the modules that the zygote was told of are there already, with `fresh` none but those of
other packages. What every fork of a zygote shares is the seed of Python's hashes.

    zygote = Zygote(["sft", "dipo"], fresh=True)
    done = zygote.run([sys.executable, "sft.py", "steps=2"], cwd=ROOT)       # as subprocess.run
    done = zygote.torchrun(2, [sys.executable, "sft.py", "steps=2"], cwd=ROOT)           # as torchrun
    process = zygote.popen([sys.executable, "-m", "plumbing.lmdeploy_child", ...])    # as Popen

The zygote ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT), *(str(ROOT / name) for name in ("tests", "benchmarks", "data"))]


class Fork:
    """A running process, with the part of Popen's interface that is used here."""

    def __init__(self, control: socket.socket, args: list[str]):
        self.args, self.returncode = args, None
        self._control = control
        self.pid = int(control.recv(32))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._control.settimeout(timeout)
            try:
                self.returncode = int(self._control.recv(32))
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._control.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(1e-6)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Zygote:
    """Forks of a process that has imported some modules.

    Args:
        preload: those modules; the forks have them, and all that they imported.
        fresh: the forks import this repository's modules anew, from the sys.path that Python would have;
            what was imported from elsewhere is there.
    """

    def __init__(self, preload: list[str], fresh: bool = False):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), "fresh" * fresh, *preload],
                pass_fds=[theirs.fileno()],
                env=environment | {"PYTHONPATH": os.pathsep.join(PATHS)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def close(self) -> None:
        self._socket.close()
        self._process.wait()

    def popen(self, args, cwd=ROOT, env=None, pass_fds=(), stdout=None, stderr=None, limits=(), **_) -> Fork:
        """Start `python FILE ...` or `python -m MODULE ...` in a fork.

        Args:
            pass_fds: open in the fork too, under other numbers; where an argument is one of these
                numbers, the fork gets its own.
            limits: (resource, bytes) to set before anything runs.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        files = [
            f if isinstance(f, int) else f.fileno() for f in (stdout or sys.stderr, stderr or sys.stderr)
        ]
        request = {
            "args": [str(a) for a in args[1:]],
            "cwd": str(cwd),
            "env": dict(os.environ if env is None else env),
            "pass_fds": list(pass_fds),
            "limits": list(limits),
        }
        with theirs, tempfile.TemporaryFile() as file:
            file.write(json.dumps(request).encode())
            file.flush()
            socket.send_fds(self._socket, [b"fork"], [theirs.fileno(), file.fileno(), *files, *pass_fds])
            ours.settimeout(120)  # the first one waits for the imports
            return Fork(ours, args)

    def run(self, args, timeout: float = 300, env=None, **options) -> subprocess.CompletedProcess:
        """Run to the end; standard output and error are captured as text."""
        return self._run(args, [env], timeout, options)

    def torchrun(
        self, ranks: int, args, timeout: float = 300, env=None, **options
    ) -> subprocess.CompletedProcess:
        """The same on several ranks, as torchrun does it: this process is the rendezvous, and a rank that
        fails ends the others. The return code is that of a rank which failed."""
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": store.host,
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        shared = (os.environ if env is None else env) | shared
        each = [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]
        return self._run(args, each, timeout, options)

    def _run(self, args, environments: list, timeout: float, options) -> subprocess.CompletedProcess:
        """A fork for each environment."""
        texts, readers, ends, forks = ["", ""], [], [], []

        def read(i: int, fd: int) -> None:
            with open(fd, errors="replace") as file:
                texts[i] = file.read()

        for i in range(2):  # pipes, since a limit on the size of files would hold for files
            ours, theirs = os.pipe()
            ends.append(theirs)
            readers.append(threading.Thread(target=read, args=(i, ours), daemon=True))
            readers[i].start()
        late = time.monotonic() + timeout
        try:
            for env in environments:
                forks.append(self.popen(args, env=env, stdout=ends[0], stderr=ends[1], **options))
            while any([fork.poll() is None for fork in forks]):
                if time.monotonic() > late or any(fork.returncode for fork in forks):
                    break
                time.sleep(0.002)
        finally:
            for fork in forks:
                fork.kill()
                fork.wait()
            for fd in ends:
                os.close(fd)
        for reader in readers:
            reader.join(max(1.0, late - time.monotonic()))
        if time.monotonic() > late:
            raise subprocess.TimeoutExpired(args, timeout, *texts)
        failed = [fork.returncode for fork in forks if fork.returncode]
        return subprocess.CompletedProcess(args, max(failed, default=0), *texts)


# --------------------------------------------------------------------------- inside the zygote


def forget() -> None:
    """Leave only what does not belong to this repository."""
    sys.path[:] = [folder for folder in sys.path if folder not in PATHS]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name != "__main__" and (str(Path(file).parent) in PATHS or name.startswith("plumbing")):
            del sys.modules[name]


def serve(server: socket.socket) -> None:
    """Fork for every request, until the other end closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers are not waited for
    while True:
        message, fds, _, _ = socket.recv_fds(server, 16, 32)
        if not message:
            return
        if os.fork() == 0:
            server.close()
            watch(fds)
        for fd in fds:
            os.close(fd)


def watch(fds: list[int]) -> None:
    """Fork the process itself, and report its number, then how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    control = socket.socket(fileno=fds[0])
    pid = os.fork()
    if pid == 0:
        control.close()
        become(*fds[1:4], fds[4:])
    for fd in fds[1:]:
        os.close(fd)
    with contextlib.suppress(OSError):
        control.send(str(pid).encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        control.send(str(code).encode())
    os._exit(0)


def become(request_fd: int, out: int, err: int, passed: list[int]) -> None:
    """Run the requested program in this process; never returns."""
    import resource

    with open(request_fd, "rb") as file:
        file.seek(0)
        request = json.load(file)
    for kind, limit in request["limits"]:
        resource.setrlimit(kind, (limit, limit))
    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    numbers = dict(zip(map(str, request["pass_fds"]), map(str, passed), strict=True))
    program, *rest = [numbers.get(a, a) for a in request["args"]]
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for folder in reversed(request["env"].get("PYTHONPATH", "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # torch's is a constant, Python seeds its own after a fork
    code = 1
    try:
        if program == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [program, *rest]
            sys.path.insert(0, str(Path(program).resolve().parent))
            runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finish(code)


def finish(code: int) -> None:
    """What the interpreter does at its end: exit handlers, threads, buffers."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    channel = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:0] = PATHS
    for name in sys.argv[3:]:
        importlib.import_module(name)
    if sys.argv[2] == "fresh":
        forget()
    serve(channel)
    os._exit(0)  # at once: taking torch apart would take a second
