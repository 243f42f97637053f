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
    is_ours: bool = False
    # Whether it is given an empty directory on a disk.
    keeps: bool = False


def parlour(options: argparse.Namespace, port: int) -> list[str]:
    return [str(options.parlour), "serve", "--memory", "--listen", f"127.0.0.1:{port}", *options.set]


def keeping(options: argparse.Namespace, port: int) -> list[str]:
    data = str(options.data / "parlour")
    return [str(options.parlour), "serve", "--data", data, "--listen", f"127.0.0.1:{port}", *options.set]


def peer(name: str) -> Callable[[argparse.Namespace, int], list[str]]:
    return lambda options, port: [str(options.peers / name), "--listen", f"127.0.0.1:{port}"]


def group_commit(options: argparse.Namespace, port: int) -> list[str]:
    return [*peer("raw")(options, port), "--log", str(options.data / "log")]


def jetstream(name: str) -> Callable[[argparse.Namespace, int], list[str]]:
    return lambda options, port: [
        *[options.jetstream, "--addr", "127.0.0.1", "--port", str(port)],
        *["--config", str(options.work / f"{name}.conf")],
    ]


PARLOUR = Host("Parlour", parlour, is_ours=True)
PARLOUR_DISK = Host("Parlour on disk", keeping, is_ours=True, keeps=True)
RAW_DISK = Host("raw on disk", group_commit, keeps=True)
# An fsync for each message, and as it comes: it acknowledges without one.
NATS_FSYNC = Host("NATS fsync", jetstream("fsync"), chooses_port=False, scheme="nats", keeps=True)
NATS_DISK = Host("NATS no fsync", jetstream("default"), chooses_port=False, scheme="nats", keeps=True)
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
HOSTS = (RAW, RAW_DISK, NATS, NATS_FSYNC, NATS_DISK, AUTOGEN, AXUM, SLIM, PARLOUR, PARLOUR_DISK)


class Running:
    """A host's process on processors of its own, for as long as the `with` lasts."""

    def __init__(self, host: Host, options: argparse.Namespace, cpus: str) -> None:
        self.host, self.log = host, options.work / "host.log"
        self.port = 0 if host.chooses_port else free_port()
        self.command = ["taskset", "-c", cpus, *host.command(options, self.port)]
        self.data = options.data

    def __enter__(self) -> "Running":
        if self.host.keeps:
            empty(self.data)
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
        if self.host.keeps:
            empty(self.data)

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


def empty(data: Path) -> None:
    """Makes a directory, or makes it anew."""
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)


def file_system(place: Path) -> str:
    """The type of the file system that a path is on, or would be made on."""
    place = place.resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(len(point), number, kind) for number, (point, kind) in enumerate(mounts)
               if place.is_relative_to(point)]  # fmt: skip
    return max(holding)[2]


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
    missing |= prepare_jetstream(options)
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


def prepare_jetstream(options: argparse.Namespace) -> dict[Host, str]:
    """Finds a server whose JetStream can have an fsync for each message, or else any."""
    store = f'store_dir: "{options.data / "nats"}"'
    for name, settings in (("fsync", f"{store}, sync_interval: always"), ("default", store)):
        (options.work / f"{name}.conf").write_text(f"jetstream {{ {settings} }}\n")
    can_fsync = ["-c", str(options.work / "fsync.conf"), "-t"]
    found = getattr(options, "nats", None)
    try:
        if found is None or subprocess.run([found, *can_fsync], capture_output=True, check=False).returncode:
            options.jetstream = newer_nats(options.work)
            subprocess.run([options.jetstream, *can_fsync], capture_output=True, check=True)
        else:
            options.jetstream = found
    except (OSError, subprocess.SubprocessError, StopIteration, ValueError) as error:
        options.jetstream = found
        why = f"a server with `sync_interval: always` cannot be had: {error}"
        return {NATS_FSYNC: why} | ({} if found else {NATS_DISK: why})
    return {}


def newer_nats(work: Path) -> str:
    """The path of the nats-server of Debian 13, unpacked beside the rest: apt has a state of its own."""
    place = work / "nats-2.10"
    server = place / "usr" / "sbin" / "nats-server"
    if server.exists():
        return str(server)
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    mirrors = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.split()
    mirror = next(uri for uri in mirrors if uri.rstrip("/").endswith("/debian"))
    state = place / "apt"
    (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (state / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (state / "sources.list").write_text(f"deb [signed-by={keyring}] {mirror} trixie main\n")
    settings = {
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "--quiet", *[word for name, value in settings.items() for word in ("-o", f"{name}={value}")]]
    subprocess.run([*apt, "update"], check=True, capture_output=True, timeout=300)
    subprocess.run([*apt, "download", "nats-server"], cwd=place, check=True, capture_output=True, timeout=300)
    package = next(place.glob("nats-server_*.deb"))
    subprocess.run(["dpkg", "-x", str(package), str(place)], check=True)
    shutil.rmtree(state)
    return str(server)


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
    if NATS_DISK not in missing and options.jetstream != getattr(options, "nats", None):
        lines.append(f"{said(options.jetstream, '--version')} for JetStream")
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
