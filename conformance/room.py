"""A host of one's own: the built binary as a process, on a free port, with nothing kept unless asked."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def find_binary() -> Path:
    """`PARLOUR_BIN`, or the newest build."""
    if "PARLOUR_BIN" in os.environ:
        return Path(os.environ["PARLOUR_BIN"]).resolve()
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    built = [target / profile / "parlour" for profile in ("release", "debug")]
    built = [path for path in built if path.exists()]
    if not built:
        raise RuntimeError(
            "no binary: run `cargo build --release -p parlour-cli` or set PARLOUR_BIN"
        )
    return max(built, key=lambda path: path.stat().st_mtime)


BINARY = find_binary()


def environment() -> dict[str, str]:
    """That of whoever runs the suite, which must not configure its hosts: all but the mistake that
    `scripts/torture controls` has a host make."""
    kept = (name for name in os.environ if not name.startswith("PARLOUR_") or name == "PARLOUR_BUG")
    return {name: os.environ[name] for name in kept}


class NotStarted(RuntimeError):
    """The host ended before it listened, with this code."""

    def __init__(self, code: int, stderr: str):
        super().__init__(f"the host did not start, and ended with {code}:\n{stderr}")
        self.code = code


class Room:
    """A running host. Settings are those of its configuration, with `.` written as `__`; `data` is the
    directory in which it keeps what is durable. `under` is a program to start it with, which has to
    become the host's process."""

    def __init__(self, *args: str, port=0, data=None, under=(), **settings):
        sets = [f"--set={key.replace('__', '.')}={value}" for key, value in settings.items()]
        keeps = ["--memory"] if data is None else [f"--data={data}"]
        command = [*under, BINARY, "serve", "--listen", f"127.0.0.1:{port}", *keeps, *sets, *args]
        self.started_after = None
        env = environment()
        begun = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
        )
        self.pid = self.process.pid
        self.stderr: list[str] = []
        listening: queue.Queue[str | None] = queue.Queue()

        def read():
            for line in self.process.stderr:
                self.stderr.append(line)
                found = re.match(r"listening on (http://\S+)", line)
                if found:
                    self.started_after = time.monotonic() - begun
                    listening.put(found[1])
            listening.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            self.url = listening.get(timeout=15)
        except queue.Empty:
            self.url = None
            self.process.kill()
        if self.url is None:
            raise NotStarted(self.process.wait(), "".join(self.stderr))
        self.host, port = self.url.removeprefix("http://").rsplit(":", 1)
        self.port = int(port)
        self.address = (self.host, self.port)

    def get(self, path: str, timeout=5.0):
        """The JSON, or else the text, of a page that must be there."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
            body = answer.read().decode()
            is_json = "json" in answer.headers.get("content-type", "")
            return json.loads(body) if is_json else body

    def http(self, method: str, path: str, body=None, headers=None, timeout=15.0):
        """One request on a connection of its own: the answer, with its `body` read."""
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        try:
            try:
                connection.request(method, path, body=body, headers=headers or {})
            except (BrokenPipeError, ConnectionResetError):
                # Refused while it was still being sent: the answer is there all the same.
                pass
            answer = connection.getresponse()
            answer.body = answer.read()
            return answer
        finally:
            connection.close()

    def rpc(self, method: str, params=None, *, client="conformance", id=1, timeout=15.0) -> dict:
        """One JSON-RPC request: the whole answer object."""
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": id}
        headers = {"content-type": "application/json", "x-client-id": client}
        answer = self.http("POST", "/rpc", json.dumps(request), headers, timeout)
        assert answer.status == 200, (answer.status, answer.body)
        return json.loads(answer.body)

    def answers(self) -> bool:
        """Whether the host is alive and well."""
        return self.process.poll() is None and self.get("/livez").strip() == "ok"

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; 0 if there is none of that name."""
        labels = "" if name.endswith("}") else r"(?:\{[^}]*\})?"
        pattern = re.compile(rf"^{name}{labels} (\S+)", re.MULTILINE)
        return sum(float(value) for value in pattern.findall(self.get("/metrics")))

    def limit_hits(self, key: str) -> float:
        """How often the limit of this key was met."""
        return self.metric(rf'parlour_limit_hits_total{{key="{re.escape(key)}"}}')

    def rss(self) -> int:
        """Resident memory in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait(self, timeout=40.0) -> int:
        return self.process.wait(timeout)

    def kill(self):
        """Ends the host as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ends the host as an operator would, and returns its exit code."""
        if self.process.poll() is None:
            self.signal()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("the host did not end within 40 s of SIGTERM") from None


@contextlib.contextmanager
def worker(url, agent_type, *how):
    """`parlour worker` as a process, and the time to start for it. It echoes if nothing else is said."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PARLOUR_")}
    command = [BINARY, "worker", agent_type, "--name", agent_type, "--url", url, "--quiet"]
    process = subprocess.Popen(
        [*command, *(how or ("--echo",))],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def eventually(holds, timeout=10.0, what="it"):
    """Polls until `holds()` is true, and returns what it returned."""
    deadline = time.monotonic() + timeout
    while True:
        result = holds()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout} s"
        time.sleep(0.02)


async def soon(holds, timeout=10.0, what="it"):
    """The same without holding up what else runs on the loop."""
    deadline = time.monotonic() + timeout
    while not (result := await asyncio.to_thread(holds)):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout} s"
        await asyncio.sleep(0.02)
    return result


class Honest:
    """Somebody who uses the host as intended the whole time, and must never notice the rest."""

    def __init__(self, room):
        self.room, self.slowest, self.rounds, self.failure = room, 0.0, 0, None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        assert self.failure is None, self.failure
        assert self.rounds > 0

    def _run(self):
        while not self._stop.wait(0.02):
            begun = time.monotonic()
            try:
                assert self.room.rpc("runtime.get_subscriptions")["result"]
            except Exception as failure:
                self.failure = failure
                return
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.rounds += 1
