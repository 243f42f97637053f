"""What operators do with what a host keeps: backups, checks, and a look at the machine."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
from pathlib import Path

import pytest

import backup
import bitrot
from room import BINARY, Room, eventually, worker
from test_disk import small_disk  # noqa: F401
from test_durable import ended, look, send


def environment() -> dict[str, str]:
    """The environment of whoever runs the suite does not configure what it runs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PARLOUR_")}


def parlour(*args, expect=0, **how) -> subprocess.CompletedProcess:
    command = [BINARY, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), **how)
    assert done.returncode == expect, (done.returncode, done.stdout, done.stderr)
    return done


def verify(*args, expect=0) -> dict:
    return json.loads(parlour("verify", *args, "--json", expect=expect).stdout)


def refused(*args, code: int, says: str, **how):
    """Ends with this code, a sentence and a remedy."""
    done = parlour(*args, expect=code, **how)
    assert says in done.stderr and "hint:" in done.stderr, done.stderr
    return done


@pytest.fixture
def seed():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    random.seed(seed)


# Backups


def test_a_backup_while_writing_is_the_room_as_it_was_at_one_moment(tmp_path, seed):
    backup.rounds(tmp_path, 3)
    assert "acknowledged before" in backup.control(tmp_path)


def test_a_backup_is_one_file_that_nothing_is_written_over(kept, tmp_path):  # noqa: F811
    room, file = kept(), tmp_path / "room.db"
    send(room)
    parlour("backup", file, f"--data={tmp_path / 'data'}")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "data", file]
    bytes_before = file.read_bytes()
    refused("backup", file, f"--data={tmp_path / 'data'}", code=5, says="is there already")
    assert file.read_bytes() == bytes_before
    # The same without a host.
    assert room.stop() == 0
    parlour("backup", tmp_path / "again.db", f"--data={tmp_path / 'data'}")
    assert verify(tmp_path / "again.db")["deliveries"]["accepted"] == 1


def test_a_restored_room_goes_on_and_gives_no_id_again(kept, tmp_path):  # noqa: F811
    room, file, restored = kept(), tmp_path / "room.db", tmp_path / "restored"
    with worker(room.url, "echo"):
        done = send(room, body=b"done", idempotency_key="k")["id"]
        story = ended(room, done)
    waits = send(room, "nobody/k")["id"]
    parlour("backup", file, f"--data={tmp_path / 'data'}")
    later = send(room, "nobody/k")["id"]
    room.kill()
    parlour("restore", file, f"--data={restored}")
    other = Room(data=restored)
    try:
        eventually(lambda: other.http("GET", "/readyz").status == 200, what="the logs are read")
        assert look(other, done) == story
        assert other.http("GET", f"/v1/deliveries/{done}/reply").body == b"done"
        assert look(other, waits)["state"] == "accepted"
        assert send(other, body=b"done", idempotency_key="k")["id"] == done
        # What was accepted after the backup names nothing, and no new message takes its name.
        look(other, later, expect=404)
        new = send(other, "nobody/k")["id"]
        assert new != later and new.split("-")[::2] == later.split("-")[::2]
    finally:
        other.kill()


def test_a_room_that_has_data_or_a_host_is_not_restored_over(kept, tmp_path):  # noqa: F811
    room, file, data = kept(), tmp_path / "room.db", tmp_path / "data"
    send(room)
    parlour("backup", file, f"--data={data}")
    refused("restore", file, f"--data={data}", code=75, says="another host uses")
    assert room.stop() == 0
    before = (data / "parlour.db").read_bytes()
    refused("restore", file, f"--data={data}", code=5, says="is there already")
    assert (data / "parlour.db").read_bytes() == before


def test_what_is_damaged_is_neither_backed_up_nor_restored(kept, tmp_path):  # noqa: F811
    room, file, data = kept(), tmp_path / "room.db", tmp_path / "data"
    send(room)
    assert room.stop() == 0
    parlour("backup", file, f"--data={data}")
    for database in (file, data / "parlour.db"):
        damage(database)
    refused("restore", file, f"--data={tmp_path / 'new'}", code=74, says="is damaged")
    refused("backup", tmp_path / "other.db", f"--data={data}", code=74, says="is damaged")
    assert not (tmp_path / "other.db").exists()
    assert [it.name for it in (tmp_path / "new").iterdir()] == ["lock"]
    text = tmp_path / "text"
    text.write_text("not a database, " * 1000)
    refused("restore", text, f"--data={tmp_path / 'new'}", code=74, says="not a database")
    refused("restore", tmp_path / "none", f"--data={tmp_path / 'new'}", code=74, says="not there")
    refused("restore", data, f"--data={tmp_path / 'new'}", code=2, says="is a directory")


def test_a_room_that_has_lost_what_was_acknowledged_is_not_served_until_it_is_restored(kept, tmp_path):  # noqa: F811
    room, file, data = kept(), tmp_path / "room.db", tmp_path / "data"
    kept_ = send(room)["id"]
    parlour("backup", file, f"--data={data}")
    lost = send(room)["id"]
    room.kill()
    (data / "parlour.db-wal").write_bytes(b"")
    before = {it.name: it.read_bytes() for it in data.iterdir()}
    says = "what was acknowledged reaches to"
    # As often as it is tried, and by whom.
    for _ in range(2):
        assert "remove the file `head`" in refused(*serve(data), code=74, says=says).stderr
        refused("backup", tmp_path / "other.db", f"--data={data}", code=74, says="is damaged")
        assert says in verify(f"--data={data}", expect=74)["damaged"][0]["detail"]
    for name in ("head", "parlour.db", "parlour.db-wal"):
        assert (data / name).read_bytes() == before[name], name
    # The control: where nobody knows what was acknowledged, it is gone without a word.
    unknown = tmp_path / "unknown"
    shutil.copytree(data, unknown, ignore=shutil.ignore_patterns("head", "view*", "reserve"))
    verify(f"--data={unknown}")
    room = Room(data=unknown)
    look(room, kept_, expect=404)
    room.kill()
    for database in data.glob("parlour.db*"):
        database.unlink()
    parlour("restore", file, f"--data={data}")
    room = Room(data=data)
    try:
        eventually(lambda: room.http("GET", "/readyz").status == 200, what="the logs are read")
        assert look(room, kept_)["state"] == "accepted"
        look(room, lost, expect=404)
    finally:
        room.kill()


def test_a_note_of_what_was_acknowledged_that_is_damaged_is_named_and_made_anew(kept, tmp_path):  # noqa: F811
    room, data = kept(), tmp_path / "data"
    name = send(room)["id"]
    assert room.stop() == 0
    head = (data / "head").read_bytes()
    for damaged in (head[:-1], head + b"x", b"1" + head[1:], bytes(len(head))):
        (data / "head").write_bytes(damaged)
        assert "acknowledged" in verify(f"--data={data}", expect=74)["damaged"][0]["detail"]
        room = Room(data=data)
        assert look(room, name)["state"] == "accepted"
        assert room.stop() == 0
        assert any("acknowledged is not known" in line for line in room.stderr)
        assert (data / "head").read_bytes() >= head and verify(f"--data={data}")["sound"]


def damage(database: Path) -> tuple[int, int]:
    """Changes a byte of one commit, and tells its partition and position."""
    with sqlite3.connect(database) as connection:
        name, commit = connection.execute(
            "SELECT id, commit_bytes FROM commits ORDER BY length(commit_bytes) DESC, id DESC"
        ).fetchone()
        changed = commit[:-1] + bytes([commit[-1] ^ 1])
        connection.execute("UPDATE commits SET commit_bytes = ? WHERE id = ?", (changed, name))
    connection.close()
    return name & 0xFFFF, name >> 16


def test_a_backup_that_is_interrupted_leaves_nothing(kept, tmp_path):  # noqa: F811
    room, file = kept(), tmp_path / "room.db"
    for number in range(60):
        send(room, f"nobody/{number}", random.randbytes(900_000))
    command = [BINARY, "backup", file, f"--data={tmp_path / 'data'}"]
    interrupted = False
    for _ in range(20):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        partial = Path(f"{file}.partial")
        eventually(lambda: partial.exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert not partial.exists()
        interrupted |= process.returncode == 130
        if process.returncode == 130:
            assert not file.exists()
            break
        file.unlink()
    assert interrupted


def test_a_backup_for_which_there_is_no_room_leaves_nothing(kept, tmp_path, small_disk):  # noqa: F811
    room, file = kept(), small_disk / "room.db"
    for number in range(40):
        send(room, f"nobody/{number}", random.randbytes(900_000))
    done = refused("backup", file, f"--data={tmp_path / 'data'}", code=74, says="cannot use")
    assert "free some space" in done.stderr
    assert list(small_disk.iterdir()) == []


# Checks


def test_a_room_is_checked_beside_its_host(kept, tmp_path):  # noqa: F811
    room, data = kept(timeouts__grace="1ms"), f"--data={tmp_path / 'data'}"
    with worker(room.url, "echo"):
        for number in range(20):
            ended(room, send(room, f"echo/{number}")["id"])
        send(room, "nobody/k")
        found = verify(data)
        send(room)
    assert found["sound"] and found["damaged"] == [] and found["format"] >= 1
    counts = found["deliveries"]
    assert (counts["accepted"], counts["completed"], counts["waiting"]) == (21, 20, 1)
    assert found["view"]["right"] and found["view"]["surplus"] == 0
    text = parlour("verify", data).stdout
    assert "as it was written" in text


def test_a_damaged_commit_is_named_and_the_rest_goes_on_being_served(kept, tmp_path):  # noqa: F811
    room, data = kept(), tmp_path / "data"
    names = [send(room, f"nobody/{number}", b"x" * 5000)["id"] for number in range(30)]
    assert room.stop() == 0
    partition, position = damage(data / "parlour.db")
    found = verify(f"--data={data}", expect=74)
    of = [(it["partition"], it["position"]) for it in found["damaged"]]
    assert of == [(partition, position)] and not found["sound"]
    said = parlour("verify", f"--data={data}", expect=74)
    assert f"commit {position} of partition {partition}" in said.stdout and "hint:" in said.stderr
    room = Room(data=data)
    try:
        unready = lambda: room.http("GET", "/readyz").body  # noqa: E731
        eventually(lambda: f"commit {position}".encode() in unready(), what="it is noticed")
        for name in names:
            status = room.http("GET", f"/v1/deliveries/{name}").status
            assert status == (503 if name.startswith(f"{partition}-") else 200), name
    finally:
        room.kill()
    # Nothing was mended by throwing away.
    assert len(verify(f"--data={data}", expect=74)["damaged"]) == 1


def test_a_missing_commit_is_noticed(kept, tmp_path):  # noqa: F811
    room, data = kept(), tmp_path / "data"
    for _ in range(5):
        send(room, "nobody/k")
    assert room.stop() == 0
    with sqlite3.connect(data / "parlour.db") as database:
        names = [name for (name,) in database.execute(
            "SELECT id FROM commits WHERE id & 65535 = (SELECT id & 65535 FROM commits GROUP BY 1 "
            "ORDER BY count(*) DESC LIMIT 1) ORDER BY id"
        )]
        database.execute("DELETE FROM commits WHERE id = ?", (names[2],))
    database.close()
    found = verify(f"--data={data}", expect=74)
    assert [it["position"] for it in found["damaged"] if it["position"]] == [names[3] >> 16]


@pytest.mark.parametrize("change", ["DELETE FROM settled", "UPDATE settled SET byte_offset = byte_offset + 1",
                                    "INSERT INTO settled SELECT id + 1, position, 0 FROM settled"])
def test_a_wrong_view_is_noticed_and_made_anew(kept, tmp_path, change):  # noqa: F811
    room, data = kept(), tmp_path / "data"
    with worker(room.url, "echo"):
        done = send(room)["id"]
        story = ended(room, done)
    assert room.stop() == 0
    with sqlite3.connect(data / "view.db") as view:
        view.execute(change)
    view.close()
    found = verify(f"--data={data}", expect=74)
    assert found["damaged"] == [] and not found["view"]["right"], found
    room = kept()
    refused("verify", "--repair-view", f"--data={data}", code=75, says="another host uses")
    assert room.stop() == 0
    parlour("verify", "--repair-view", f"--data={data}")
    room = kept()
    assert look(room, done) == story
    assert room.stop() == 0
    assert verify(f"--data={data}")["view"]["right"]


def test_no_bit_that_flips_goes_unnoticed_or_is_served(tmp_path, seed, say):
    say(bitrot.rot(tmp_path, 200, serve_each=10))


# Directories that cannot be used


def serve(data) -> list:
    return ["serve", "--listen", "127.0.0.1:0", f"--data={data}"]


def test_a_directory_that_cannot_be_made_or_is_a_file_is_said_with_its_remedy(tmp_path):
    refused(*serve("/proc/none/data"), code=74, says="/proc/none/data")
    file = tmp_path / "file"
    file.write_text("not a directory")
    refused(*serve(file), code=74, says=str(file))
    for verb in (["verify"], ["backup", tmp_path / "b"]):
        refused(*verb, f"--data={tmp_path / 'none'}", code=74, says="not there")
    assert not (tmp_path / "none").exists()


def test_a_directory_on_a_read_only_file_system_is_said_with_its_remedy(kept, tmp_path):  # noqa: F811
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system read-only")
    room, data = kept(), tmp_path / "data"
    send(room)
    assert room.stop() == 0
    for command in (["--bind", data, data], ["-o", "remount,bind,ro", data]):
        done = subprocess.run(["mount", *command], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        refused(*serve(data), code=74, says="Read-only file system")
        assert "Read-only" in parlour("doctor", f"--data={data}", expect=74).stdout
    finally:
        subprocess.run(["umount", "-l", data], check=True)
    assert verify(f"--data={data}")["sound"]


def test_a_directory_of_another_owner_is_said_with_its_remedy(kept, tmp_path):  # noqa: F811
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    room, data = kept(), tmp_path / "data"
    send(room)
    assert room.stop() == 0
    data.chmod(0o700)
    # Somebody else must get as far as the directory, and have the program.
    for path in [tmp_path, *tmp_path.parents][:-2]:
        path.chmod(path.stat().st_mode | 0o711)
    program = tmp_path / "parlour"
    shutil.copy(BINARY, program)
    program.chmod(0o755)

    def as_nobody(*args):
        command = [program, *map(str, args)]
        how = {"user": 65534, "group": 65534, "extra_groups": [], "env": {"HOME": "/"}}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", **how)

    for args in (serve(data), ["verify", f"--data={data}"], ["doctor", f"--data={data}"]):
        done = as_nobody(*args)
        assert done.returncode == 74, done
        assert "ermission denied" in done.stdout + done.stderr
        assert "hint:" in done.stdout + done.stderr
    # And where the directory may be entered, but its files are not to be written.
    data.chmod(0o755)
    done = as_nobody(*serve(data))
    assert done.returncode == 74 and "hint:" in done.stderr, done


@pytest.mark.parametrize(
    ("pragma", "says"),
    [
        ("user_version = 99", "has format 99"),
        ("user_version = 0", "has format 0"),
        ("application_id = 7", "no database of Parlour"),
    ],
)
def test_data_of_another_version_or_program_is_refused_and_left_alone(kept, tmp_path, pragma, says):  # noqa: F811
    room, data = kept(), tmp_path / "data"
    send(room)
    assert room.stop() == 0
    with sqlite3.connect(data / "parlour.db") as database:
        database.execute(f"PRAGMA {pragma}")
        # As most programs have theirs.
        database.execute("PRAGMA journal_mode = delete")
    database.close()
    before = (data / "parlour.db").read_bytes()
    refused(*serve(data), code=78, says=says)
    refused("verify", f"--data={data}", code=78, says=says)
    refused("backup", tmp_path / "b", f"--data={data}", code=78, says=says)
    refused("restore", data / "parlour.db", f"--data={tmp_path / 'new'}", code=78, says=says)
    assert says in parlour("doctor", f"--data={data}", expect=78).stdout
    assert (data / "parlour.db").read_bytes() == before


# A look at the machine


def doctor(*args, expect=0) -> dict:
    found = json.loads(parlour("doctor", *args, "--json", expect=expect).stdout)
    return {it["check"]: it for it in found["checks"]}


def test_a_machine_on_which_a_host_can_run_is_found_well(tmp_path):
    found = doctor(f"--data={tmp_path / 'data'}", "--listen=127.0.0.1:0")
    assert not any(it["verdict"] == "failed" for it in found.values()), found
    assert found["fsync speed"]["writes"] > 0
    assert list(tmp_path.iterdir()) == []
    text = parlour("doctor", f"--data={tmp_path}", "--listen=127.0.0.1:0").stdout
    assert "fsync honesty" in text and list(tmp_path.iterdir()) == []


def test_memory_is_not_taken_for_a_disk(tmp_path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or "/dev/shm tmpfs" not in Path("/proc/self/mounts").read_text():
        pytest.skip("needs a tmpfs at /dev/shm")
    found = doctor(f"--data={memory / f'parlour-{os.getpid()}'}", "--listen=127.0.0.1:0")
    assert found["file system"]["verdict"] == "warning" and "memory" in found["file system"]["detail"]
    assert found["fsync honesty"]["suspect"] and found["fsync honesty"]["hint"]


def test_who_has_the_port_and_the_directory_is_said(kept, tmp_path):  # noqa: F811
    room, data = kept(), f"--data={tmp_path / 'data'}"
    listen = f"--listen={room.host}:{room.port}"
    found = doctor(data, listen)
    assert "listens on" in found["port"]["detail"] and found["port"]["verdict"] == "ok"
    # Another host's port, and a host's directory without the host.
    elsewhere = doctor(f"--data={tmp_path / 'other'}", listen, expect=75)
    assert elsewhere["port"]["verdict"] == "failed" and elsewhere["port"]["hint"]
    hidden = doctor(data, "--listen=127.0.0.1:0", expect=75)
    assert hidden["other host"]["verdict"] == "failed" and hidden["other host"]["hint"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.listen()
        taken = f"--listen=127.0.0.1:{other.getsockname()[1]}"
        # One that says nothing must not hold it up for ever.
        other.settimeout(0.1)
        found = doctor(f"--data={tmp_path / 'other'}", taken, expect=75)
        assert "in use by another program" in found["port"]["detail"]


def test_a_limit_on_descriptors_and_a_clock_that_was_set_back_are_warned_of(kept, tmp_path):  # noqa: F811
    room, data = kept(), tmp_path / "data"
    send(room)
    assert room.stop() == 0
    # Its newest data an hour ahead of the clock.
    with sqlite3.connect(data / "parlour.db") as database:
        newest, commit = database.execute("SELECT id, commit_bytes FROM commits ORDER BY id DESC").fetchone()
        database.execute("UPDATE commits SET commit_bytes = ? WHERE id = ?", (later(commit), newest))
    database.close()
    limited = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", BINARY, "doctor", f"--data={data}"]
    done = subprocess.run([*limited, "--listen=127.0.0.1:0", "--json"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done
    found = {it["check"]: it for it in json.loads(done.stdout)["checks"]}
    assert found["descriptors"]["verdict"] == "warning" and "LimitNOFILE" in found["descriptors"]["hint"]
    assert found["clock"]["verdict"] == "warning" and "ahead" in found["clock"]["detail"], found["clock"]


def later(commit: bytes) -> bytes:
    """The commit as if it were made an hour later: behind the format, its time is a varint."""
    time, length = 0, 0
    while True:
        byte = commit[1 + length]
        time |= (byte & 0x7F) << 7 * length
        length += 1
        if byte < 0x80:
            break
    time += 3_600_000
    digits = [time >> 7 * it & 0x7F | (0x80 if it < length - 1 else 0) for it in range(length)]
    return commit[:1] + bytes(digits) + commit[1 + length :]
