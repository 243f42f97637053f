use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::fmt;
use std::time::Instant;

use crate::{Fault, FaultKind, Reply};

/// Names a call on one connection. Chosen by the side that sends the call, never reused by it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(clippy::exhaustive_structs, reason = "a number with a name")]
pub struct CallId(pub u64);

/// Something for each of the calls on one connection, seeded at random against chosen numbers.
pub type CallMap<V> = HashMap<CallId, V, foldhash::fast::RandomState>;

/// How many deadlines of calls that ended are kept at least before they are looked for.
const SPARE: usize = 64;

/// The calls meant for one peer that have not ended yet. Each one ends exactly once: by a reply, by
/// its deadline, by being cancelled, or with the connection.
///
/// `R` is a return address: whatever the owner needs to hand a reply on. The session stores it and
/// gives it back, and never looks inside. A host uses a connection or a waiting request, a client a
/// waiting future, a test a `&str`.
///
/// Methods come in three groups:
///
/// - commands of the owner: [`begin`](Self::begin), [`send`](Self::send), [`cancel`](Self::cancel);
/// - `handle_*`, for what the network or the clock did;
/// - `poll_*`, for what the owner should do next. Poll after every command and every `handle_*`.
pub struct Session<R> {
    max_in_flight: usize,
    in_flight: CallMap<InFlight<R>>,
    /// The earliest first. Calls that ended are among them, but no more than about as many as are in
    /// flight: a call that is answered in time, as most are, costs its deadline no search.
    deadlines: BinaryHeap<Reverse<(Instant, CallId)>>,
    settled: VecDeque<Settled<R>>,
}

impl<R> Session<R> {
    /// A session without calls that admits `max_in_flight` at a time.
    pub fn new(max_in_flight: usize) -> Self {
        Self {
            max_in_flight,
            in_flight: CallMap::default(),
            deadlines: BinaryHeap::new(),
            settled: VecDeque::new(),
        }
    }

    /// Takes a call that is about to be queued for the peer under the name `id`.
    ///
    /// Returns the address unused if as many calls as allowed are in flight.
    pub fn begin(&mut self, id: CallId, deadline: Instant, reply_to: R) -> Result<(), R> {
        if self.in_flight.len() >= self.max_in_flight {
            return Err(reply_to);
        }
        let earlier = self.in_flight.insert(id, InFlight { reply_to, sent: false });
        debug_assert!(earlier.is_none(), "call ids are never reused");
        let in_flight = &self.in_flight;
        if self.deadlines.len() > 2 * in_flight.len() + SPARE {
            self.deadlines.retain(|Reverse((_, id))| in_flight.contains_key(id));
        }
        self.deadlines.push(Reverse((deadline, id)));
        Ok(())
    }

    /// Records that the call goes onto the wire now, so that from here on the agent may have run.
    ///
    /// Returns `false` if it ended while it was queued: then it must not be sent.
    #[must_use]
    pub fn send(&mut self, id: CallId) -> bool {
        let call = self.in_flight.get_mut(&id);
        call.map(|call| call.sent = true).is_some()
    }

    /// Ends the call because its caller gave it up. One that has ended already stays as it is.
    pub fn cancel(&mut self, id: CallId) {
        self.fail(id, cancelled());
    }

    /// Takes a reply the peer sent.
    ///
    /// Returns `false` for a call that is not in flight, or was never sent: the call ended before,
    /// or the peer invented it. Such a reply goes nowhere.
    pub fn handle_reply(&mut self, id: CallId, reply: Reply) -> bool {
        if !self.in_flight.get(&id).is_some_and(|call| call.sent) {
            return false;
        }
        let Some(call) = self.remove(id) else { return false };
        self.settled.push_back(Settled { id, reply_to: call.reply_to, reply, cancel: false });
        true
    }

    /// Where to tell of the progress of a call, if it is in flight and was sent.
    pub fn progress_to(&self, id: CallId) -> Option<&R> {
        self.in_flight.get(&id).filter(|call| call.sent).map(|call| &call.reply_to)
    }

    /// Ends a call that cannot go on, and has the peer told so.
    pub fn fail(&mut self, id: CallId, fault: Fault) {
        self.settle(id, |sent| fault.may_have_run_if(sent));
    }

    /// Gives back the address of a call that was never sent, so that it can go elsewhere.
    pub fn take_unsent(&mut self, id: CallId) -> Option<R> {
        if self.in_flight.get(&id)?.sent {
            return None;
        }
        self.remove(id).map(|call| call.reply_to)
    }

    /// Ends every call whose deadline is not after `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(&Reverse((at, id))) = self.deadlines.peek()
            && at <= now
        {
            self.deadlines.pop();
            self.settle(id, |sent| deadline_exceeded().may_have_run_if(sent));
        }
    }

    /// Ends every call, because the peer is gone.
    pub fn handle_disconnect(&mut self) {
        self.end_all(&worker_lost());
    }

    /// Ends every call with `fault`, which says of each whether it may have run, in the order of
    /// their names.
    pub fn end_all(&mut self, fault: &Fault) {
        self.deadlines.clear();
        let mut ended: Vec<_> = self.in_flight.drain().collect();
        ended.sort_unstable_by_key(|(id, _)| *id);
        for (id, call) in ended {
            let sent = call.sent && !crate::bug!("may_have_run_denied");
            let reply = Err(fault.clone().may_have_run_if(sent));
            self.settled.push_back(Settled { id, reply_to: call.reply_to, reply, cancel: false });
        }
    }

    /// The next call that ended.
    #[must_use]
    pub fn poll_settled(&mut self) -> Option<Settled<R>> {
        self.settled.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) at the latest. Calling it early is harmless,
    /// and it may find that the call in question has ended.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let deadline = self.deadlines.peek().map(|&Reverse((at, _))| at);
        let deadline = deadline.filter(|_| !self.in_flight.is_empty());
        deadline.filter(|_| !crate::bug!("deadline_not_enforced"))
    }

    /// How many calls have not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn settle(&mut self, id: CallId, fault: impl FnOnce(bool) -> Fault) {
        if let Some(call) = self.remove(id) {
            let (reply, cancel) = (Err(fault(call.sent)), call.sent);
            self.settled.push_back(Settled { id, reply_to: call.reply_to, reply, cancel });
        }
    }

    fn remove(&mut self, id: CallId) -> Option<InFlight<R>> {
        let call = self.in_flight.remove(&id)?;
        if self.in_flight.is_empty() {
            self.deadlines.clear();
        }
        Some(call)
    }
}

impl<R> fmt::Debug for Session<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("in_flight", &self.in_flight.len())
            .field("settled", &self.settled.len())
            .finish_non_exhaustive()
    }
}

/// A call that ended.
#[derive(Debug, Eq, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "taken apart by the session's owner")]
pub struct Settled<R> {
    /// Its name.
    pub id: CallId,
    /// Where the reply goes.
    pub reply_to: R,
    /// How it ended.
    pub reply: Reply,
    /// Whether the peer still works on it and should be told that nobody waits.
    pub cancel: bool,
}

struct InFlight<R> {
    reply_to: R,
    sent: bool,
}

fn cancelled() -> Fault {
    Fault::new(FaultKind::Cancelled, "the caller gave the call up")
}

fn deadline_exceeded() -> Fault {
    Fault::new(FaultKind::DeadlineExceeded, "the deadline passed before the agent answered")
        .hint("allow more time, or ask why the agent is slow")
}

fn worker_lost() -> Fault {
    Fault::new(FaultKind::WorkerLost, "the worker's connection closed before it answered")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::Payload;

    #[test]
    fn reply_goes_to_whoever_asked() {
        let (mut session, at) = (Session::new(8), clock());
        let (first, second) = (CallId(1), CallId(2));
        session.begin(first, at(30), "alice").unwrap();
        session.begin(second, at(30), "bob").unwrap();
        assert!(session.send(first) && session.send(second));

        assert!(session.handle_reply(second, Ok(Payload::text("two"))));
        assert!(session.handle_reply(first, Ok(Payload::text("one"))));

        let ended = std::iter::from_fn(|| session.poll_settled());
        let ended: Vec<_> = ended.map(|call| (call.reply_to, call.reply.unwrap())).collect();
        assert_eq!(ended, [("bob", Payload::text("two")), ("alice", Payload::text("one"))]);
    }

    #[test]
    fn late_reply_is_dropped() {
        let (mut session, at) = (Session::new(8), clock());
        session.begin(CallId(1), at(5), "alice").unwrap();
        assert!(session.send(CallId(1)));

        assert_eq!(session.poll_timeout(), Some(at(5)));
        session.handle_timeout(at(5));
        assert!(!session.handle_reply(CallId(1), Ok(Payload::text("too late"))));

        let call = session.poll_settled().unwrap();
        let fault = call.reply.unwrap_err();
        assert_eq!((fault.kind(), fault.may_have_run()), (FaultKind::DeadlineExceeded, true));
        assert!(call.cancel, "the worker is told that nobody waits");
        assert_eq!((session.poll_settled(), session.poll_timeout()), (None, None));
    }

    #[test]
    fn a_call_that_ends_in_the_queue_is_never_sent_and_cannot_have_run() {
        let (mut session, at) = (Session::new(8), clock());
        session.begin(CallId(1), at(5), "alice").unwrap();

        assert!(!session.handle_reply(CallId(1), Ok(Payload::text("invented"))));
        session.handle_timeout(at(6));

        assert!(!session.send(CallId(1)));
        let call = session.poll_settled().unwrap();
        assert_eq!((call.reply.unwrap_err().may_have_run(), call.cancel), (false, false));
    }

    #[test]
    fn a_full_session_gives_the_address_back() {
        let (mut session, at) = (Session::new(1), clock());
        session.begin(CallId(1), at(5), "alice").unwrap();
        assert_eq!(session.begin(CallId(2), at(5), "bob"), Err("bob"));
        session.cancel(CallId(1));
        assert_eq!(session.begin(CallId(3), at(5), "bob"), Ok(()));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Begin(u64),
        Send(u64),
        Reply(u64),
        Cancel(u64),
        Tick(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let id = 0..12_u64;
        prop_oneof![
            id.clone().prop_map(Step::Begin),
            id.clone().prop_map(Step::Send),
            id.clone().prop_map(Step::Reply),
            id.prop_map(Step::Cancel),
            (0..40_u64).prop_map(Step::Tick),
        ]
    }

    proptest! {
        #[test]
        fn any_order_of_inputs_ends_each_call_once(steps in prop::collection::vec(step(), 0..80)) {
            let (mut session, at) = (Session::new(6), clock());
            let (mut begun, mut ended, mut sent) = (Vec::new(), Vec::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Begin(id) if begun.contains(&id) => {}
                    Step::Begin(id) => {
                        if session.begin(CallId(id), at(id * 3), id).is_ok() {
                            begun.push(id);
                        }
                    }
                    Step::Send(id) => {
                        if session.send(CallId(id)) {
                            sent.push(id);
                        }
                    }
                    Step::Reply(id) => {
                        let open = sent.contains(&id) && !ended.contains(&id);
                        let reply = Ok(Payload::default());
                        prop_assert_eq!(session.handle_reply(CallId(id), reply), open);
                    }
                    Step::Cancel(id) => session.cancel(CallId(id)),
                    Step::Tick(secs) => session.handle_timeout(at(secs)),
                }
                while let Some(call) = session.poll_settled() {
                    prop_assert_eq!(call.id.0, call.reply_to);
                    prop_assert!(!ended.contains(&call.reply_to), "ended twice");
                    if let Err(fault) = &call.reply {
                        prop_assert_eq!(fault.may_have_run(), sent.contains(&call.reply_to));
                    }
                    ended.push(call.reply_to);
                }
            }
            session.handle_disconnect();
            ended.extend(std::iter::from_fn(|| session.poll_settled()).map(|call| call.reply_to));
            begun.sort_unstable();
            ended.sort_unstable();
            prop_assert_eq!(begun, ended);
            prop_assert_eq!((session.in_flight(), session.poll_timeout()), (0, None));
        }
    }

    /// Points in time, in seconds after one that is fixed for the test.
    fn clock() -> impl Fn(u64) -> Instant {
        #[expect(
            clippy::disallowed_methods,
            reason = "only a starting point; no test waits for it"
        )]
        let start = Instant::now();
        move |secs| start + Duration::from_secs(secs)
    }
}
