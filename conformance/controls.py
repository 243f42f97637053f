#!/usr/bin/env python3
"""Shows that the tests of durable messages find what they are there to find: each mistake that can be
planted in a host, and the test that has to fail then.

The host is that of a build with the feature `planted-bugs`, which is in no release; `PARLOUR_BUG` names
the mistake that it makes. Without a mistake each of the tests has to pass on that build; --passed says
that they have.

    scripts/torture controls [--passed] [NAME …]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from room import BINARY, ROOT

CRASH, DISK, DURABLE, EVENTS, PROMISES, SENDING = (
    f"conformance/test_{name}.py::test_"
    for name in ("crash", "disk", "durable", "events", "promises", "sending")
)
RUST = "rust::"
SHAKY = "nothing_that_was_acknowledged_is_lost_when_answers_are_and_hosts_know_nothing_of_each_other"

# The mistake, what is wrong then, and the test that finds it.
MISTAKES = {
    "acknowledged_before_written": (
        "an acknowledgement does not wait for the disk",
        CRASH + "a_host_that_is_killed_at_a_certain_call_loses_nothing",
    ),
    "no_fsync": (
        "what is written is not synced (`synchronous=OFF`)",
        CRASH + "what_was_acknowledged_survives_that_the_power_is_cut[ext4]",
    ),
    "acknowledged_ahead": (
        "what is acknowledged is noted before it is on the disk",
        DISK + "a_limit_on_the_length_of_files_is_a_full_disk_and_not_the_end",
    ),
    "acknowledged_unnoted": (
        "up to where the logs were acknowledged is not noted",
        CRASH + "a_log_that_is_cut_before_that_is_not_taken_for_whole",
    ),
    "fsync_tried_again": (
        "after a failed fsync the same is written again, and acknowledged",
        CRASH + "after_an_fsync_that_failed_once_nothing_more_is_acknowledged",
    ),
    "full_disk_unnoticed": (
        "what a full disk does not take is acknowledged",
        DISK + "a_disk_without_a_byte_left_has_nothing_told_that_it_does_not_keep",
    ),
    "reserve_kept": (
        "the reserve is not given back when the disk is full",
        DISK + "a_full_disk_refuses_what_is_new_and_what_was_accepted_goes_on",
    ),
    "damage_unnoticed": (
        "a commit whose checksum is wrong is believed",
        CRASH + "a_commit_that_is_damaged_is_noticed_and_nothing_is_made_of_it",
    ),
    "position_ignored": (
        "a second owner of a partition may write too",
        RUST + "of_two_commits_behind_the_same_one_the_second_is_refused",
    ),
    "attempts_in_memory": (
        "a restart counts attempts anew",
        PROMISES + "failures_are_counted_through_restarts_and_the_last_is_the_end",
    ),
    "losses_unlimited": (
        "attempts that were lost have no maximum",
        DURABLE + "a_killed_host_does_not_forget_how_often_it_tried",
    ),
    "late_reply_taken": (
        "the fencing token of a reply is not checked",
        RUST + "what_an_old_attempt_says_is_refused",
    ),
    "keys_in_memory": (
        "a restart forgets idempotency keys",
        PROMISES + "one_that_is_sent_a_hundred_times_at_once_before_and_after_a_restart_is_one",
    ),
    "body_not_compared": (
        "another body under a known key is answered as if it were the same",
        DURABLE + "the_same_key_is_accepted_once_however_often_it_is_sent",
    ),
    "order_swapped": (
        "of what waits for one agent the last begins first",
        PROMISES + "sixteen_workers_begin_what_two_hundred_keys_have_in_order_and_lose_nothing",
    ),
    "places_not_counted": (
        "a worker has as many attempts as there are",
        RUST + "a_worker_has_no_more_attempts_than_it_may_and_the_rest_follow",
    ),
    "strict_order_ignored": (
        "one that asks for strict order does not wait for the one before",
        RUST + "one_that_waits_lets_later_ones_pass_unless_they_ask_for_order",
    ),
    "schedules_in_memory": (
        "a restart forgets when a message is to be delivered",
        PROMISES + "what_is_to_come_later_comes_after_a_restart_and_not_sooner",
    ),
    "expiry_unnoticed": (
        "what has expired is delivered",
        PROMISES + "what_is_to_come_later_comes_after_a_restart_and_not_sooner",
    ),
    "redrive_in_memory": (
        "that a dead letter was sent back is not written",
        PROMISES + "dead_letters_that_are_sent_back_when_the_host_is_killed_are_in_one_place_each",
    ),
    "dead_letters_dropped": (
        "what failed for good is given up",
        DURABLE + "a_dead_letter_has_its_whole_story_and_what_was_to_be_delivered",
    ),
    "retention_takes_all": (
        "what is too old is let go, ended or not",
        PROMISES + "retention_takes_nothing_that_has_not_ended",
    ),
    "view_not_synced": (
        "the view is written to the disk in any order",
        CRASH + "the_view_of_what_has_ended_knows_all_of_it_after_a_power_cut",
    ),
    "view_not_made_again": (
        "a view of what has ended that was lost stays empty",
        DURABLE + "what_waited_and_what_has_ended_is_there_after_a_restart",
    ),
    "late_outcome_taken": (
        "whoever answers a call that is under way is believed, whichever attempt it names",
        SENDING + "a_reply_of_an_attempt_that_is_over_is_stale_and_changes_nothing",
    ),
    "stale_not_told": (
        "a worker whose reply came too late is not told",
        SENDING + "what_a_worker_answers_that_was_paused_past_its_lease_is_refused[paused]",
    ),
    "outbox_in_memory": (
        "a restart forgets to whom events are still owed",
        RUST + SHAKY,
    ),
    "handed_over_is_taken": (
        "an event that was handed to other partitions is taken for accepted there",
        RUST + SHAKY,
    ),
    "taken_in_memory": (
        "a restart forgets which events were accepted from other partitions",
        DURABLE + "nothing_that_was_acknowledged_is_lost_when_the_host_is_killed_at_any_time",
    ),
    "unsubscribed_in_memory": (
        "that a subscription was removed is not written",
        EVENTS + "a_subscription_that_was_removed_is_not_there_after_a_restart",
    ),
    "subscription_order_ignored": (
        "a subscription in strict order is not",
        EVENTS + "in_strict_order_an_agent_gets_one_at_a_time",
    ),
    "place_ignored": (
        "a stream that goes on begins now",
        EVENTS + "a_stream_goes_on_where_it_was_and_misses_nothing",
    ),
    "gap_passed_over": (
        "a stream goes on although what it missed is gone",
        EVENTS + "what_is_gone_from_the_log_is_not_passed_over",
    ),
}  # fmt: skip


def run(test: str, mistake="") -> tuple[str, float, str]:
    """Whether a test passes, fails or is skipped at a host that makes this mistake, how many seconds it
    took, and what it printed."""
    began = time.monotonic()
    env = {**os.environ, **({"PARLOUR_BUG": mistake} if mistake else {})}
    if test.startswith(RUST):
        only = f"test(/::{test.removeprefix(RUST)}$/)"
        command = ["cargo", "nextest", "run", "--workspace", "--all-features", "--locked", "-E", only]
    else:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", test]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    failed = 100 if test.startswith(RUST) else 1
    outcome = "failed" if done.returncode == failed else "broken"
    if done.returncode == 0:
        outcome = "skipped" if "SKIPPED" in done.stdout else "passed"
    return outcome, time.monotonic() - began, said


def main(names: list[str], passed: bool):
    unknown = set(names) - MISTAKES.keys()
    if unknown:
        sys.exit(f"no such mistake: {', '.join(sorted(unknown))}; there are {', '.join(MISTAKES)}")
    if b"PARLOUR_BUG" not in BINARY.read_bytes():
        sys.exit(f"{BINARY} makes no mistakes: build it with --features planted-bugs")
    mistakes = {name: MISTAKES[name] for name in names or MISTAKES}
    for test in dict.fromkeys(test for _, test in mistakes.values() if not passed):
        outcome, _, said = run(test)
        if outcome not in ("passed", "skipped"):
            print(said)
            sys.exit(f"controls: without a mistake {outcome}: {test}")
    print("| mistake | what is wrong then | found by | |\n| --- | --- | --- | --- |", flush=True)
    outcomes = Counter()
    # They wait more than they work.
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda name: run(mistakes[name][1], name), mistakes)
        for (name, (what, test)), (outcome, seconds, said) in zip(mistakes.items(), done, strict=True):
            outcomes[outcome] += 1
            found = f"in {seconds:.0f} s" if outcome == "failed" else outcome.upper()
            print(f"| `{name}` | {what} | `{test.rsplit('::', 1)[1]}` | {found} |", flush=True)
            if outcome in ("passed", "broken"):
                print(said, file=sys.stderr)
    summary = f"{outcomes['failed']} of {len(mistakes)} mistakes were found, {outcomes['skipped']} not looked for"
    if outcomes["passed"] or outcomes["broken"]:
        sys.exit(f"controls: FAILED: {summary}")
    print(f"controls: {summary}")


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "--passed"], "--passed" in sys.argv)
