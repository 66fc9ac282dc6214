"""Runs commands in forks of a process that has imported streamsyn, so that no test waits for imports.

`ForkedProcess` is a `subprocess.Popen` whose child is such a fork: pipes, signals, exit codes and time-outs
are those of a process started afresh; only the interpreter's start is left out.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_REQUEST_BYTES = 2**20


class ForkServer:
    """The process that forks; started by the first command, ended by the closing of its socket.

    Args:
        modules: Imported before the first fork.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def connect(self) -> socket.socket:
        """A connection, which carries one command."""
        if self._process is None:
            self._folder = tempfile.TemporaryDirectory(prefix="forks")
            command = [sys.executable, "-m", "tests.system.fork_server", self._path, *self._modules]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._process.stdout is not None
            assert b"ready\n" == self._process.stdout.readline()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._path)
        return connection

    @property
    def _path(self) -> str:
        assert self._folder is not None
        return f"{self._folder.name}/socket"

    def close(self) -> None:
        """End it; what it forked goes on."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()


class ForkedProcess(subprocess.Popen[Any]):
    """A command of streamsyn, as if it were started with `python -m streamsyn`."""

    def __init__(self, server: ForkServer, arguments: list[str], **options: Any) -> None:
        self._server = server
        super().__init__(arguments, **options)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        """Ask for a fork in place of `fork` and `exec`; called by Popen when the pipes are open."""
        names = [
            "executable",
            "preexec_fn",
            "close_fds",
            "pass_fds",
            "cwd",
            "env",
            "startupinfo",
            "creationflags",
            "shell",
            "p2cread",
            "p2cwrite",
            "c2pread",
            "c2pwrite",
            "errread",
            "errwrite",
            "restore_signals",
            "gid",
            "gids",
            "uid",
            "umask",
            "session",
        ]
        given = dict(zip(names, rest, strict=False))
        request = {
            "argv": list(args),
            "cwd": str(given["cwd"] or Path.cwd()),
            "env": dict(os.environ if given["env"] is None else given["env"]),
            "session": bool(given["session"]),
        }
        fds = [
            standard if fd == -1 else fd
            for standard, fd in enumerate((given["p2cread"], given["c2pwrite"], given["errwrite"]))
        ]
        self._connection = self._server.connect()
        sent = json.dumps(request).encode()
        socket.send_fds(self._connection, [len(sent).to_bytes(4, "big") + sent], fds)
        self.pid = int.from_bytes(_exactly(self._connection, 4), "big")
        self._child_created = True
        for fd, theirs in zip(fds, ("p2cread", "c2pwrite", "errwrite"), strict=True):
            ours = {"p2cread": "p2cwrite", "c2pwrite": "c2pread", "errwrite": "errread"}[theirs]
            if fd > 2 and given[ours] != -1:
                os.close(fd)

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        return self._ended(0)

    def _wait(self, timeout: float | None) -> int:
        code = self._ended(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._connection.settimeout(None)
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    return None
            self.returncode = int.from_bytes(_exactly(self._connection, 4), "big", signed=True)
            self._connection.close()
        return self.returncode


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        assert part, "the fork server has ended"
        found += part
    return found


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, fds, _, _ = socket.recv_fds(connection, _REQUEST_BYTES, 3)
    size = int.from_bytes(data[:4], "big")
    data = data[4:] + _exactly(connection, size - len(data) + 4)
    request: dict[str, Any] = json.loads(data)
    return request, fds


def _serve(path: str, modules: list[str]) -> list[str] | None:
    """Fork for each connection. Returns the command line in a fork; None when stdin is closed."""
    for module in modules:
        __import__(module)
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen(16)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    return None
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    request, fds = _receive(connection)
                    pid = os.fork()
                    if pid == 0:
                        for other in list(selector.get_map().values()):
                            if other.data is not None:
                                os.close(other.fd)
                                other.data[1].close()
                        connection.close()
                        return _become(request, fds)
                    for fd in fds:
                        os.close(fd)
                    connection.sendall(pid.to_bytes(4, "big"))
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
                else:
                    pid, connection = key.data
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    with connection:
                        connection.sendall(code.to_bytes(4, "big", signed=True))


def _become(request: dict[str, Any], fds: list[int]) -> list[str]:
    """Make this fork what a new process would be."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[0] = request["cwd"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    argv: list[str] = request["argv"]
    return argv


if __name__ == "__main__":
    command = _serve(sys.argv[1], sys.argv[2:])
    if command is not None:
        from streamsyn.cli.main import main

        sys.argv = ["streamsyn", *command]
        main()
