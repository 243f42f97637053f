"""Rooms for tests. Every room must still answer when its tests are done, and end well on SIGTERM."""

from __future__ import annotations

import asyncio
import functools
import inspect
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from room import BINARY, Room


def pytest_configure():
    # Hundreds of connections at once, here and in the hosts that are started from here.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def pytest_report_header():
    return f"parlour: {BINARY}"


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector, name, obj):
    """Runs `async def` tests, each on a loop of its own and for two minutes at most."""
    if inspect.iscoroutinefunction(obj) and name.startswith("test_"):

        async def bounded(*args, **kwargs):
            # The default pool has few threads on a small machine, and each blocking request takes one.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))
            await asyncio.wait_for(obj(*args, **kwargs), 120)

        @functools.wraps(obj)
        def run(*args, **kwargs):
            asyncio.run(bounded(*args, **kwargs))

        setattr(collector.obj, name, run)
        return list(collector._genfunctions(name, run))
    return None


@pytest.fixture(scope="module")
def shared_room():
    room = Room()
    yield room
    assert room.answers()
    assert room.stop() == 0, "".join(room.stderr)


@pytest.fixture
def room(shared_room):
    """The room of this module: started once, and it has to answer after each test."""
    yield shared_room
    assert shared_room.answers(), "".join(shared_room.stderr)


@pytest.fixture(scope="module")
def module_room():
    """Starts rooms with settings of their own; they end with the module."""
    yield from _start_rooms()


@pytest.fixture
def start_room():
    """Starts rooms with settings of their own; they end with the test."""
    yield from _start_rooms()


def _start_rooms():
    rooms: list[Room] = []

    def start(*args, **settings):
        rooms.append(Room(*args, **settings))
        return rooms[-1]

    yield start
    try:
        for room in rooms:
            if room.process.poll() is None:
                assert room.answers(), "".join(room.stderr)
                assert room.stop() == 0, "".join(room.stderr)
    finally:
        for room in rooms:
            if room.process.poll() is None:
                room.process.kill()
                room.process.wait()


@pytest.fixture
def say(capsys):
    """Prints a figure where a person sees it, captured output or not."""

    def say(text):
        with capsys.disabled():
            print(f"\n    {text}", end="")

    return say
