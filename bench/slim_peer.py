"""AGNTCY SLIM as a peer of the comparison: its node, and callers and a worker over SLIMRPC.

    slim_peer.py node PORT
    slim_peer.py load --url http://127.0.0.1:PORT --in-flight N --host-pid PID …

`load` prints one line of JSON like `parlour bench call`. Needs the package slim-bindings.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import slim_bindings

# The shared secret that the bindings ask for, of the length that they ask for.
SECRET = "a-secret-that-both-ends-of-the-benchmark-share"
SERVICE, METHOD = "bench", "echo"


def service() -> slim_bindings.Service:
    tracing = slim_bindings.new_tracing_config()
    tracing.log_level = "error"
    slim_bindings.initialize_with_configs(
        tracing_config=tracing,
        runtime_config=slim_bindings.new_runtime_config(),
        service_config=[slim_bindings.new_service_config()],
    )
    return slim_bindings.get_global_service()


async def node(port: int) -> None:
    await service().run_server_async(slim_bindings.new_insecure_server_config(f"127.0.0.1:{port}"))
    print(f"listening on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


async def join(name: str, url: str) -> tuple[slim_bindings.App, slim_bindings.Name, int]:
    slim_bindings.uniffi_set_event_loop(asyncio.get_running_loop())
    room = service()
    config = slim_bindings.new_insecure_client_config(url)
    connection = await room.connect_async(config)
    own = slim_bindings.Name("bench", "bench", name)
    app = room.create_app_with_secret(own, SECRET)
    await app.subscribe_async(own, connection)
    return app, own, connection


class Echo(slim_bindings.UnaryUnaryHandler):
    async def handle(self, request: bytes, context: slim_bindings.Context) -> bytes:
        return request


async def work(url: str) -> None:
    app, own, connection = await join("worker", url)
    server = slim_bindings.Server.new_with_connection(app, own, connection)
    server.register_unary_unary(SERVICE, METHOD, Echo())
    print("ready", flush=True)
    await server.serve_async()


async def load(options: argparse.Namespace) -> dict:
    app, _, connection = await join("caller", options.url)
    worker = slim_bindings.Name("bench", "bench", "worker")
    await app.set_route_async(worker, connection)
    channel = slim_bindings.Channel.new_with_connection(app, worker, connection)
    payload = b"x" * options.payload
    begin = time.perf_counter() + options.warmup
    end = begin + options.duration
    took: list[float] = []
    errors: list[str] = []

    async def call() -> None:
        while True:
            began = time.perf_counter()
            try:
                reply = await channel.call_unary_async(
                    SERVICE, METHOD, payload, timedelta(seconds=10), None
                )
                wrong = None if reply == payload else "a reply that is not the request"
            except Exception as error:
                wrong = repr(error)
            ended = time.perf_counter()
            if ended >= end:
                return
            if wrong:
                errors.append(wrong)
            elif ended >= begin:
                took.append(ended - began)

    calls = [asyncio.create_task(call()) for _ in range(options.in_flight)]
    await asyncio.sleep(begin - time.perf_counter())
    driver, host = cpu("self"), cpu(options.host_pid)
    await asyncio.sleep(end - time.perf_counter())
    driver, host = cpu("self") - driver, cpu(options.host_pid) - host
    await asyncio.gather(*calls)

    count = len(took)
    cuts = statistics.quantiles(took, n=1000) if count > 1 else [0.0] * 999
    return {
        "calls": count,
        "per_second": count / options.duration,
        **{key: cuts[at] * 1e6 for key, at in (("p50_us", 499), ("p99_us", 989), ("p999_us", 998))},
        "errors": len(errors),
        "unanswered": 0,
        "strays": 0,
        "first_error": errors[0] if errors else None,
        "driver_cpu": driver / options.duration,
        "host_cpu": host / options.duration,
        "host_us_per_call": host * 1e6 / max(1, count),
        "host_rss_bytes": rss(options.host_pid),
    }


def cpu(process: int | str) -> float:
    """Processor time that a process has used, in seconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("node").add_argument("port", type=int)
    verbs.add_parser("work").add_argument("url")
    verb = verbs.add_parser("load")
    verb.add_argument("--url", required=True)
    verb.add_argument("--host-pid", type=int, required=True)
    verb.add_argument("--in-flight", type=int, default=64)
    verb.add_argument("--payload", type=int, default=100)
    verb.add_argument("--duration", type=float, default=5)
    verb.add_argument("--warmup", type=float, default=1)
    options = parser.parse_args()
    if options.verb == "node":
        asyncio.run(node(options.port))
    elif options.verb == "work":
        asyncio.run(work(options.url))
    else:
        command = [sys.executable, __file__, "work", options.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            try:
                if worker.stdout is None or worker.stdout.readline() != "ready\n":
                    sys.exit("the worker did not start")
                print(json.dumps(asyncio.run(load(options))))
            finally:
                worker.kill()


if __name__ == "__main__":
    main()
