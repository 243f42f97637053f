"""The checker of histories finds each thing that must not be, in a history with nothing else wrong."""

from __future__ import annotations

import pytest

from history import ANOMALIES, TERMS, End, Log, check, read


class Story:
    """Four messages for one agent: `a` and `b` completed, `c` dead, `d` expired. Then two events, `x` and
    `y`, for the subscriptions `one` and, in strict order, `two`."""

    def __init__(self):
        self.published, self.ran, self.deliveries = [], [], {}
        self.subscriptions = {"one": 0, "two": 0}
        for seq, token in enumerate("abcd"):
            self.sent(token, seq, expires_at=500 if token == "d" else None)
        for token in "ab":
            self.run(token)
            self.ends(token, "completed", reply=token, attempt=1)
        for attempt in (1, 2):
            self.run("c", attempt)
        self.ends("c", "dead", attempt=2, failed=2)
        self.ends("d", "expired", expires_at=510)
        for name in self.subscriptions:
            self.subscribes(name)
        for seq, token in enumerate("xy"):
            self.publishes(token, seq)
            for name in self.subscriptions:
                self.run(token, name=f"id-{token}-{name}", agent=f"{name}/k", at=100 + 100 * seq)
                self.ends(f"{token}-{name}", "completed", reply=token, attempt=1)
        self.dead_letters = ["id-c"]
        self.terms = dict.fromkeys(TERMS, 0)
        self.terms |= {"accepted": 8, "completed": 6, "dead": 1, "expired": 1}

    def sent(self, token, seq, name=None, **fields):
        self.published.append({"op": "try", "token": token, "agent": "t/k", "seq": seq, **fields})
        self.published.append({"op": "acked", "token": token, "id": name or f"id-{token}"})

    def subscribes(self, name):
        self.says("subscribe", name=name, topic="t", agent_type=name, strict=name == "two")

    def publishes(self, token, seq, recipients=2):
        self.says("try", token=token, topic="t", source="k", seq=seq)
        self.says("acked", token=token, event=f"event-{token}", recipients=recipients)

    def says(self, what, **fields):
        self.published.append({"op": what, **fields})

    def saw(self, token, state, generation, reply=None):
        self.says("saw", id=f"id-{token}", state=state, generation=generation, reply=reply)

    def run(self, token, attempt=1, *, name=None, worker="w", at=100, agent="t/k"):
        self.ran.append(
            {"op": "run", "id": name or f"id-{token}", "attempt": attempt, "agent": agent,
             "token": token, "worker": worker, "at": at}
        )  # fmt: skip

    def ends(self, token, state, **fields):
        steps = [
            {"level": "dispatched", "attempt": number + 1, "at": 90}
            for number in range(fields.get("attempt", 0))
        ]
        steps.append({"level": state, "attempt": fields.get("attempt", 0), "at": 600})
        self.deliveries[f"id-{token}"] = {
            "state": state, "generation": 5, "attempt": 0, "failed": 0, "lost": 0, "max_attempts": 2, "max_lost": 10,
            "expires_at": None, "reply": None, "steps": steps, **fields,
        }  # fmt: skip

    def check(self):
        return check(
            self.published, self.ran, End(self.deliveries, self.dead_letters, self.subscriptions, self.terms)
        )


STORIES = {}


def story(*kinds):
    """A change to the clean history after which these anomalies are there, and no others."""

    def add(change):
        STORIES[change.__name__] = (change, kinds)
        return change

    return add


@story()
def nothing_is_wrong(it):
    pass


@story()
def a_worker_that_died_has_the_message_run_again(it):
    it.run("a", 2, worker="other")
    it.deliveries["id-a"] |= {"attempt": 2, "lost": 1}


@story()
def what_was_never_answered_may_be_there_or_not(it):
    for token in "ef":
        it.says("try", token=token, agent="t/k", seq=9)
        it.says("unknown", token=token)
    it.run("e")
    it.ends("e", "completed", reply="e", attempt=1)
    it.terms |= {"accepted": 9, "completed": 7}


@story()
def one_that_was_sent_back_has_its_numbers_again(it):
    it.says("redrive", id="id-c")
    it.saw("c", "dead", 5)
    it.run("c", 1)
    it.ends("c", "completed", reply="c", attempt=1, generation=9)
    it.dead_letters.clear()
    it.terms |= {"completed": 7, "dead": 0}


@story()
def one_that_could_not_be_sent_lets_others_pass(it):
    it.run("a", 1, worker="later")
    it.ran.insert(0, it.ran.pop(1))
    it.ran.pop()
    it.deliveries["id-a"]["steps"].insert(0, {"level": "dispatched", "attempt": 1, "at": 80})


@story("lost")
def one_is_not_known(it):
    it.ran = [run for run in it.ran if run["token"] != "a"]
    del it.deliveries["id-a"]


@story("lost")
def one_waits_for_ever(it):
    it.ends("b", "waiting", attempt=1)


@story("lost")
def one_expires_that_was_to_be_kept(it):
    it.ends("b", "expired", attempt=1)


@story("lost")
def one_is_cancelled_that_nobody_gave_up(it):
    it.ends("b", "cancelled", attempt=1)


@story("lost")
def a_dead_letter_is_discarded_that_nobody_gave_up(it):
    it.deliveries["id-c"]["steps"].append({"level": "discarded", "attempt": 0, "at": 700})
    it.dead_letters.clear()
    it.terms |= {"dead": 0, "discarded": 1}


@story("invented")
def one_runs_that_nobody_sent(it):
    it.run("z")


@story("invented")
def one_runs_that_was_refused(it):
    it.says("try", token="r", agent="t/k", seq=9)
    it.says("refused", token="r", status=429)
    it.run("r")


@story("invented")
def one_runs_at_an_agent_that_it_is_not_for(it):
    it.ran[0]["agent"] = "t/other"


@story("invented")
def one_is_known_that_nobody_sent(it):
    it.ends("z", "completed")


@story("stored twice")
def one_runs_under_two_names(it):
    it.run("a", name="id-again", worker="other")


@story("answers differ", "stored twice")
def a_replay_is_answered_with_another_name(it):
    it.says("acked", token="a", id="id-b2")


@story("key taken")
def another_body_is_taken_under_the_same_key(it):
    it.says("other", token="a", status=202)


@story()
def another_body_is_refused_under_the_same_key(it):
    it.says("other", token="a", status=409)


@story("wrong reply")
def replies_are_swapped(it):
    it.deliveries["id-a"]["reply"] = "b"


@story("wrong reply")
def one_is_completed_that_no_agent_had(it):
    it.ran = [run for run in it.ran if run["token"] != "a"]


@story("changed after its end")
def a_reply_is_another_than_it_was(it):
    it.saw("a", "completed", 5, reply="first")


@story("changed after its end")
def what_had_ended_is_retried(it):
    it.saw("a", "completed", 4, reply="a")


@story("went back")
def a_reader_is_told_of_what_the_host_forgets(it):
    it.saw("b", "received", 7)


@story("went back")
def two_states_have_one_number(it):
    it.saw("b", "dispatched", 5)


@story("attempts went back")
def attempts_are_counted_anew(it):
    it.run("a", 1, worker="other")


@story("attempts went back")
def an_attempt_has_a_lower_number_than_the_one_before(it):
    it.run("c", 3)
    it.run("c", 0)
    it.deliveries["id-c"]["attempt"] = 3


@story("attempts went back")
def an_attempt_is_not_counted(it):
    it.run("a", 2, worker="other")


@story("too many attempts")
def it_is_tried_without_an_end(it):
    it.run("c", 12)
    it.deliveries["id-c"]["attempt"] = 12


@story("too many attempts")
def it_fails_more_often_than_it_may(it):
    it.deliveries["id-c"]["failed"] = 3


@story("dead too early")
def it_is_dead_though_attempts_are_left(it):
    it.deliveries["id-c"]["failed"] = 1


@story("too early")
def one_runs_before_its_time(it):
    it.published[0]["not_before"] = 1000


@story("too late")
def one_begins_after_it_expired(it):
    it.published[0]["expires_at"] = 80
    it.deliveries["id-a"]["expires_at"] = 80


@story("too late")
def it_is_forgotten_that_one_expires(it):
    it.published[0]["expires_at"] = 80


@story("too late")
def one_expires_too_soon(it):
    it.deliveries["id-d"]["steps"][-1]["at"] = 300


@story("out of order")
def two_are_swapped(it):
    it.ran[0], it.ran[1] = it.ran[1], it.ran[0]


@story("overtaken")
def one_passes_another_though_the_order_is_strict(it):
    for entry in it.published:
        entry["strict"] = True
    it.run("a", 2, worker="other", at=300)
    it.deliveries["id-a"] |= {"attempt": 2, "lost": 1}


@story("lost")
def a_reader_is_told_that_there_is_no_such_delivery(it):
    it.saw("a", None, 0)


@story()
def a_dead_letter_is_given_up(it):
    it.says("discard", id="id-c")
    it.deliveries["id-c"]["steps"].append({"level": "discarded", "attempt": 0, "at": 700})
    it.dead_letters.clear()
    it.terms |= {"dead": 0, "discarded": 1}


@story("in two places")
def a_dead_letter_is_not_listed(it):
    it.dead_letters.clear()


@story("in two places")
def a_dead_letter_is_listed_twice(it):
    it.dead_letters.append("id-c")


@story("in two places")
def one_is_listed_that_is_not_dead(it):
    it.dead_letters.append("id-a")


@story("not conserved")
def the_terms_do_not_add_up(it):
    it.terms["completed"] = 1


@story("not conserved")
def fewer_are_counted_than_were_acknowledged(it):
    it.terms |= {"accepted": 7, "completed": 5}


# Events


@story()
def an_event_that_was_never_answered_may_be_there_or_not(it):
    for token in "ef":
        it.says("try", token=token, topic="t", source="k", seq=9)
        it.says("unknown", token=token)
    for name in ("one", "two"):
        it.run("e", name=f"id-e-{name}", agent=f"{name}/k", at=900)
        it.ends(f"e-{name}", "completed", reply="e", attempt=1)
    it.terms |= {"accepted": 10, "completed": 8}


@story()
def a_subscription_is_owed_what_comes_while_it_is_there(it):
    it.subscribes("three")
    it.publishes("v", 7, recipients=3)
    it.says("unsubscribe", name="three")
    it.publishes("w", 8)
    for token, names in {"v": ("one", "two", "three"), "w": ("one", "two")}.items():
        for name in names:
            it.run(token, name=f"id-{token}-{name}", agent=f"{name}/k", at=700 if token == "v" else 800)
            it.ends(f"{token}-{name}", "completed", reply=token, attempt=1)
    it.terms |= {"accepted": 13, "completed": 11}


@story()
def an_event_is_sent_again_under_its_key(it):
    it.says("acked", token="x", event="event-x", recipients=2)
    it.says("other", token="x", status=409)


@story()
def a_worker_has_an_attempt_at_an_event_that_was_lost_when_another_has_ended_it(it):
    it.run("x", 2, name="id-x-two", agent="two/k", worker="other", at=110)
    it.run("x", 1, name="id-x-two", agent="two/k", worker="third", at=900)
    it.ran = [run for run in it.ran if run["at"] != 100 or run["id"] != "id-x-two"]
    it.deliveries["id-x-two"] |= {"attempt": 2, "lost": 1}


@story("lost")
def one_of_two_subscriptions_never_has_an_event(it):
    it.ran = [run for run in it.ran if run["id"] != "id-x-one"]
    del it.deliveries["id-x-one"]


@story("lost")
def an_event_is_kept_and_never_completed(it):
    it.ends("x-one", "waiting", attempt=1)


@story("lost", "not conserved")
def an_event_is_forgotten_by_the_terms_too(it):
    it.ran = [run for run in it.ran if run["id"] != "id-x-one"]
    del it.deliveries["id-x-one"]
    it.terms |= {"accepted": 7, "completed": 5}


@story("stored twice")
def one_subscription_has_an_event_twice(it):
    it.run("x", name="id-again", agent="one/k", worker="other")


@story("invented")
def an_event_runs_at_an_agent_that_did_not_subscribe(it):
    it.run("x", name="id-x-other", agent="other/k")


@story("invented")
def an_event_runs_that_was_refused(it):
    it.says("try", token="r", topic="t", source="k", seq=9)
    it.says("refused", token="r", status=429)
    it.run("r", agent="one/k", at=900)


@story("owed to others")
def an_event_is_said_to_be_owed_to_fewer(it):
    it.published[-1]["recipients"] = 1


@story("answers differ")
def an_event_that_is_sent_again_is_another(it):
    it.says("acked", token="x", event="event-z", recipients=2)


@story("key taken")
def another_event_is_taken_under_the_same_key(it):
    it.says("other", token="x", status=202)


@story("wrong reply")
def events_are_swapped(it):
    it.deliveries["id-x-one"]["reply"] = "y"


@story("overtaken")
def an_event_passes_another_though_the_order_is_strict(it):
    it.run("x", 2, name="id-x-two", agent="two/k", worker="other", at=300)
    it.deliveries["id-x-two"] |= {"attempt": 2, "failed": 1}


@story()
def an_event_passes_another_where_the_order_is_not_strict(it):
    it.run("x", 2, name="id-x-one", agent="one/k", worker="other", at=300)
    it.deliveries["id-x-one"] |= {"attempt": 2, "failed": 1}


@story("subscription lost")
def a_subscription_is_not_there_any_more(it):
    del it.subscriptions["one"]


@story("subscription lost")
def a_subscription_is_there_though_it_was_removed(it):
    it.says("unsubscribe", name="two")


@story("subscription lost")
def a_subscription_is_behind_in_the_end(it):
    it.subscriptions["one"] = 1


@pytest.mark.parametrize("name", STORIES)
def test_what_is_wrong_is_found_and_nothing_else(name):
    change, kinds = STORIES[name]
    it = Story()
    change(it)
    report = it.check()
    assert {what for what, stories in report.anomalies.items() if stories} == set(kinds), report
    assert report.is_clean() == (not kinds)
    assert all(f"\n{what} (" in str(report) for what in kinds)


def test_there_is_a_story_of_each_anomaly():
    assert {kind for _, kinds in STORIES.values() for kind in kinds} == set(ANOMALIES)


def test_what_is_written_down_is_read_whoever_dies(tmp_path):
    log = Log(tmp_path / "log")
    log.write("try", token="ü", seq=1)
    assert read(log.path) == [{"op": "try", "token": "ü", "seq": 1}]
    log.close()


def test_the_report_counts():
    report = Story().check()
    assert (report.acknowledged, report.events, report.runs, report.duplicates) == (8, 4, 8, 1)
    assert str(report).startswith("8 acknowledged, 4 events among them, 0 lost, 0 invented; ")
