"""A wire between two network namespaces that loses, doubles, delays and reorders packets.

Each end is a TUN device, and this program carries the packets: the kernel needs no netem for it. Needs
root, `ip` (Debian: iproute2) and `/dev/net/tun`.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
import uuid

from room import BINARY

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
HOST, WORKER = "10.231.8.1", "10.231.8.2"


class Missing(Exception):
    """What is not here, and without which there is no wire."""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Wire:
    """The namespaces `host` and `worker`, and what passes between them.

    `loss` and `twice` are the shares of packets that are lost and doubled; each of the others takes a
    random time out of `delay`, in seconds, and so overtakes some that were sent before it.
    """

    def __init__(self, *, loss=0.0, twice=0.0, delay=(0.0, 0.0)):
        self.loss, self.twice, self.delay = loss, twice, delay
        self.passed = self.lost = self.doubled = self.overtook = 0
        tag = uuid.uuid4().hex[:6]
        self.host, self.worker = f"parlour-h{tag}", f"parlour-w{tag}"
        self._ends = []
        self._over = False

    def __enter__(self):
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise Missing("needs root and `ip` from iproute2")
        try:
            self._ends.append(self._end(self.host, HOST, WORKER))
            self._ends.append(self._end(self.worker, WORKER, HOST))
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            raise Missing(f"no TUN devices in namespaces: {error}") from None
        self._carrier = threading.Thread(target=self._carry, daemon=True)
        self._carrier.start()
        return self

    def __exit__(self, *_):
        self._over = True
        with contextlib.suppress(AttributeError):
            self._carrier.join()
        for end in self._ends:
            os.close(end)
        for name in (self.host, self.worker):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _end(self, namespace, address, other):
        name = "p" + uuid.uuid4().hex[:8]
        ip("netns", "add", namespace)
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        try:
            request = struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI)
            fcntl.ioctl(end, TUNSETIFF, request)
            ip("link", "set", name, "netns", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "addr", "add", address, "peer", other, "dev", name)
            ip("-n", namespace, "link", "set", name, "up")
        except BaseException:
            os.close(end)
            raise
        return end

    def _carry(self):
        """Takes packets from each end, and hands them to the other when they are due."""
        under_way, number = [], 0
        latest = dict.fromkeys(self._ends, 0)
        others = dict(zip(self._ends, reversed(self._ends)))
        while not self._over:
            now = time.monotonic()
            while under_way and under_way[0][0] <= now:
                _, sent, to, packet = heapq.heappop(under_way)
                self.passed += 1
                self.overtook += sent < latest[to]
                latest[to] = max(latest[to], sent)
                # A device that is full or down has lost it.
                with contextlib.suppress(OSError):
                    os.write(to, packet)
            wait = min(under_way[0][0] - now, 0.1) if under_way else 0.1
            readable, _, _ = select.select(self._ends, [], [], max(wait, 0))
            for end in readable:
                try:
                    packet = os.read(end, 65536)
                except OSError:
                    continue
                number += 1
                if random.random() < self.loss:
                    self.lost += 1
                    continue
                copies = 2 if random.random() < self.twice else 1
                self.doubled += copies - 1
                for _ in range(copies):
                    due = time.monotonic() + random.uniform(*self.delay)
                    heapq.heappush(under_way, (due, number, others[end], packet))


@contextlib.contextmanager
def program(namespace, *arguments):
    """`parlour` in a namespace. Its lines on stderr are read up to the first that holds a text."""
    process = subprocess.Popen(
        ["ip", "netns", "exec", namespace, str(BINARY), *arguments],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()


def said(process, pattern):
    for line in process.stderr:
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"ended without a word of {pattern}")


def inside(namespace, *arguments, timeout=30):
    return subprocess.run(
        ["ip", "netns", "exec", namespace, str(BINARY), *arguments],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def resent(namespace):
    """How many TCP segments were sent again in a namespace."""
    shown = subprocess.run(
        ["ip", "netns", "exec", namespace, "cat", "/proc/net/snmp"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    names, values = (line.split() for line in shown.splitlines() if line.startswith("Tcp:"))
    return int(dict(zip(names, values))["RetransSegs"])
