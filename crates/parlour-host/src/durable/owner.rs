//! The task that owns a partition: takes inputs, has the partition decide, writes the log, and then
//! does what was decided.

mod asked;
mod events;
mod log;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bytes::Bytes;
use foldhash::fast::RandomState;
use parlour_core::durable::{
    self, Delivery, DeliveryId, Message, MessageKind, Partition, PartitionId, Position, Standing,
    Start, Timestamp, Totals,
};
use parlour_core::{AgentId, Attempt, Call, WorkerId};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Durable;
use super::attempt::AttemptTo;
use super::gate::{Gate, Slot};
use crate::backbone::{BackboneError, Replay};
use crate::exchange::Ticket;
use crate::view::View;
use asked::{Answer, Answered, Watcher, Work};

pub(crate) use asked::{Action, Input, Lag, Worked};

/// Inputs taken before a commit is written.
const BATCH: usize = 1024;
/// How often it is looked at what has become too old.
const RETIRE: Duration = Duration::from_secs(60);

pub(super) struct Owner {
    durable: Durable,
    view: Arc<View>,
    id: PartitionId,
    gate: Gate,
    inbox: mpsc::UnboundedReceiver<Input>,
    changes: watch::Receiver<()>,
    /// Whether a commit would have to wait for others.
    busy: Option<watch::Receiver<bool>>,
    partition: Partition,
    /// By how much the time of the log is ahead of the clock, which was set back since.
    ahead: Duration,
    answers: Vec<Answered>,
    /// What came while a commit waited for room, or when one was long enough.
    late: Vec<Input>,
    /// Attempts that are under way, by which they can be given up.
    under_way: HashMap<u64, (u64, Option<Ticket>), RandomState>,
    /// Attempts that were given up, whose workers are told when the log says it.
    given_up: Vec<Ticket>,
    works: VecDeque<Work>,
    /// Those who want to see what a delivery carries.
    asked: Vec<(DeliveryId, Answer<Option<Arc<Message>>>)>,
    /// Those who wait for something to happen to a delivery.
    watchers: HashMap<u64, Vec<Watcher>, RandomState>,
    /// Bytes of the log, and of those of its commits that nothing is made from, as all were told.
    size: u64,
    past: u64,
    /// When the oldest commit was made, if that was looked up.
    oldest: Option<Timestamp>,
    /// What the metrics were told.
    counted: (Totals, Standing, usize),
    /// When it is next looked at what has become too old.
    retires: Instant,
    /// The commit that was read last.
    read: Option<(Position, Bytes)>,
}

impl Owner {
    pub(super) fn new(
        durable: Durable,
        view: Arc<View>,
        id: PartitionId,
        gate: Gate,
        inbox: mpsc::UnboundedReceiver<Input>,
    ) -> Self {
        let settings = &durable.0.exchange.config().durable;
        let memory = settings.memory_bytes.0 / durable.0.inboxes.len();
        Self {
            changes: durable.0.exchange.changes(),
            partition: Partition::new(id, fastrand::u32(..), memory),
            busy: durable.0.backbone.busy(),
            durable,
            view,
            id,
            gate,
            inbox,
            ahead: Duration::ZERO,
            answers: Vec::new(),
            late: Vec::new(),
            under_way: HashMap::default(),
            given_up: Vec::new(),
            works: VecDeque::new(),
            asked: Vec::new(),
            watchers: HashMap::default(),
            size: 0,
            past: 0,
            oldest: None,
            counted: Default::default(),
            retires: Instant::now(),
            read: None,
        }
    }

    /// Owns the partition until the host ends or the log cannot be written.
    ///
    /// `opening` takes what is wanted of the log before.
    pub(super) async fn run(
        mut self,
        opening: mpsc::UnboundedSender<Replay>,
        closing: CancellationToken,
    ) {
        // What the room asks for holds from the first attempt on.
        let room = tokio::select! {
            is_read = self.durable.0.room.is_read() => is_read,
            () = closing.cancelled() => false,
        };
        if !room {
            let _ = self.durable.0.opened.set(());
            return;
        }
        let result = match self.open(opening).await {
            Ok(()) => {
                self.durable.0.open_one();
                // What is bounded over all partitions is not known before.
                tokio::select! {
                    () = self.durable.are_open() => {}
                    () = closing.cancelled() => return,
                }
                self.serve(&closing).await
            }
            Err(error) => Err(error),
        };
        self.gate.leave(self.id);
        if let Err(error) = result {
            tracing::error!(partition = self.id.0, %error, "the log of a partition failed");
            self.durable.0.fail(error);
        }
    }

    async fn serve(&mut self, closing: &CancellationToken) -> Result<(), BackboneError> {
        let mut inputs = Vec::with_capacity(BATCH);
        let mut starts = Vec::new();
        let mut more = false;
        loop {
            let due = self.partition.poll_timeout().map(|at| self.instant(at));
            let due = due.unwrap_or(self.retires).min(self.retires);
            let due = if more || !self.late.is_empty() { Instant::now() } else { due };
            tokio::select! {
                biased;
                () = closing.cancelled() => return Ok(()),
                taken = self.inbox.recv_many(&mut inputs, BATCH), if self.late.is_empty() => {
                    if taken == 0 {
                        return Ok(());
                    }
                }
                changed = self.changes.changed() => match changed {
                    Ok(()) => self.partition.wake_all(),
                    Err(_) => return Ok(()),
                },
                () = sleep_until(due) => {}
            }
            // An inbox that is never empty must not hide it.
            if self.changes.has_changed().unwrap_or(false) {
                self.changes.mark_unchanged();
                self.partition.wake_all();
            }
            self.gather(&mut inputs).await;
            let now = self.now();
            self.partition.handle_timeout(now);
            let (mut woken, mut woken_types) = (Vec::new(), Vec::new());
            let mut left = self.late.split_off(0).into_iter().chain(inputs.drain(..));
            while !self.partition.is_full()
                && let Some(input) = left.next()
            {
                match &input {
                    Input::WakeWorker(worker) => woken.push(*worker),
                    Input::Wake(agent_type) => woken_types.push(agent_type.clone()),
                    _ => {}
                }
                self.handle(input, now);
            }
            self.late.extend(left);
            self.work(now);
            self.start(&mut starts, &mut woken, now);
            more = starts.len() >= BATCH || !self.works.is_empty();
            woken.sort_unstable();
            woken.dedup();
            for worker in woken {
                let parked = self.partition.parked(worker);
                self.gate.settle(self.id, worker, parked > 0);
            }
            woken_types.iter().for_each(|agent_type| self.gate.pass_on(agent_type));
            self.commit().await?;
            self.hand_over().await?;
            for (start, slot) in starts.drain(..) {
                self.send(start, slot).await?;
            }
            for (id, answer) in std::mem::take(&mut self.asked) {
                let message = match self.partition.message(id) {
                    Some(message) => Some(self.load(message).await?),
                    None => None,
                };
                let _ = answer.send(message);
            }
            more |= self.tidy().await?;
            if Instant::now() >= self.retires {
                self.retires = Instant::now() + RETIRE;
                self.retire(now).await?;
            }
        }
    }

    /// While others' commits are being written, this one would wait too: what comes until then goes
    /// into it.
    async fn gather(&mut self, inputs: &mut Vec<Input>) {
        if let Some(busy) = &mut self.busy
            && *busy.borrow_and_update()
        {
            // The end of one, or else those that are quicker could go first for ever.
            let _ = busy.changed().await;
        }
        while inputs.len() < BATCH
            && self.late.is_empty()
            && let Ok(input) = self.inbox.try_recv()
        {
            inputs.push(input);
        }
    }

    /// Begins the attempts that workers have room for, up to as many as inputs are taken at once. Adds
    /// the workers that have no room to `busy`.
    fn start(&mut self, starts: &mut Vec<(Start, Slot)>, busy: &mut Vec<WorkerId>, now: Timestamp) {
        let mut slots = Vec::new();
        let (gate, id) = (&self.gate, self.id);
        let mut ask = |agent: &AgentId| {
            let (answer, slot) = gate.ask(id, agent);
            slots.extend(slot);
            if let durable::Gate::Busy(worker) = answer
                && busy.last() != Some(&worker)
            {
                busy.push(worker);
            }
            answer
        };
        let mut begun = Vec::new();
        while begun.len() < BATCH
            && let Some(start) = self.partition.poll_start(now, &mut ask)
        {
            begun.push(start);
        }
        // Each that began was let in by the gate just before.
        starts.extend(begun.into_iter().zip(slots));
    }

    /// Sends an attempt on its way, now that the log tells of it.
    async fn send(&mut self, start: Start, slot: Slot) -> Result<(), BackboneError> {
        let Start { id, token, attempt, agent, .. } = start;
        // It may have ended in the same commit.
        let is_current = |it: &Delivery| it.check(token).is_ok();
        let current = self.partition.get(id).filter(|it| is_current(it));
        let Some(message) = current.and_then(|_| self.partition.message(id)) else {
            return Ok(());
        };
        let message = self.load(message).await?;
        let exchange = self.durable.0.exchange.clone();
        let owner = self.durable.inbox(self.id).queue.clone();
        let timeout = self.durable.terms(&agent.agent_type).attempt_timeout;
        let now = Instant::now();
        let call = Call {
            header: message.header.clone(),
            target: AgentId::clone(&agent),
            deadline: (now + timeout).into_std(),
            progress: true,
            attempt: Some(Attempt { delivery: id, number: attempt }),
            topic: match &message.kind {
                MessageKind::Call => None,
                MessageKind::Event(topic) => Some(topic.clone()),
            },
            payload: message.payload.clone(),
        };
        let ticket = exchange.attempt(
            call,
            AttemptTo {
                id,
                number: attempt,
                token,
                owner,
                slot,
                is_received: AtomicBool::new(false),
                untaken: Arc::default(),
            },
        );
        self.under_way.insert(id.number, (token, ticket));
        Ok(())
    }

    fn now(&self) -> Timestamp {
        let now = self.durable.0.exchange.unix_time(Instant::now());
        Timestamp(now.as_millis() as u64).after(self.ahead)
    }

    fn instant(&self, at: Timestamp) -> Instant {
        Instant::now() + at.since(self.now())
    }
}
