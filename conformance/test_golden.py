"""Frames byte by byte: the client in Python writes and reads them as the host does."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from parlour_v1 import Field, Kind, decode, frame, read_fields

GOLDEN = json.loads((Path(__file__).parent / "golden_frames.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=[case["what"] for case in GOLDEN])
def test_a_frame_is_written_and_read_as_it_stands(case):
    fields = dict(case["json"])
    kind = Kind[fields.pop("kind").upper()]
    payload = fields.pop("payload", "").encode()
    payload = payload or base64.b64decode(fields.pop("payload_base64", ""))
    assert frame(kind, payload, **fields).hex() == case["hex"]

    (read,) = decode(bytes.fromhex(case["hex"]))
    assert (read.kind, read.payload) == (kind, payload)
    for name, value in fields.items():
        if name == "metadata":
            assert read.metadata == value
        else:
            assert read.all(Field[name.upper()]) == (value if isinstance(value, list) else [value])
    assert {Field(number).name.lower() for number, _ in read.fields} == set(fields)


def test_what_is_unknown_is_skipped():
    # A fixed64 and a fixed32 of unknown numbers, then a number that is known.
    header = bytes.fromhex("d9070000000000000000" + "dd0700000000" + "0805")
    assert list(read_fields(header)) == [(1, 5)]
