"""Checks what was sent against what became of it, in the manner of Jepsen's set and queue tests.

Everything is written down outside the host, by those who did it, before and after they did it:

- publishers: `try` before a message is sent (`token`, which is in its body; `agent`, `seq` for the order
  in which one publisher sent to one agent, `key` if it has an idempotency key, `strict`, `not_before`,
  `expires_at`), then `acked` with the delivery's `id`, `refused` if it was certainly not accepted, or
  `unknown`; `other` is the answer to the same key with another body: its `status`;
- publishers of events: `subscribe` (`name`, `topic`, `agent_type`, `strict`) and `unsubscribe` (`name`) when
  the host has said that it is so, for topics that nobody else publishes to; `try` with `topic` and `source` in
  place of `agent`; `acked` with the `event` and to how many `recipients` it is owed;
- operators: `redrive` before a dead letter is sent back, `cancel` and `discard` before something is given
  up, each with the `id`; `saw` what a reader was told of an acknowledged one: `id`, `state` (`null` if
  there was no such delivery), `generation`, `reply`;
- workers: `run` before an agent does its work: `id`, `attempt`, `agent`, `token`, `worker`, `at`.

In the end the host is asked what it knows: the deliveries by id, with the reply's text as `reply`, the
list of dead letters, the durable subscriptions with how far behind each is, and the terms of the law of
conservation.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

SETTLED = ("completed", "cancelled", "expired")
# By how many milliseconds the clocks of two programs may differ.
SKEW = 100
TERMS = ("completed", "cancelled", "expired", "discarded", "dead", "waiting", "in_flight")

# What must not be, and what it means when it is.
ANOMALIES = {
    "lost": "acknowledged, and not there or not ended as it should have",
    "invented": "delivered or kept, and nobody sent it",
    "stored twice": "one message under two ids",
    "key taken": "a key was accepted again for another body",
    "answers differ": "one request sent again was answered with another id",
    "wrong reply": "a reply that is another message's, or that no agent gave",
    "changed after its end": "what was told to be over was not",
    "went back": "a reader was told of an earlier step than before",
    "attempts went back": "an attempt has a number that was used, or one below that of an earlier one",
    "too many attempts": "more attempts than the maximum",
    "dead too early": "dead though attempts were left",
    "owed to others": "an event owed to more or fewer subscriptions than there were when it was published",
    "subscription lost": "a subscription that was made is not there, one that was removed is, or one is behind",
    "too early": "attempted before its time",
    "too late": "attempted after it had expired, or expired at another time than asked",
    "out of order": "first attempts of one agent not in the order of sending",
    "overtaken": "where the order is strict, one began before an earlier one had ended",
    "in two places": "among the dead letters and not dead, or dead and not among them",
    "not conserved": "the terms of the law of conservation do not add up",
}


class Log:
    """A file to which one program writes down what it does, line by line."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("a", buffering=1)

    def write(self, what: str, **fields):
        # In one write, which the kernel has when this returns.
        self._file.write(json.dumps({"op": what, **fields}) + "\n")

    def close(self):
        self._file.close()


def read(*paths: Path) -> list[dict]:
    """What was written down in these files."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@dataclass
class End:
    """What the host says in the end."""

    deliveries: dict[str, dict] = field(default_factory=dict)
    dead_letters: list[str] = field(default_factory=list)
    subscriptions: dict[str, int] = field(default_factory=dict)
    terms: dict[str, int] = field(default_factory=dict)


@dataclass
class Report:
    """What was found: anomalies by kind, each with its story, and how much there was to look at."""

    anomalies: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    acknowledged: int = 0
    """Messages, and events for each subscription that they are owed to."""
    events: int = 0
    unknown: int = 0
    refused: int = 0
    runs: int = 0
    duplicates: int = 0
    """Runs of what had run before."""
    ended: Counter = field(default_factory=Counter)

    def found(self, what: str, story: str):
        assert what in ANOMALIES, what
        self.anomalies[what].append(story)

    def __str__(self) -> str:
        lost, invented = len(self.anomalies["lost"]), len(self.anomalies["invented"])
        ended = ", ".join(f"{count} {state}" for state, count in sorted(self.ended.items()))
        lines = [
            f"{self.acknowledged} acknowledged, {self.events} events among them, {lost} lost, {invented} "
            f"invented; {self.unknown} never answered, {self.refused} refused; {self.runs} runs, "
            f"{self.duplicates} of them duplicates; {ended}"
        ]
        for what, stories in self.anomalies.items():
            if stories:
                lines.append(f"{what} ({len(stories)}): {ANOMALIES[what]}")
                lines += [f"    {story}" for story in stories[:5]]
        return "\n".join(lines)

    def is_clean(self) -> bool:
        return not any(self.anomalies.values())


def check(published: list[dict], ran: list[dict], end: End) -> Report:
    """Looks for what must not be. `ran` is in the order of writing, per worker."""
    report = Report(runs=len(ran))
    published, ran = _owed(report, published, ran, end.subscriptions)
    tries: dict[str, dict] = {}
    ids: dict[str, set[str]] = defaultdict(set)
    given_up: set[str] = set()
    redriven = Counter(entry["id"] for entry in published if entry["op"] == "redrive")
    outcomes = Counter(entry["op"] for entry in published)
    report.unknown, report.refused = outcomes["unknown"], outcomes["refused"]
    seen: dict[str, dict] = {}
    accepted, refused = {}, set()
    for entry in published:
        match entry["op"]:
            case "try":
                tries.setdefault(entry["token"], entry)
            case "acked":
                token, name = entry["token"], entry["id"]
                if accepted.setdefault(token, name) != name:
                    report.found("answers differ", f"{token}: {accepted[token]}, then {name}")
                if name is not None:
                    ids[token].add(name)
            case "refused":
                refused.add(entry["token"])
            case "other" if entry["status"] != 409:
                report.found("key taken", f"{entry['token']}: {entry['status']}")
            case "cancel" | "discard":
                given_up.add(entry["id"])
            case "saw" if entry["state"] is None:
                report.found("lost", f"{entry['id']} was not known to a reader")
            case "saw":
                _compare(report, seen.get(entry["id"]), entry, redriven[entry["id"]])
                seen[entry["id"]] = entry
    report.acknowledged = len(accepted)
    refused -= accepted.keys() | {it["token"] for it in published if it["op"] == "unknown"}

    runs: dict[str, list[dict]] = defaultdict(list)
    for run in ran:
        runs[run["id"]].append(run)
        token = run["token"]
        if token not in tries or tries[token]["agent"] != run["agent"] or token in refused:
            report.found("invented", f"{run['id']} ran as {run['agent']} with {token!r}")
        ids[token].add(run["id"])
    for token, names in ids.items():
        if len(names) > 1:
            report.found("stored twice", f"{token}: {', '.join(sorted(names))}")
    report.duplicates = len(ran) - len({run["token"] for run in ran})

    tokens = {name: token for token, names in ids.items() for name in names}
    for token, name in accepted.items():
        if name is None and not ids[token]:
            report.found("lost", f"{token}: it was published, and never ran")
        elif not (ids[token] if name is None else {name}) & end.deliveries.keys():
            report.found("lost", f"{token}: {name} is not known")
    for name, found in end.deliveries.items():
        sent = tries.get(tokens.get(name))
        report.ended[found["state"]] += 1
        if sent is None:
            report.found("invented", f"{name} is known, and was neither sent nor run")
            continue
        _compare(report, seen.get(name), {**found, "id": name}, redriven[name])
        _life(report, name, found, sent, runs[name], redriven[name], name in given_up)
    _order(report, tries, ran, runs, end.deliveries, redriven)
    _strict_order(report, tries, runs, end.deliveries, redriven)
    _places(report, end, len(accepted), report.unknown)
    return report


def _owed(report: Report, published: list[dict], ran: list[dict], subscriptions: dict[str, int]):
    """The same with each event as one message for each subscription that there was."""
    subscribed: dict[str, dict] = {}
    events: dict[str, list[dict]] = {}
    told: dict[str, str] = {}
    messages = []
    for entry in published:
        token = entry.get("token")
        match entry["op"]:
            case "subscribe":
                subscribed[entry["name"]] = entry
            case "unsubscribe":
                subscribed.pop(entry["name"], None)
            case "try" if "topic" in entry:
                events[token] = [
                    {"op": "try", "token": f"{token} for {it['name']}", "body": token, "seq": entry["seq"],
                     "agent": f"{it['agent_type']}/{entry['source']}", "strict": it["strict"]}
                    for it in subscribed.values() if it["topic"] == entry["topic"]
                ]  # fmt: skip
                messages += events[token]
            case "acked" if token in events:
                event, recipients = entry["event"], entry["recipients"]
                if told.setdefault(token, event) != event:
                    report.found("answers differ", f"{token}: {told[token]}, then {event}")
                if recipients != len(events[token]):
                    owed = [it["token"] for it in events[token]]
                    report.found("owed to others", f"{token}: owed to {recipients}, not as {owed}")
                messages += [{"op": "acked", "token": it["token"], "id": None} for it in events[token]]
            case "unknown" | "refused" if token in events:
                messages += [{**entry, "token": it["token"]} for it in events[token]]
            case _:
                messages.append(entry)
    report.events = sum(len(events[token]) for token in told)
    names = {(token, it["agent"]): it["token"] for token, all in events.items() for it in all}
    ran = [{**run, "token": names.get((run["token"], run["agent"]), run["token"])} for run in ran]
    behind = {name: lag for name, lag in subscriptions.items() if lag}
    if behind or subscriptions.keys() != subscribed.keys():
        report.found("subscription lost", f"{sorted(subscribed)} were made, there are {subscriptions}")
    return messages, ran


def _compare(report: Report, before: dict | None, after: dict, redriven: int):
    """A reader that is told twice is told of what follows."""
    if before is None:
        return
    name, was, now = after["id"], before["state"], after["state"]
    if after["generation"] < before["generation"]:
        report.found("went back", f"{name}: {was} {before['generation']}, then {now} {after['generation']}")
    elif after["generation"] == before["generation"] and was != now:
        report.found("went back", f"{name}: {was}, then {now}, both {after['generation']}")
    told = ("state", "generation", "reply")
    ended = was in SETTLED
    if ended and any(before.get(what) != after.get(what) for what in told):
        report.found("changed after its end", f"{name}: {was}, then {now}: {before} {after}")


def _life(report, name, found, sent, runs, redriven, given_up):
    state, token = found["state"], sent["token"]
    max_attempts, max_lost = found["max_attempts"], found["max_lost"]
    if state == "completed":
        if found.get("reply") != sent.get("body", token):
            report.found("wrong reply", f"{name} has {found.get('reply')!r}, and is {token!r}")
        elif not runs:
            report.found("wrong reply", f"{name} is completed, and never ran")
    elif state == "dead" and found["steps"][-1]["level"] == "discarded":
        if not given_up:
            report.found("lost", f"{token}: {name} was discarded, and nobody asked for that")
    elif state == "dead":
        if found["failed"] < max_attempts and found["lost"] < max_lost:
            report.found("dead too early", f"{name}: {found['failed']} failed, {found['lost']} lost")
    elif state == "expired":
        if sent.get("expires_at") is None:
            report.found("lost", f"{name} expired, and was to be kept")
        elif found["steps"][-1]["at"] < sent["expires_at"] - SKEW:
            report.found("too late", f"{name} expired before {sent['expires_at']}")
    elif state != "cancelled" or not given_up:
        report.found("lost", f"{token}: {name} is {state} in the end")

    for run in runs:
        early = (sent.get("not_before") or 0) - run["at"]
        if early > SKEW:
            report.found("too early", f"{name} ran {early} ms early")
    if sent.get("expires_at") and not redriven:
        # The host counts from when it had the message, which is later.
        ends = found["expires_at"] or 0
        begun = [step["at"] for step in found["steps"] if step["level"] == "dispatched"]
        if ends < sent["expires_at"] - SKEW or any(at >= ends for at in begun):
            report.found("too late", f"{name} was begun at {begun}, expires {ends}: {sent['expires_at']}")
    # The last attempt that is allowed may be lost or fail, but none follows.
    highest = max((run["attempt"] for run in runs), default=0)
    if max(highest, found["attempt"]) > max_attempts + max_lost - 1 or found["failed"] > max_attempts:
        report.found("too many attempts", f"{name}: {highest}, {found['failed']} failed, {found['lost']} lost")
    # Each number once, and once more each time that it was redriven.
    numbers = Counter(run["attempt"] for run in runs)
    again = {number: count for number, count in numbers.items() if count > 1 + redriven}
    by_worker = defaultdict(list)
    for run in runs:
        by_worker[run["worker"]].append(run["attempt"])
    falls = [row for row in by_worker.values() if _falls(row) > redriven]
    if again or falls or (highest > found["attempt"] and not redriven):
        told = [(run["worker"], run["attempt"]) for run in runs]
        report.found("attempts went back", f"{name}: {told}, in the end {found['attempt']}")


def _falls(numbers: list[int]) -> int:
    return sum(after <= before for before, after in zip(numbers, numbers[1:], strict=False))


def _order(report, tries, ran, runs, deliveries, redriven):
    """First attempts at one worker begin in the order of sending."""
    last: dict[tuple, dict] = {}
    for run in ran:
        sent = tries.get(run["token"], {})
        if "seq" not in sent or sent.get("not_before") or redriven[run["id"]]:
            continue
        # One that could not be sent is sent later, under the same number.
        begun = [it for it in deliveries.get(run["id"], {}).get("steps", ()) if it["level"] == "dispatched"]
        if run["attempt"] != 1 or sum(step["attempt"] == 1 for step in begun) > 1:
            continue
        place = run["worker"], run["agent"]
        before = last.get(place)
        if before is not None and before["seq"] > sent["seq"]:
            report.found("out of order", f"{place}: {before['token']} began, then {run['token']}")
        last[place] = max(before or sent, sent, key=lambda it: it["seq"])


def _strict_order(report, tries, runs, deliveries, redriven):
    """Where it is strict, none begins before the last attempts at all that were sent before it have begun.
    What a worker had of an attempt that was lost may come later."""
    rows = defaultdict(list)
    for name, attempts in runs.items():
        sent = tries.get(attempts[0]["token"], {}) if attempts else {}
        if sent.get("strict") and not redriven[name]:
            rows[sent["agent"]].append((sent["seq"], name, attempts))
    for agent, row in rows.items():
        latest = None
        for _, name, attempts in sorted(row, key=lambda it: it[0]):
            first = min(attempts, key=lambda it: it["at"])
            if latest is not None and first["at"] < latest["at"]:
                report.found("overtaken", f"{agent}: {first['token']} began, then {latest['token']}")
            if deliveries.get(name, {}).get("state") == "completed":
                ended = max(attempts, key=lambda it: it["attempt"])
                latest = max(latest or ended, ended, key=lambda it: it["at"])


def _places(report, end: End, acknowledged: int, unknown: int):
    listed = Counter(end.dead_letters)
    for name, found in end.deliveries.items():
        is_dead = found["state"] == "dead" and found["steps"][-1]["level"] != "discarded"
        if listed[name] != is_dead:
            report.found("in two places", f"{name} is {found['state']}, and listed {listed[name]} times")
    if not end.terms:
        return
    total = end.terms["accepted"]
    if total != sum(end.terms[term] for term in TERMS):
        report.found("not conserved", f"{end.terms}")
    if not acknowledged <= total <= acknowledged + unknown:
        report.found("not conserved", f"{acknowledged} acknowledged, {unknown} unknown, {total} accepted")
