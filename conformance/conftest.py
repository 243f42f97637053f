"""Rooms for tests. Every room must still answer when its tests are done, and end well on SIGTERM."""

from __future__ import annotations

import asyncio
import functools
import inspect
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from proxy import Splitter
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


@pytest.fixture(scope="module")
def split_room(shared_room):
    splitter = Splitter(shared_room)
    yield splitter
    # The control: it did what it is for.
    assert splitter.proxy.opened == 0 or splitter.proxy.pieces > 100 * splitter.proxy.opened
    splitter.close()


def pytest_generate_tests(metafunc):
    """Where a module says `SPLIT`, each of its tests runs over a network that splits, too."""
    if "room" in metafunc.fixturenames and getattr(metafunc.module, "SPLIT", False):
        metafunc.parametrize("room", ["whole", "split"], indirect=True)


@pytest.fixture
def room(request, shared_room):
    """The room of this module: started once, and it has to answer after each test."""
    if getattr(request, "param", "whole") == "split":
        yield request.getfixturevalue("split_room")
    else:
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
def kept(tmp_path):
    """Opens hosts on one data directory, one after the other."""
    rooms = []

    def start(**settings):
        rooms.append(Room(data=tmp_path / "data", **settings))
        return rooms[-1]

    yield start
    for room in rooms:
        if room.process.poll() is None:
            assert room.stop() == 0, "".join(room.stderr)


@pytest.fixture
def say(capsys):
    """Prints a figure where a person sees it, captured output or not."""

    def say(text):
        with capsys.disabled():
            print(f"\n    {text}", end="")

    return say
