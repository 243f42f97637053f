"""The hosts of the comparison: how each is installed, started, and loaded."""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
AUTOGEN_PACKAGE, SLIM_PACKAGE = "autogen-http-runtime==0.1.0", "slim-bindings==3.3.8"


@dataclass(frozen=True)
class Host:
    """Something that takes load. `command` starts it at a port, which is 0 if it chooses one itself."""

    name: str
    command: Callable[[argparse.Namespace, int], list[str]]
    chooses_port: bool = True
    scheme: str = "http"


def parlour(options: argparse.Namespace, port: int) -> list[str]:
    return [str(options.parlour), "serve", "--memory", "--listen", f"127.0.0.1:{port}", *options.set]


def peer(name: str) -> Callable[[argparse.Namespace, int], list[str]]:
    return lambda options, port: [str(options.peers / name), "--listen", f"127.0.0.1:{port}"]


PARLOUR = Host("Parlour", parlour)
RAW = Host("raw", peer("raw"))
AXUM = Host("axum", peer("axum-host"))
NATS = Host(
    "NATS",
    lambda options, port: [options.nats, "--addr", "127.0.0.1", "--port", str(port)],
    chooses_port=False,
    scheme="nats",
)
AUTOGEN = Host(
    "0.1.0",
    lambda options, port: [options.python, str(BENCH / "autogen_peer.py"), str(port)],
    chooses_port=False,
)
SLIM = Host(
    "SLIM",
    lambda options, port: [options.python, str(BENCH / "slim_peer.py"), "node", str(port)],
    chooses_port=False,
)
HOSTS = (RAW, NATS, AUTOGEN, AXUM, SLIM, PARLOUR)


class Running:
    """A host's process on processors of its own, for as long as the `with` lasts."""

    def __init__(self, host: Host, options: argparse.Namespace, cpus: str) -> None:
        self.host, self.log = host, options.work / "host.log"
        self.port = 0 if host.chooses_port else free_port()
        self.command = ["taskset", "-c", cpus, *host.command(options, self.port)]

    def __enter__(self) -> "Running":
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def url(self) -> str:
        """Its address, once it takes connections there."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ended with {self.process.returncode}: {self.last_words()}")
            port = self.port
            if not port:
                found = re.search(r"listening on http://\S+:(\d+)", self.log.read_text(errors="replace"))
                port = int(found[1]) if found else 0
            if port and takes_connections(port):
                return f"{self.host.scheme}://127.0.0.1:{port}"
            time.sleep(0.05)
        raise RuntimeError(f"did not answer within 20 s: {self.last_words()}")

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def free_port() -> int:
    """A port for a host that cannot choose one and say which."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def takes_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def prepare(options: argparse.Namespace) -> dict[Host, str]:
    """Builds and installs what is to be loaded. Returns what is missing, and why."""
    options.work.mkdir(parents=True, exist_ok=True)
    missing = {}
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    packages = ["--package", "parlour-bench-peers"]
    if options.parlour is None:
        options.parlour = target / "parlour"
        packages += ["--package", "parlour-cli"]
    # One build for all, so that they share what they depend on.
    subprocess.run(["cargo", "build", "--release", *packages], cwd=ROOT, check=True)
    options.peers = target
    try:
        options.nats = nats(options.work)
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        missing[NATS] = f"cannot install it: {error}"
    if options.python is None:
        options.python = str(options.work / "venv" / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", str(options.work / "venv")], check=True)
        for host, package in ((AUTOGEN, AUTOGEN_PACKAGE), (SLIM, SLIM_PACKAGE)):
            try:
                pip = [options.python, "-m", "pip", "install", "--quiet", package]
                subprocess.run(pip, check=True, timeout=300)
            except (OSError, subprocess.SubprocessError) as error:
                missing[host] = f"cannot install it: {error}"
    return missing


def nats(work: Path) -> str:
    """The path of nats-server: an installed one, or else Debian's, unpacked beside the rest."""
    installed = shutil.which("nats-server")
    if installed:
        return installed
    place = work / "nats"
    server = place / "usr" / "sbin" / "nats-server"
    if not server.exists():
        place.mkdir(exist_ok=True)
        subprocess.run(["apt-get", "download", "--quiet", "nats-server"], cwd=place, check=True)
        package = next(place.glob("nats-server_*.deb"))
        subprocess.run(["dpkg", "-x", str(package), str(place)], check=True)
    return str(server)


def versions(options: argparse.Namespace, missing: dict[Host, str]) -> list[str]:
    """What was measured, one line each."""
    commit = said("git", "rev-parse", "--short", "HEAD")
    # The page itself changes with every run.
    tracked = ("git", "status", "--porcelain", "--untracked-files=no", "--", ":!bench/RESULTS.md")
    changed = ", changed" if said(*tracked, ":!bench/plots") else ""
    parlour = said(str(options.parlour), "--version")
    ours = (
        f"{parlour}, a binary that was given"
        if options.given
        else f"{parlour} at {commit}{changed}, {said('rustc', '--version')}, release build"
    )
    lines = [ours]
    if NATS not in missing:
        lines.append(said(options.nats, "--version"))
    packages = ("autogen-http-runtime", "fastapi", "starlette", "uvicorn", "httptools", "websockets",
                "slim-bindings")  # fmt: skip
    code = (
        "import platform, importlib.metadata as m\n"
        "names = {d.metadata['Name'] for d in m.distributions()}\n"
        f"found = [n + ' ' + m.version(n) for n in {packages!r} if n in names]\n"
        "print('Python', platform.python_version() + ',', ', '.join(found))"
    )
    lines.append(said(options.python, "-c", code))
    locked = (ROOT / "Cargo.lock").read_text()
    crates = ("axum", "async-nats", "tokio", "mio")
    found = [(name, re.search(rf'name = "{name}"\nversion = "([^"]+)"', locked)) for name in crates]
    lines.append(", ".join(f"{name} {version[1]}" for name, version in found if version))
    return [line for line in lines if line]


def said(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
