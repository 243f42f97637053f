"""N1, N2 and N3 without a proxy: host and worker in network namespaces of their own, and a cable between
them, which is pulled, or a wire that loses and reorders packets.

Needs root and `ip` (Debian: iproute2). Where the cable is pulled nobody sends a FIN or an RST.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import uuid

import pytest

from loss import rough, storm
from room import BINARY, eventually
from wire import Missing, Wire, inside, ip, program, said

HOST, WORKER = "10.231.7.1", "10.231.7.2"


@pytest.fixture
def cable():
    """Two namespaces with a veth pair between them: the names of both, and of the host's end."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and `ip` from iproute2")
    tag = uuid.uuid4().hex[:6]
    host, worker = f"parlour-h{tag}", f"parlour-w{tag}"
    ends = f"ph{tag}", f"pw{tag}"
    made = []
    try:
        try:
            for name in (host, worker):
                ip("netns", "add", name)
                made.append(name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", host, "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            ip("-n", host, "link", "set", ends[1], "netns", worker)
            for name, end, address in ((host, ends[0], HOST), (worker, ends[1], WORKER)):
                ip("-n", name, "addr", "add", f"{address}/30", "dev", end)
                ip("-n", name, "link", "set", end, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield host, worker, ends[0]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.parametrize("back", [True, False], ids=["cable back", "control: cable stays out"])
def test_a_pulled_cable_is_found_and_what_ran_is_heard_of_if_it_is_back_in_time(cable, say, back):
    host, worker, end = cable
    settings = ["--set=timeouts.heartbeat=1s", f"--set=timeouts.grace={15 if back else 1}s"]
    with program(
        host, "serve", "--listen", f"{HOST}:0", "--insecure", "--memory", *settings,
        f"--set=server.allowed_hosts={HOST},localhost",
    ) as serving:  # fmt: skip
        url = said(serving, r"listening on (http://\S+)")[1]
        with program(worker, "worker", "slow", "--url", url, "--", "sh", "-c", "sleep 2; cat"):
            listed = ["agents", "--url", url, "--output", "json"]
            eventually(lambda: "slow" in inside(host, *listed).stdout, what="the registration")
            call = subprocess.Popen(
                ["ip", "netns", "exec", host, str(BINARY), "call", "slow", "hello", "--url", url,
                 "--timeout", "30s", "--output", "json"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            workers = ["workers", "--url", url, "--output", "json"]

            def runs():
                shown = json.loads(inside(host, *workers).stdout)["workers"]
                return any(one["in_flight"] for one in shown)

            eventually(runs, what="the call")
            ip("-n", host, "link", "set", end, "down")
            pulled = time.monotonic()

            def is_lost():
                shown = json.loads(inside(host, *workers).stdout)["workers"]
                return not any(one["agent_types"] and one["connected"] for one in shown)

            eventually(is_lost, timeout=20, what="the loss")
            say(f"the host took the worker for lost {time.monotonic() - pulled:.1f} s after the pull")
            if back:
                ip("-n", host, "link", "set", end, "up")
            out, error = call.communicate(timeout=40)
            if back:
                assert call.returncode == 0, error
                assert json.loads(out)["data"].startswith("hello"), out
            else:
                assert call.returncode != 0 and "worker_lost" in error, error


@pytest.mark.parametrize("comes_through", [True, False], ids=["rough", "control: nothing passes"])
def test_what_a_rough_network_loses_doubles_and_reorders_nobody_hears_of(say, comes_through):
    try:
        with Wire() as wire:
            if comes_through:
                wire.loss, wire.twice, wire.delay = 0.2, 0.05, (0.0, 0.1)
            else:
                wire.loss = 1.0
            ended = storm(wire, 10, patience=60 if comes_through else 3, at_least=12)
            say(rough(wire, ended))
    except Missing as missing:
        pytest.skip(str(missing))
    assert wire.lost > 0
    if comes_through:
        assert wire.doubled > 0 and wire.overtook > 0 and ended.resent > 0
        assert ended.failed == [] and ended.answered >= 12
    else:
        assert ended.failed and ended.answered == 0
