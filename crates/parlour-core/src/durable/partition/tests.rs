use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::durable::{FORMAT, MAX_STEPS, MessageKind, previous_of, record_at, settled_in};
use crate::{Header, Key, Payload, Principal, TopicId, TopicType};

const MEMORY: usize = 1000;

fn message(text: &str) -> Message {
    let id = MessageId::parse("m1").unwrap();
    let header = Header {
        conversation: id.clone(),
        id,
        cause: None,
        principal: Principal::ANONYMOUS,
        sender: None,
        traceparent: None,
        hops: 0,
        idempotency_key: None,
    };
    Message { kind: MessageKind::Call, header, payload: Payload::text(text) }
}

fn accept(agent: &str) -> Accept {
    let agent = AgentId::parse(agent).unwrap();
    Accept { max_attempts: 2, max_lost: 3, ..Accept::new(agent, message("work")) }
}

/// A partition with its log, as its owner has it.
struct Owner {
    partition: Partition,
    log: BTreeMap<Position, Bytes>,
    now: Timestamp,
    policy: RetryPolicy,
    /// Attempts under way, as their workers know them.
    attempts: Vec<(DeliveryId, u64)>,
    settled: BTreeMap<u64, State>,
    /// The number and token of what began, since the last crash.
    started: Vec<(u64, u64)>,
    /// What was handed over and not taken, since the last crash; and all that was ever taken.
    handed: Vec<(u64, u32)>,
    taken: BTreeSet<(u64, u32)>,
    /// To how many each event was owed.
    owed: BTreeMap<u64, usize>,
}

impl Owner {
    fn new() -> Self {
        Self {
            partition: Partition::new(PartitionId(3), 1, MEMORY),
            log: BTreeMap::new(),
            now: Timestamp(1000),
            policy: RetryPolicy::default(),
            attempts: Vec::new(),
            settled: BTreeMap::new(),
            started: Vec::new(),
            handed: Vec::new(),
            taken: BTreeSet::new(),
            owed: BTreeMap::new(),
        }
    }

    fn publish(&mut self, agents: &[&str]) -> Published {
        let owed = |agent: &&str| Owed {
            agent: AgentId::parse(agent).unwrap(),
            subscription: Some("news".into()),
        };
        let topic = TopicId::new(TopicType::parse("t").unwrap(), Key::parse("s").unwrap());
        let message = Message { kind: MessageKind::Event(topic), ..message("news") };
        let owed = agents.iter().map(owed).collect();
        let published = self.partition.publish(Publish { message, owed, key: None }, self.now);
        self.owed.insert(self.partition.totals().published, agents.len());
        published.unwrap()
    }

    /// Hands on what is owed, once that is on the disk.
    fn hand_over(&mut self) {
        self.commit();
        while let Some(Handover { number, message, owed }) = self.partition.poll_owed() {
            match message {
                Ok(message) => assert_eq!(message.payload, Payload::text("news")),
                Err(place) => {
                    let record = record_at(&self.log[&place.position], place.offset).unwrap();
                    let (Record::Published { message, .. } | Record::OwedCarried { message, .. }) =
                        record
                    else {
                        panic!("{record:?}")
                    };
                    assert_eq!(message.payload, Payload::text("news"));
                }
            }
            self.handed.extend(owed.iter().map(|(index, _)| (number, *index)));
        }
    }

    fn accept(&mut self, accept: Accept) -> DeliveryId {
        self.partition.accept(accept, self.now).unwrap().id
    }

    fn start(&mut self) -> Option<Start> {
        let mut gate = |_: &AgentId| Gate::Open(WorkerId(1), "w".into());
        let start = self.partition.poll_start(self.now, &mut gate)?;
        self.attempts.push((start.id, start.token));
        self.started.push((start.id.number, start.token));
        Some(start)
    }

    fn end(&mut self, id: DeliveryId, token: u64, reply: Reply) -> Result<(), Stale> {
        self.partition.end(id, token, reply, &self.policy, self.now, 0.5)
    }

    fn wait(&mut self, wait: Duration) {
        self.commit();
        self.now = self.now.after(wait);
        self.partition.handle_timeout(self.now);
    }

    fn commit(&mut self) {
        let Some(commit) = self.partition.take_commit() else { return };
        for settled in &commit.settled {
            let Delivery { id, state, .. } = settled.delivery;
            let earlier = self.settled.insert(id.number, state);
            assert_eq!(earlier, None, "{id} ended twice");
            assert_eq!(Settled::read(&commit.bytes, settled.offset).as_ref(), Ok(settled));
        }
        let places = commit.settled.iter().map(|it| (it.delivery.id.number, it.offset));
        assert_eq!(settled_in(&commit.bytes), Ok(places.collect()));
        assert_eq!(previous_of(&commit.bytes), Ok(commit.previous));
        // Positions rise, with gaps between them.
        let position = Position(commit.previous.0 + 1 + commit.bytes.len() as u64 % 3);
        self.partition.appended(position);
        self.log.insert(position, commit.bytes);
        self.log.retain(|position, _| *position > self.partition.needless());
    }

    /// What the log says, to a host that has just started.
    fn replayed(&self) -> Partition {
        let mut partition = Partition::new(PartitionId(3), 1, MEMORY);
        let Some(last) = self.log.values().last() else { return partition };
        let base = Partition::base(last).unwrap();
        partition.begin(base);
        for (position, commit) in self.log.range(base.next()..) {
            let read = Bytes::copy_from_slice(commit);
            partition.replay(*position, &read).unwrap();
            assert!(read.is_unique(), "a commit stays in memory for as long as what it says");
        }
        partition
    }

    /// The host is killed: what was not committed never was.
    fn crash(&mut self) {
        self.partition = self.replayed();
        self.attempts.clear();
        self.started.clear();
        let policy = self.policy.clone();
        self.partition.recover(2, |_| policy.clone(), self.now, 0.5);
        self.handed.clear();
    }
}

/// All that two partitions must agree on.
fn view(partition: &Partition) -> impl PartialEq + std::fmt::Debug {
    let mut deliveries: Vec<_> = partition.iter().cloned().collect();
    deliveries.sort_by_key(|it| it.id.number);
    let position = |commit| partition.log.position(commit);
    let keys = partition.keys.iter().map(|(key, (entry, at))| (*key, entry.clone(), position(*at)));
    let keys: BTreeMap<_, _> = keys.map(|(key, entry, at)| (key, (entry, at))).collect();
    let sources = partition.sources.values().map(|(source, at)| (*source, position(*at)));
    let sources: Vec<_> = sources.collect();
    let commits: Vec<_> = partition.log.iter().collect();
    let scalars = &partition.scalars;
    (
        deliveries,
        keys,
        (sources, partition.subscriptions.clone()),
        partition.outbox.iter().map(|(number, _)| *number).collect::<Vec<_>>(),
        (scalars.totals, partition.standing, scalars.previous),
        partition.timers.clone(),
        commits,
        (partition.log.bytes(), partition.live_bytes),
    )
}

fn check(owner: &Owner) {
    let partition = &owner.partition;
    let (totals, standing) = (partition.totals(), partition.standing());
    let Totals { accepted, completed, cancelled, expired, discarded, .. } = totals;
    let Standing { waiting, in_flight, dead, owed } = standing;
    assert_eq!(
        accepted,
        completed + cancelled + expired + discarded + dead + waiting + in_flight,
        "{totals:?} {standing:?}"
    );
    let mut counted = Standing::default();
    for delivery in partition.iter() {
        *counted.of(delivery.state) += 1;
        assert!(delivery.failed <= delivery.max_attempts, "{delivery:?}");
        assert!(delivery.lost <= delivery.max_lost, "{delivery:?}");
        assert!(delivery.attempt <= delivery.failed + delivery.lost + 1, "{delivery:?}");
        let generations = delivery.steps.iter().map(|step| step.generation);
        let last = delivery.generation;
        let first = last + 1 - delivery.steps.len() as u64;
        assert!(generations.eq(first..=last), "{delivery:?}");
        assert!(delivery.steps.len() <= MAX_STEPS);
    }
    let mut tallies = BTreeMap::<_, Tally>::new();
    for live in partition.deliveries.values() {
        let tally = tallies.entry(live.delivery.agent.agent_type.clone()).or_default();
        *tally.standing.of(live.delivery.state) += 1;
        if live.delivery.state == State::Dead {
            tally.dead_bytes += u64::from(live.spot.weight);
        }
    }
    let kept = partition.tallies.iter().filter(|(_, tally)| **tally != Tally::default());
    assert_eq!(tallies, kept.map(|(name, tally)| (name.clone(), *tally)).collect());
    let left: usize = partition.outbox.iter().map(|(_, owing)| owing.left.len()).sum();
    assert_eq!(owed, left as u64);
    assert_eq!(Standing { owed, ..counted }, standing);
}

#[test]
fn a_delivery_lives_from_its_acceptance_to_its_end() {
    let mut owner = Owner::new();
    let id = owner.accept(accept("a/1"));
    let start = owner.start().unwrap();
    assert_eq!((start.id, start.attempt), (id, 1));
    let message = owner.partition.message(id).unwrap().unwrap();
    assert_eq!(message.payload, Payload::text("work"));
    owner.partition.received(id, start.token, owner.now).unwrap();
    owner.partition.processing(id, start.token, "half".into(), owner.now).unwrap();
    owner.end(id, start.token, Ok(Payload::text("done"))).unwrap();
    let commit = owner.partition.take_commit().unwrap();
    let [settled] = &commit.settled[..] else { panic!("{commit:?}") };
    let levels: Vec<_> = settled.delivery.steps.iter().map(|step| step.level.name()).collect();
    assert_eq!(levels, ["dispatched", "received", "processing", "completed"]);
    assert_eq!(settled.reply, Some(Payload::text("done")));
    assert_eq!(settled.delivery.generation, 5);
    assert_eq!(owner.partition.get(id), None);
    assert_eq!(owner.end(id, start.token, Ok(Payload::default())), Err(Stale));
}

#[test]
fn what_an_old_attempt_says_is_refused() {
    let mut owner = Owner::new();
    let id = owner.accept(accept("a/1"));
    let first = owner.start().unwrap().token;
    let lost = Fault::new(FaultKind::WorkerLost, "gone");
    owner.end(id, first, Err(lost)).unwrap();
    owner.wait(Duration::from_secs(1));
    let second = owner.start().unwrap();
    assert_eq!(second.attempt, 2);
    assert_eq!(owner.end(id, first, Ok(Payload::default())), Err(Stale));
    assert_eq!(owner.partition.received(id, first, owner.now), Err(Stale));
    owner.end(id, second.token, Ok(Payload::default())).unwrap();
}

#[test]
fn failures_and_losses_have_each_a_number_of_their_own() {
    for (kind, attempts) in [(FaultKind::AgentFailed, 2), (FaultKind::WorkerLost, 3)] {
        let mut owner = Owner::new();
        let id = owner.accept(accept("a/1"));
        for attempt in 1..=attempts {
            let start = owner.start().unwrap();
            assert_eq!(start.attempt, attempt);
            owner.end(id, start.token, Err(Fault::new(kind, "no"))).unwrap();
            owner.wait(Duration::from_secs(60));
        }
        assert!(owner.start().is_none());
        assert_eq!(owner.partition.get(id).unwrap().state, State::Dead);
    }
}

#[test]
fn an_attempt_that_reached_nobody_does_not_count() {
    let mut owner = Owner::new();
    let id = owner.accept(accept("a/1"));
    for _ in 0..100 {
        let start = owner.start().unwrap();
        assert_eq!(start.attempt, 1);
        let fault = Fault::new(FaultKind::Overloaded, "full").may_have_run_if(false);
        owner.end(id, start.token, Err(fault)).unwrap();
        owner.wait(Duration::from_secs(60));
    }
    let waits = owner.partition.get(id).unwrap();
    assert_eq!((waits.state, waits.failed, waits.lost, waits.unsent), (State::Waiting, 0, 0, 100));
}

#[test]
fn an_invalid_message_is_not_tried_twice() {
    let mut owner = Owner::new();
    let id = owner.accept(accept("a/1"));
    let start = owner.start().unwrap();
    owner.end(id, start.token, Err(Fault::new(FaultKind::Invalid, "no"))).unwrap();
    assert_eq!(owner.partition.get(id).unwrap().state, State::Dead);
    owner.partition.redrive(id, owner.now).unwrap();
    assert_eq!(owner.start().unwrap().attempt, 1);
}

#[test]
fn one_that_waits_lets_later_ones_pass_unless_they_ask_for_order() {
    for strict in [false, true] {
        let mut owner = Owner::new();
        let ids = [1, 2, 3].map(|_| owner.accept(Accept { strict, ..accept("a/1") }));
        let first = owner.start().unwrap();
        assert_eq!(first.id, ids[0]);
        let failed = Fault::new(FaultKind::AgentFailed, "no");
        owner.end(first.id, first.token, Err(failed)).unwrap();
        assert_eq!(owner.start().map(|start| start.id), (!strict).then_some(ids[1]));
        owner.wait(Duration::from_secs(60));
        let again = owner.start().unwrap();
        assert_eq!(again.id, ids[0]);
        owner.end(again.id, again.token, Ok(Payload::default())).unwrap();
        assert_eq!(owner.start().map(|start| start.id), Some(ids[if strict { 1 } else { 2 }]));
        assert!(owner.start().is_none());
    }
}

#[test]
fn one_that_comes_back_from_the_dead_keeps_to_strict_order() {
    let strict = || Accept { strict: true, max_attempts: 1, ..accept("a/1") };
    for is_in_flight in [false, true] {
        let mut owner = Owner::new();
        let [dead, other] = [owner.accept(strict()), owner.accept(strict())];
        let start = owner.start().unwrap();
        owner.end(dead, start.token, Err(Fault::new(FaultKind::AgentFailed, "no"))).unwrap();
        // The next one may begin, and has or has not.
        let begun = is_in_flight.then(|| owner.start().unwrap());
        owner.partition.redrive(dead, owner.now).unwrap();
        owner.commit();
        owner.partition = owner.replayed();
        if let Some(begun) = begun {
            assert!(owner.start().is_none(), "two at once");
            owner.end(other, begun.token, Ok(Payload::default())).unwrap();
        }
        let again = owner.start().unwrap();
        assert_eq!(again.id, dead);
        assert!(owner.start().is_none(), "two at once");
        owner.end(dead, again.token, Ok(Payload::default())).unwrap();
        assert_eq!(owner.start().map(|start| start.id), (!is_in_flight).then_some(other));
    }
}

#[test]
fn a_commit_ends_where_it_is_long_and_the_rest_goes_into_the_next() {
    let mut owner = Owner::new();
    let expires_at = Some(owner.now.after(Duration::from_secs(1)));
    let mut commits = 0;
    for _ in 0..20 {
        let mut large = accept("a/1");
        large.message.payload = Payload::text("x".repeat(1 << 20));
        owner.partition.accept(Accept { expires_at, ..large }, owner.now).unwrap();
        if owner.partition.is_full() {
            owner.commit();
            commits += 1;
        }
    }
    assert_eq!(commits, 5);
    // Those that have to be carried, or whose time is over, are as many as they are.
    assert!(owner.log.values().all(|commit| commit.len() < 6 << 20));
    owner.wait(Duration::from_secs(1));
    owner.commit();
    assert_eq!(owner.partition.totals().expired, 20);
}

#[test]
fn the_same_key_is_accepted_once_and_free_again_after_its_window() {
    let mut owner = Owner::new();
    let key = |body| Some((7, body, Duration::from_secs(10)));
    let keyed = |body| Accept { key: key(body), ..accept("a/1") };
    let first = owner.partition.accept(keyed(1), owner.now).unwrap();
    let again = owner.partition.accept(keyed(1), owner.now).unwrap();
    assert_eq!(again, Accepted { is_new: false, ..first.clone() });
    let other = owner.partition.accept(keyed(2), owner.now).unwrap_err();
    assert_eq!(other.kind(), FaultKind::Conflict);
    owner.commit();
    owner.crash();
    assert_eq!(owner.partition.accept(keyed(1), owner.now).unwrap().id, first.id);
    owner.wait(Duration::from_secs(10));
    assert!(owner.partition.accept(keyed(2), owner.now).unwrap().is_new);
}

#[test]
fn what_is_to_come_later_begins_then_and_what_is_too_late_does_not() {
    let mut owner = Owner::new();
    let begin = owner.now;
    let at = |seconds| Some(begin.after(Duration::from_secs(seconds)));
    let later = Accept { not_before: at(5), ..accept("a/1") };
    let short = Accept { expires_at: at(3), not_before: at(4), ..accept("a/2") };
    let (later, short) = (owner.accept(later), owner.accept(short));
    assert!(owner.start().is_none());
    assert_eq!(owner.partition.poll_timeout(), at(3));
    for (seconds, begins) in [(3, None), (4, None), (5, Some(later))] {
        owner.wait(begin.after(Duration::from_secs(seconds)).since(owner.now));
        assert_eq!(owner.start().map(|start| start.id), begins);
    }
    owner.commit();
    assert_eq!(owner.settled, BTreeMap::from([(short.number, State::Expired)]));
}

#[test]
fn what_is_too_late_when_it_is_accepted_expires_at_once() {
    let mut owner = Owner::new();
    let late = owner.accept(Accept { expires_at: Some(owner.now), ..accept("a/1") });
    assert!(owner.start().is_none());
    owner.commit();
    assert_eq!(owner.settled, BTreeMap::from([(late.number, State::Expired)]));
}

#[test]
fn a_busy_worker_holds_up_its_own_agents_only() {
    let mut owner = Owner::new();
    for agent in ["a/slow1", "a/slow2", "a/fast", "b/1"] {
        owner.accept(accept(agent));
    }
    let busy = WorkerId(7);
    let mut slow = |agent: &AgentId| match (agent.agent_type.as_str(), agent.key.as_str()) {
        ("a", "fast") => Gate::Open(WorkerId(1), "fast".into()),
        ("a", _) => Gate::Busy(busy),
        _ => Gate::Closed,
    };
    let start = owner.partition.poll_start(owner.now, &mut slow).unwrap();
    assert_eq!(start.agent.key.as_str(), "fast");
    assert!(owner.partition.poll_start(owner.now, &mut slow).is_none());
    let mut open = |_: &AgentId| Gate::Open(busy, "slow".into());
    assert!(owner.partition.poll_start(owner.now, &mut open).is_none());
    owner.partition.wake_worker(busy);
    let start = owner.partition.poll_start(owner.now, &mut open).unwrap();
    assert_eq!(start.agent.key.as_str(), "slow1");
    assert!(owner.partition.poll_start(owner.now, &mut open).is_none());
    owner.partition.wake_all();
    let mut rest = BTreeSet::new();
    while let Some(start) = owner.partition.poll_start(owner.now, &mut open) {
        rest.insert(start.agent.to_string());
    }
    assert_eq!(rest, BTreeSet::from(["a/slow2".into(), "b/1".into()]));
}

#[test]
fn room_at_a_worker_that_its_agent_has_left_goes_to_another() {
    let mut owner = Owner::new();
    let worker = WorkerId(7);
    for agent in ["a/1", "a/2"] {
        owner.accept(accept(agent));
    }
    let mut busy = |_: &AgentId| Gate::Busy(worker);
    assert!(owner.partition.poll_start(owner.now, &mut busy).is_none());
    owner.partition.wake_worker(worker);
    let mut moved = |agent: &AgentId| match agent.key.as_str() {
        "1" => Gate::Open(WorkerId(8), "other".into()),
        _ => Gate::Open(worker, "same".into()),
    };
    assert_eq!(owner.partition.poll_start(owner.now, &mut moved).unwrap().worker, WorkerId(8));
    assert_eq!(owner.partition.poll_start(owner.now, &mut moved).unwrap().worker, worker);
}

#[test]
fn a_commit_of_a_later_format_or_out_of_place_is_refused() {
    let mut owner = Owner::new();
    owner.accept(accept("a/1"));
    owner.commit();
    owner.accept(accept("a/2"));
    owner.commit();
    let commits: Vec<_> = owner.log.values().cloned().collect();
    let mut newer = commits[0].to_vec();
    newer[0] = FORMAT + 1;
    let mut partition = Partition::new(PartitionId(3), 1, MEMORY);
    let refused = partition.replay(Position(1), &newer.into());
    assert_eq!(refused, Err(Corrupt::Newer(FORMAT + 1)));
    assert!(matches!(partition.replay(Position(1), &commits[1]), Err(Corrupt::Contradiction(_))));
    let first = previous_of(&commits[1]).unwrap();
    partition.replay(first, &commits[0]).unwrap();
    let again = partition.replay(first, &commits[0]);
    assert!(matches!(again, Err(Corrupt::Contradiction(_))));
    partition.replay(first.next(), &commits[1]).unwrap();
}

#[test]
fn every_cut_of_a_commit_is_refused() {
    let mut owner = Owner::new();
    let id = owner.accept(Accept { key: Some((1, 2, Duration::from_secs(1))), ..accept("a/1") });
    let start = owner.start().unwrap();
    let fault = Fault::new(FaultKind::AgentFailed, "no").hint("hint").limit("key", Some(3));
    owner.end(id, start.token, Err(fault)).unwrap();
    owner.commit();
    let commit = owner.log.values().next().unwrap().clone();
    for end in 0..commit.len() {
        let mut partition = Partition::new(PartitionId(3), 1, MEMORY);
        let refused = partition.replay(Position(1), &commit.slice(..end));
        // Between two records nothing is missing that the bytes could tell of: the checksum does.
        assert!(
            refused.is_err()
                || partition.totals() != owner.partition.totals()
                || partition.iter().next().map(|it| it.generation) < Some(3),
            "{end}"
        );
    }
}

#[test]
fn an_event_is_owed_until_every_partition_has_it() {
    let mut owner = Owner::new();
    let published = owner.publish(&["a/1", "b/1"]);
    assert_eq!((published.recipients, published.is_new), (2, true));
    owner.hand_over();
    assert_eq!(owner.handed, [(1, 0), (1, 1)]);
    owner.partition.taken(1, 1, owner.now);
    owner.commit();
    owner.crash();
    assert_eq!(owner.partition.standing().owed, 2);
    owner.hand_over();
    assert_eq!(owner.handed, [(1, 0), (1, 1)]);
    owner.partition.taken(1, 0, owner.now);
    owner.partition.taken(1, 1, owner.now);
    owner.wait(Duration::from_secs(1));
    owner.commit();
    owner.crash();
    owner.hand_over();
    assert_eq!((owner.handed.len(), owner.partition.standing().owed), (0, 0));
}

#[test]
fn what_a_topics_log_owed_is_accepted_once() {
    let mut owner = Owner::new();
    let source = |number, index| Source { partition: PartitionId(9), number, index };
    let owed = |number, index| Accept {
        source: Some(source(number, index)),
        subscription: Some("news".into()),
        ..accept("a/1")
    };
    let first = owner.accept(owed(1, 0));
    owner.accept(owed(1, 2));
    owner.commit();
    owner.crash();
    for (number, index, taken) in [(1, 0, true), (1, 1, true), (1, 2, true), (2, 0, false)] {
        assert_eq!(owner.partition.has_taken(source(number, index)), taken, "{number} {index}");
    }
    let news = || ("news".into(), owner.now);
    let lag: Vec<_> = owner.partition.subscriptions().collect();
    assert_eq!(lag, [(&news().0, 2, news().1)]);
    owner.partition.cancel(first, "enough".into(), owner.now).unwrap();
    assert_eq!(owner.partition.subscriptions().map(|it| it.1).collect::<Vec<_>>(), [1]);
}

#[test]
fn the_same_key_publishes_once() {
    let mut owner = Owner::new();
    let publish = |body| Publish {
        message: message("news"),
        owed: Vec::new(),
        key: Some((7, body, Duration::from_secs(10))),
    };
    let first = owner.partition.publish(publish(1), owner.now).unwrap();
    owner.commit();
    owner.crash();
    let again = owner.partition.publish(publish(1), owner.now).unwrap();
    assert_eq!(again, Published { is_new: false, ..first });
    let other = owner.partition.publish(publish(2), owner.now).unwrap_err();
    assert_eq!(other.kind(), FaultKind::Conflict);
    assert_eq!(owner.partition.totals().published, 1);
}

/// What may happen to a partition, in any order.
#[derive(Clone, Copy, Debug)]
enum Op {
    Accept { agent: u8, key: Option<u8>, body: u8, strict: bool, delay: u8, ttl: u8 },
    Start { open: bool },
    Received(usize),
    Processing(usize),
    End(usize, u8),
    Cancel(u8),
    Redrive(u8),
    Discard(u8),
    Publish(u8),
    HandOver,
    Taken(usize),
    Wait(u16),
    Commit,
    Carry,
    Crash,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..3_u8, proptest::option::of(0..3_u8), 0..2_u8, any::<bool>(), 0..3_u8, 0..4_u8)
            .prop_map(|(agent, key, body, strict, delay, ttl)| {
                Op::Accept { agent, key, body, strict, delay, ttl }
            }),
        6 => any::<bool>().prop_map(|open| Op::Start { open }),
        2 => (0..8_usize).prop_map(Op::Received),
        2 => (0..8_usize).prop_map(Op::Processing),
        6 => (0..8_usize, 0..6_u8).prop_map(|(n, how)| Op::End(n, how)),
        1 => (0..12_u8).prop_map(Op::Cancel),
        1 => (0..12_u8).prop_map(Op::Redrive),
        1 => (0..12_u8).prop_map(Op::Discard),
        1 => (0..3_u8).prop_map(Op::Publish),
        1 => Just(Op::HandOver),
        2 => (0..4_usize).prop_map(Op::Taken),
        2 => (0..2000_u16).prop_map(Op::Wait),
        3 => Just(Op::Commit),
        1 => Just(Op::Carry),
        1 => Just(Op::Crash),
    ]
}

fn run(owner: &mut Owner, op: Op) {
    let id = |owner: &Owner, n: u8| {
        let known = owner.partition.iter().find(|it| it.id.number == u64::from(n));
        known.map(|it| it.id)
    };
    match op {
        Op::Accept { agent, key, body, strict, delay, ttl } => {
            let at = |seconds: u8| {
                let wait = Duration::from_millis(u64::from(seconds) * 300);
                (seconds > 0).then(|| owner.now.after(wait))
            };
            let key = key.map(|key| (key.into(), body.into(), Duration::from_secs(2)));
            let (not_before, expires_at) = (at(delay), at(ttl));
            let accept =
                Accept { strict, key, not_before, expires_at, ..accept(&format!("a/{agent}")) };
            // The only refusal is that of a key with another body.
            if let Err(fault) = owner.partition.accept(accept, owner.now) {
                assert_eq!(fault.kind(), FaultKind::Conflict);
            }
        }
        Op::Start { open: false } => {
            let none = owner.partition.poll_start(owner.now, &mut |_| Gate::Closed);
            assert!(none.is_none());
            owner.partition.wake_all();
        }
        Op::Start { open: true } => {
            let due: Vec<_> = owner.partition.iter().filter(|it| it.is_due(owner.now)).collect();
            let due: Vec<_> = due.into_iter().cloned().collect();
            let strict: Vec<_> = owner.partition.iter().filter(|it| it.strict).cloned().collect();
            let before = owner.partition.deliveries.len();
            let Some(start) = owner.start() else {
                // Nothing that may begin is left behind.
                for it in due {
                    let blocked = strict.iter().any(|other| {
                        let is_before = other.id < it.id && other.state != State::Dead;
                        let is_beside = other.id != it.id && other.state.is_in_flight();
                        it.strict && other.agent == it.agent && (is_before || is_beside)
                    });
                    assert!(blocked, "{it:?} does not begin");
                }
                return;
            };
            assert_eq!(before, owner.partition.deliveries.len());
            let beside = owner
                .partition
                .iter()
                .filter(|it| it.strict && it.agent == start.agent && it.state.is_in_flight());
            assert!(beside.count() <= 1, "{start:?} is not alone");
            for other in &due {
                // A delivery that the clock has not made ready yet does not count.
                let is_ready = other.next_attempt_at.is_none();
                let earlier = other.agent == start.agent && other.id < start.id && is_ready;
                assert!(!earlier || other.strict, "{other:?} was passed by {start:?}");
            }
        }
        Op::Received(n) => {
            if let Some(&(id, token)) = owner.attempts.get(n) {
                let _ = owner.partition.received(id, token, owner.now);
            }
        }
        Op::Processing(n) => {
            if let Some(&(id, token)) = owner.attempts.get(n) {
                let _ = owner.partition.processing(id, token, "half".into(), owner.now);
            }
        }
        Op::End(n, how) => {
            let Some(&(id, token)) = owner.attempts.get(n) else { return };
            let fault = |kind| Err(Fault::new(kind, "no"));
            let reply = match how {
                0 | 1 => Ok(Payload::text("done")),
                2 => fault(FaultKind::AgentFailed),
                3 => fault(FaultKind::WorkerLost),
                4 => fault(FaultKind::Overloaded),
                _ => fault(FaultKind::Invalid),
            };
            let is_current = owner.partition.get(id).is_some_and(|it| it.check(token).is_ok());
            assert_eq!(owner.end(id, token, reply).is_ok(), is_current);
            // An attempt ends once, whatever is said of it later.
            assert_eq!(owner.end(id, token, Ok(Payload::default())), Err(Stale));
        }
        Op::Cancel(n) => {
            if let Some(id) = id(owner, n) {
                let _ = owner.partition.cancel(id, "enough".into(), owner.now);
            }
        }
        Op::Redrive(n) => {
            if let Some(id) = id(owner, n) {
                let _ = owner.partition.redrive(id, owner.now);
            }
        }
        Op::Discard(n) => {
            if let Some(id) = id(owner, n) {
                let _ = owner.partition.discard(id, "enough".into(), owner.now);
            }
        }
        Op::Publish(count) => {
            owner.publish(&["a/1", "b/1"][..count.into()]);
        }
        Op::HandOver => {
            owner.hand_over();
            assert!(owner.partition.poll_owed().is_none());
        }
        Op::Taken(n) if n < owner.handed.len() => {
            let (number, index) = owner.handed.swap_remove(n);
            owner.partition.taken(number, index, owner.now);
            owner.taken.insert((number, index));
        }
        Op::Taken(_) => {}
        Op::Wait(millis) => {
            owner.wait(Duration::from_millis(millis.into()));
        }
        Op::Commit => {
            owner.commit();
            let mut replayed = owner.replayed();
            for partition in [&mut owner.partition, &mut replayed] {
                partition.handle_timeout(owner.now);
                partition.let_go();
            }
            assert_eq!(view(&replayed), view(&owner.partition));
        }
        Op::Carry => {
            // What is not on disk is not carried: its commit is not there to be read.
            owner.commit();
            while let Some(position) = owner.partition.poll_carry(0, |_| 0) {
                let commit = owner.log[&position].clone();
                owner.partition.carry(position, &commit).unwrap();
                owner.commit();
            }
        }
        Op::Crash => owner.crash(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_a_delivery_ends_once_and_the_log_tells_it_all(
        ops in proptest::collection::vec(op(), 0..120),
    ) {
        let mut owner = Owner::new();
        for op in ops {
            run(&mut owner, op);
            check(&owner);
        }
        owner.commit();
        // Whoever is owed an event gets it, or has had it.
        owner.crash();
        owner.hand_over();
        for (number, owing) in owner.partition.outbox.iter() {
            for index in owing.left.keys() {
                assert!(owner.handed.contains(&(*number, *index)), "{number} {index}");
            }
        }
        for number in 1..=owner.partition.totals().published {
            let is_owed = owner.partition.outbox.get(number).is_some();
            let had = owner.taken.iter().filter(|(of, _)| *of == number).count();
            assert!(is_owed || had == owner.owed.get(&number).copied().unwrap_or_default());
        }
        // What was accepted, and is on disk, is either there or has ended.
        let there: BTreeSet<_> = owner.partition.iter().map(|it| it.id.number).collect();
        for number in 1..=owner.partition.totals().accepted {
            assert!(there.contains(&number) != owner.settled.contains_key(&number), "{number}");
        }
    }
}
