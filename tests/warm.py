"""
A Python whose processes start at once: forks of one that has imported what the commands of this package import.

`python()` is the path of a program that is used as `python -m MODULE ...` or `python SCRIPT ...` are. It has the
streams, environment and folder of its caller; it passes signals on to the fork, and ends as the fork does.
Processes that the fork starts by `sys.executable` are such forks too. Other uses of Python start a new one.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path


PASSED_ON = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
IMPORTED = [
    "accelerate.commands.launch", "datasets", "peft", "torch.distributed.run", "trl_sppo.commands.check",
    "trl_sppo.commands.evaluate",
    "trl_sppo.evaluation.ladder", "trl_sppo.sample", "trl_sppo.runs.report", "trl_sppo.train", "trl_sppo.trainer",
    "transformers.models.bert.modeling_bert", "transformers.models.qwen2.modeling_qwen2",
]  # fmt: skip
PROGRAM = """#!{python} -IS
import sys
sys.path.insert(0, {folder!r})
import warm
warm.client({address!r}, {python!r})
"""


@cache
def python() -> str:
    """The program. Its server ends with this process."""
    folder = Path(tempfile.mkdtemp())
    address, program = str(folder / "socket"), folder / "python"
    program.write_text(PROGRAM.format(python=sys.executable, folder=str(Path(__file__).parent), address=address))
    program.chmod(0o700)
    command = [sys.executable, __file__, address, str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert server.stdin and server.stdout and server.stdout.readline() == b"ready\n"

    def end() -> None:
        server.stdin.close()
        server.wait()
        for path in (Path(address), program):
            path.unlink()
        folder.rmdir()

    atexit.register(end)
    return str(program)


def client(address: str, real_python: str) -> None:
    """Have the server fork, and be its fork for whoever has started this process."""
    argv = sys.argv[2:] if sys.argv[1] == "-u" else sys.argv[1:]
    if argv[0] != "-m" and argv[0].startswith("-"):
        os.execv(real_python, [real_python, *sys.argv[1:]])
    request = json.dumps({"argv": argv, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: server.send(bytes([number])))
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    (status,) = json.loads(server.recv(100) or "[1]")
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(address: str, program: str) -> None:
    """Fork for each client, until standard input ends. Returns in the forks, which are to go on as `__main__`."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        os.write(1, b"ready\n")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the handlers
        while True:
            readable, _, _ = select.select([listening, 0], [], [])
            if 0 in readable:
                sys.exit()
            connection = listening.accept()[0]
            if not os.fork():
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request, left = b"", int.from_bytes(size, "big")
    while len(request) < left:
        request += connection.recv(left - len(request))
    child = os.fork()
    if child:
        _handle(connection, child)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    _become(program, **json.loads(request))


def _handle(connection: socket.socket, child: int) -> None:
    """Pass on signals until the fork has ended, and tell the client how."""
    ended = os.pidfd_open(child)
    while True:
        readable, _, _ = select.select([connection, ended], [], [])
        if ended in readable:
            break
        numbers = connection.recv(100)
        for number in numbers or [signal.SIGKILL]:
            signal.pidfd_send_signal(ended, number)
        if not numbers:  # the client was killed
            break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.sendall(json.dumps([status]).encode())
    except BrokenPipeError:
        pass
    os._exit(0)


def _become(program: str, argv: list[str], environment: dict[str, str], folder: str) -> None:
    """Make of this process one that was started with this command."""
    import faulthandler

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = program
    sys.argv = argv[1:] if argv[0] == "-m" else argv
    first = folder if argv[0] == "-m" else str(Path(argv[0]).parent)
    sys.path[:] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    sys.path_importer_cache.clear()
    if environment.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()


def main(address: str, program: str) -> None:
    import runpy
    from importlib import import_module

    for name in IMPORTED:
        import_module(name)
    gc.freeze()  # the forks need not look through all of it
    serve(address, program)
    name = sys.argv[0]
    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        if name != "trl_sppo":  # a module that is run is not one that is imported already
            sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
