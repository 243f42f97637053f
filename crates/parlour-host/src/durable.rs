//! Messages that are kept until they have ended: what doors know of them.
//!
//! Each partition has an owner, a task with the partition's state, which alone writes its log. What a
//! door wants is an input of the owner of the agent's partition, and is answered when the log says it.

mod attempt;
mod follow;
mod gate;
mod owner;
mod publishing;
mod room;
mod sending;
mod slots;
mod tally;

use std::io;
use std::sync::atomic::{
    AtomicU64, AtomicUsize,
    Ordering::{AcqRel, Relaxed},
};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytestring::ByteString;
use parking_lot::Mutex;
use parlour_core::durable::{
    Delivery, DeliveryId, Level, Message, PartitionId, Position, RoomSettings, Settled, State,
    Step, Tally, Timestamp,
};
use parlour_core::{AgentId, AgentType, Fault, FaultKind, Payload};
use tokio::sync::{SetOnce, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::backbone::{self, Ack, Backbone, BackboneError, Replay};
use crate::config::{self, limits};
use crate::exchange::Exchange;
use crate::http::tasks::Tasks;
use crate::peer::RETRY_AFTER;
use crate::view::View;
use gate::Gate;
use owner::{Input, Owner};
use room::{Room, Wish, Writer};
use tally::Tallies;

pub(crate) use attempt::AttemptTo;
pub(crate) use follow::{EventPlace, Follow, Followed};
pub(crate) use owner::{Action, Lag, Worked};
pub(crate) use publishing::{Publishing, no_ack};
pub(crate) use room::Terms;
pub(crate) use sending::Sending;

/// The durable messages of a room. Cloning gives another handle to the same.
#[derive(Clone)]
pub(crate) struct Durable(Arc<Shared>);

struct Shared {
    exchange: Exchange,
    tasks: Tasks,
    backbone: Arc<dyn Backbone>,
    /// Where what has ended is found. There from the start on.
    view: OnceLock<Arc<View>>,
    inboxes: Arc<[Inbox]>,
    /// The last events of each partition.
    tails: Vec<watch::Sender<follow::Tail>>,
    /// Their other ends, until the owners are there.
    queues: Mutex<Vec<mpsc::UnboundedReceiver<Input>>>,
    room: Room,
    tallies: Tallies,
    /// Bytes of the commits in all logs that nothing is made from any more.
    past: AtomicU64,
    /// What the room's writer takes, until it is there.
    wishes: Mutex<Option<mpsc::Receiver<Wish>>>,
    /// How many logs have not been read yet.
    closed: AtomicUsize,
    /// Set when all were read, or one of them cannot be.
    opened: SetOnce<()>,
    failure: Arc<Failure>,
}

/// Why nothing is accepted any more, if that is so.
type Failure = Mutex<Option<BackboneError>>;

/// The way to the owner of a partition.
pub(crate) struct Inbox {
    queue: mpsc::UnboundedSender<Input>,
    /// Messages that wait to be accepted, and their bytes. They are bounded.
    accepts: AtomicUsize,
    bytes: AtomicUsize,
}

impl Inbox {
    /// A message waits to be accepted no more.
    fn leave(&self, message: &Message) {
        self.accepts.fetch_sub(1, Relaxed);
        self.bytes.fetch_sub(message.weight(), Relaxed);
    }
}

/// What is known of a delivery.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    /// It has not ended, or is dead.
    Live(Box<Delivery>),
    /// It has ended.
    Settled(Arc<Settled>),
}

/// Which deliveries a list is to have, of those that have not ended or are dead: the oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query {
    pub(crate) agent_type: Option<AgentType>,
    pub(crate) state: Option<State>,
    /// Only what comes behind this one.
    pub(crate) after: Option<(Timestamp, DeliveryId)>,
    /// How many at the most.
    pub(crate) limit: usize,
}

impl Query {
    fn wants(&self, it: &Delivery) -> bool {
        self.agent_type.as_ref().is_none_or(|wanted| *wanted == it.agent.agent_type)
            && self.state.is_none_or(|wanted| wanted == it.state)
            && self.after.is_none_or(|after| Self::key(it) > after)
    }

    /// The order of a list.
    pub(crate) fn key(it: &Delivery) -> (Timestamp, DeliveryId) {
        (it.accepted_at, it.id)
    }
}

impl Found {
    pub(crate) fn delivery(&self) -> &Delivery {
        match self {
            Self::Live(delivery) => delivery,
            Self::Settled(settled) => &settled.delivery,
        }
    }

    pub(crate) fn reply(&self) -> Option<&Payload> {
        match self {
            Self::Live(_) => None,
            Self::Settled(settled) => settled.reply.as_ref(),
        }
    }
}

impl Shared {
    /// One more log was read.
    fn open_one(&self) {
        if self.closed.fetch_sub(1, AcqRel) == 1 {
            let _ = self.opened.set(());
        }
    }

    /// Nothing more is accepted.
    fn fail(&self, error: BackboneError) {
        self.failure.lock().get_or_insert(error);
        let _ = self.opened.set(());
    }
}

impl Durable {
    /// The durable messages of `backbone`, whose owners take what they are asked once they have
    /// [started](Self::start).
    pub(crate) fn new(exchange: &Exchange, tasks: &Tasks, backbone: Arc<dyn Backbone>) -> Self {
        let partitions = backbone.partitions();
        let (inboxes, queues): (Vec<_>, Vec<_>) = (0..partitions)
            .map(|_| {
                let (queue, inbox) = mpsc::unbounded_channel();
                (Inbox { queue, accepts: AtomicUsize::new(0), bytes: AtomicUsize::new(0) }, inbox)
            })
            .unzip();
        let (room, wishes) = Room::new();
        let shared = Shared {
            exchange: exchange.clone(),
            tasks: tasks.clone(),
            backbone,
            view: OnceLock::new(),
            inboxes: inboxes.into(),
            tails: (0..partitions).map(|_| watch::Sender::default()).collect(),
            queues: Mutex::new(queues),
            room,
            tallies: Tallies::new(partitions),
            past: AtomicU64::new(0),
            wishes: Mutex::new(Some(wishes)),
            closed: AtomicUsize::new(usize::from(partitions) + 1),
            opened: SetOnce::new(),
            failure: Arc::default(),
        };
        Self(Arc::new(shared))
    }

    /// Starts an owner for each partition and a writer for the room's log, as tasks of the host. Each
    /// reads its log first, and ends when `closing` is cancelled.
    pub(crate) fn start(&self, closing: &CancellationToken) -> io::Result<()> {
        let tasks = &self.0.tasks;
        let view = Arc::new(View::open(self.0.backbone.views())?);
        let _ = self.0.view.set(view.clone());
        if let Some(wishes) = self.0.wishes.lock().take() {
            tasks.spawn(Writer::new(self.clone(), wishes).run(closing.clone()));
        }
        let gate = Gate::new(self.clone());
        tasks.spawn(gate.clone().run(closing.clone()));
        let (opening, wanted) = mpsc::unbounded_channel();
        tasks.spawn(replay(self.0.backbone.clone(), wanted));
        let queues = std::mem::take(&mut *self.0.queues.lock());
        for (number, inbox) in queues.into_iter().enumerate() {
            let partition = PartitionId(number as u16);
            let owner = Owner::new(self.clone(), view.clone(), partition, gate.clone(), inbox);
            tasks.spawn(owner.run(opening.clone(), closing.clone()));
        }
        Ok(())
    }

    /// Runs what a door does not wait for. It ends with the host.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.0.tasks.spawn(work);
    }

    /// What an acceptance promises.
    pub(crate) fn ack(&self) -> Ack {
        self.0.backbone.ack()
    }

    /// Whether all logs were read, or one of them cannot be.
    pub(crate) fn is_open(&self) -> bool {
        self.0.opened.get().is_some()
    }

    /// Waits until that is so.
    pub(crate) async fn are_open(&self) {
        self.0.opened.wait().await;
    }

    /// Whether messages are accepted, or why not.
    pub(crate) fn ready(&self) -> Result<(), Fault> {
        if let Some(failure) = &*self.0.failure.lock() {
            return Err(refusal(failure));
        }
        self.has_room()?;
        let closed = self.0.closed.load(Relaxed);
        if closed > 0 {
            let detail = format!("{closed} logs are still read from the disk");
            return Err(Fault::new(FaultKind::Unavailable, detail).retry_after(RETRY_AFTER));
        }
        Ok(())
    }

    /// Whether the store takes more than what must still be written.
    fn has_room(&self) -> Result<(), Fault> {
        if self.0.backbone.has_room() {
            return Ok(());
        }
        Err(refusal(&BackboneError::Full("what is left is for what was accepted".into())))
    }

    /// The way to the owner of a partition, for something new of this weight, if there is room for it.
    fn enter(&self, partition: PartitionId, weight: usize) -> Result<&Inbox, Fault> {
        if let Some(failure) = &*self.0.failure.lock() {
            return Err(refusal(failure));
        }
        self.has_room()?;
        let inbox = self.inbox(partition);
        let of = &self.0.exchange.config().limits;
        let (messages, bytes) =
            (inbox.accepts.fetch_add(1, Relaxed), inbox.bytes.fetch_add(weight, Relaxed));
        let (key, limit) = if messages >= of.queue_messages {
            (limits::queue_messages, of.queue_messages)
        } else if messages > 0 && bytes + weight > of.queue_bytes.0 {
            (limits::queue_bytes, of.queue_bytes.0)
        } else {
            return Ok(inbox);
        };
        inbox.accepts.fetch_sub(1, Relaxed);
        inbox.bytes.fetch_sub(weight, Relaxed);
        let detail = "too many messages wait to be accepted";
        Err(self.overloaded(key, limit, detail, "try again later"))
    }

    /// How many deliveries to agents of this type are where.
    pub(crate) async fn tally(&self, agent_type: &AgentType) -> Tally {
        self.are_open().await;
        self.0.tallies.beside(None, agent_type)
    }

    /// Whether there is room for one more delivery to an agent of this type, of which there are so many.
    fn admit(&self, agent_type: &AgentType, tally: Tally) -> Result<(), Fault> {
        let metrics = self.0.exchange.metrics();
        let settings = &self.0.exchange.config().durable;
        let max_dead = self.terms(agent_type).max_dead;
        let Tally { standing, dead_bytes } = tally;
        let full = |key, limit, detail| {
            let hint = format!(
                "see `parlour dead-letters ls --agent-type {agent_type}`, then redrive or discard \
                 them; `parlour agents set {agent_type} max_dead=N` lets there be more"
            );
            Err(metrics.limit_met(
                key,
                Some(limit),
                Fault::new(FaultKind::StorageFull, detail).hint(hint),
            ))
        };
        if standing.dead >= max_dead as u64 {
            let detail = format!("{agent_type} has {} dead letters", standing.dead);
            return full(config::durable::dead_letters, max_dead, detail);
        }
        let most = settings.dead_letter_bytes.0;
        if dead_bytes >= most as u64 {
            let detail = format!("the dead letters of {agent_type} have {dead_bytes} bytes");
            return full(config::durable::dead_letter_bytes, most, detail);
        }
        let unsettled = standing.waiting + standing.in_flight;
        if unsettled >= settings.unsettled as u64 {
            let detail = format!("{unsettled} messages for {agent_type} wait or are in flight");
            let hint = if self.0.room.said().of(agent_type).paused {
                "the type is paused: `parlour agents resume` has it go on"
            } else {
                "try again later; if it lasts, start more workers"
            };
            let key = config::durable::unsettled;
            return Err(self.overloaded(key, settings.unsettled, detail, hint));
        }
        Ok(())
    }

    /// Why one more is not accepted: there are as many as this limit lets there be.
    fn overloaded(
        &self,
        key: &'static str,
        limit: usize,
        detail: impl Into<Box<str>>,
        hint: &'static str,
    ) -> Fault {
        let fault = Fault::new(FaultKind::Overloaded, detail).hint(hint).retry_after(RETRY_AFTER);
        self.0.exchange.metrics().limit_met(key, Some(limit), fault)
    }

    /// What is known of a delivery. With `after` it waits until the delivery is newer than that
    /// generation, or has ended.
    pub(crate) async fn get(&self, id: DeliveryId, after: Option<u64>) -> Result<Found, Fault> {
        let inbox = self.inbox_of(id)?;
        match self.ask(inbox, |answer| Input::Get(id, after, answer)).await? {
            Some(found) => Ok(found),
            None => self.settled(id).await.map(Found::Settled),
        }
    }

    /// What is known of a delivery when it has ended, or has a step of `level` that is newer than
    /// `after`, or any without a level; or else after `patience`, which ends with
    /// `durable.longest_wait`.
    pub(crate) async fn wait(
        &self,
        id: DeliveryId,
        after: u64,
        level: Option<Level>,
        patience: Option<Duration>,
    ) -> Result<Found, Fault> {
        let longest = self.0.exchange.config().durable.longest_wait;
        let patience = patience.map_or(longest, |patience| patience.min(longest));
        if patience.is_zero() {
            return self.get(id, None).await;
        }
        let until = Instant::now() + patience;
        let mut seen = after;
        loop {
            let Ok(newer) = timeout_at(until, self.get(id, Some(seen))).await else {
                // Nothing has happened: that is said too.
                return self.get(id, None).await;
            };
            let found = newer?;
            let delivery = found.delivery();
            let is_wanted =
                |it: &Step| it.generation > after && level.is_none_or(|level| it.level == level);
            if delivery.state.is_settled() || delivery.known_steps().any(|it| is_wanted(&it)) {
                return Ok(found);
            }
            seen = delivery.generation;
        }
    }

    /// Looks for a delivery among those that have ended.
    async fn settled(&self, id: DeliveryId) -> Result<Arc<Settled>, Fault> {
        let Shared { view, backbone, .. } = &*self.0;
        let view = view.get().ok_or_else(|| unknown(id))?;
        let found = view.find(id.partition, id.number).await.map_err(|error| refusal(&error))?;
        let place = found.ok_or_else(|| unknown(id))?;
        let read = async {
            let Some(commit) =
                backbone::commit_at(&**backbone, id.partition, place.position).await?
            else {
                // It has been let go, if all before it have been.
                let first = backbone.read(id.partition, Position(1), 1).await?;
                let is_lost = first.first().is_some_and(|(first, _)| *first < place.position);
                return if is_lost { Err(missing(place.position)) } else { Ok(None) };
            };
            Ok(Some(Settled::read(&commit, place.offset)?))
        };
        let settled = read.await.map_err(|error: BackboneError| refusal(&error))?;
        let settled = settled.ok_or_else(|| unknown(id))?;
        if settled.delivery.id == id { Ok(Arc::new(settled)) } else { Err(unknown(id)) }
    }

    /// Gives a delivery up.
    pub(crate) async fn cancel(&self, id: DeliveryId, reason: ByteString) -> Result<(), Fault> {
        let inbox = self.inbox_of(id)?;
        self.ask(inbox, |answer| Input::Cancel(id, reason, answer)).await?
    }

    /// Has a dead delivery attempted again, as often as at first.
    pub(crate) async fn redrive(&self, id: DeliveryId) -> Result<(), Fault> {
        self.ask(self.inbox_of(id)?, |answer| Input::Redrive(id, answer)).await?
    }

    /// Gives a dead delivery up.
    pub(crate) async fn discard(&self, id: DeliveryId, reason: ByteString) -> Result<(), Fault> {
        self.ask(self.inbox_of(id)?, |answer| Input::Discard(id, reason, answer)).await?
    }

    /// What a delivery carries that has not ended, or is dead.
    pub(crate) async fn message(&self, id: DeliveryId) -> Result<Arc<Message>, Fault> {
        let inbox = self.inbox_of(id)?;
        self.ask(inbox, |answer| Input::Message(id, answer)).await?.ok_or_else(|| unknown(id))
    }

    /// Deliveries that have not ended, or are dead.
    pub(crate) async fn list(&self, query: Query) -> Result<Vec<Delivery>, Fault> {
        let query = Arc::new(query);
        let mut all = Vec::new();
        for inbox in &*self.0.inboxes {
            all.extend(self.ask(inbox, |answer| Input::List(query.clone(), answer)).await?);
        }
        all.sort_unstable_by_key(Query::key);
        all.truncate(query.limit);
        Ok(all)
    }

    /// What the room asks for, once that was read.
    pub(crate) async fn room(&self) -> Result<Arc<RoomSettings>, Fault> {
        if self.0.room.is_read().await { Ok(self.room_so_far()) } else { Err(self.is_gone()) }
    }

    /// The same as far as it is known: nothing before it was read.
    pub(crate) fn room_so_far(&self) -> Arc<RoomSettings> {
        self.0.room.said().clone()
    }

    /// Has the room ask for something else. When it returns, that is as safe as [`ack`](Self::ack)
    /// says.
    pub(crate) async fn change_room(
        &self,
        change: impl FnOnce(&mut RoomSettings) -> Result<(), Fault> + Send + 'static,
    ) -> Result<Arc<RoomSettings>, Fault> {
        match self.0.room.change(change).await {
            Some(changed) => changed,
            None => Err(self.is_gone()),
        }
    }

    /// What holds for deliveries to agents of this type, once the room's log was read.
    fn terms(&self, agent_type: &AgentType) -> Terms {
        Terms::new(self.0.exchange.config(), &self.0.room.said(), agent_type)
    }

    /// Does the same to all deliveries for agents of this type that are there now, or to the oldest
    /// `limit` of each partition in turn until there were as many.
    pub(crate) async fn all(
        &self,
        agent_type: &AgentType,
        action: Action,
        limit: usize,
    ) -> Result<Worked, Fault> {
        let mut all = Worked::default();
        for inbox in &*self.0.inboxes {
            let left = limit.saturating_sub(all.done);
            let input = |answer| Input::All(agent_type.clone(), action.clone(), left, answer);
            let worked = self.ask(inbox, input).await?;
            all.done += worked.done;
            all.in_flight += worked.in_flight;
        }
        Ok(all)
    }

    /// Which partition keeps the messages for an agent.
    fn partition_of(&self, agent: &AgentId) -> PartitionId {
        PartitionId::of(agent, self.0.backbone.partitions())
    }

    fn inbox(&self, partition: PartitionId) -> &Inbox {
        &self.0.inboxes[usize::from(partition.0)]
    }

    fn tail(&self, partition: PartitionId) -> &watch::Sender<follow::Tail> {
        &self.0.tails[usize::from(partition.0)]
    }

    fn inbox_of(&self, id: DeliveryId) -> Result<&Inbox, Fault> {
        self.0.inboxes.get(usize::from(id.partition.0)).ok_or_else(|| unknown(id))
    }

    async fn ask<T>(
        &self,
        inbox: &Inbox,
        input: impl FnOnce(oneshot::Sender<T>) -> Input,
    ) -> Result<T, Fault> {
        self.answer(ask(inbox, input)).await
    }

    async fn answer<T>(&self, answered: oneshot::Receiver<T>) -> Result<T, Fault> {
        answered.await.map_err(|_| self.is_gone())
    }

    /// Why whoever was asked does not answer.
    fn is_gone(&self) -> Fault {
        is_gone(&self.0.failure)
    }
}

fn is_gone(failure: &Failure) -> Fault {
    match &*failure.lock() {
        Some(failure) => refusal(failure),
        None => Fault::new(FaultKind::Unavailable, "the host is shutting down")
            .retry_after(Duration::from_secs(1)),
    }
}

/// Reads all the logs that are wanted in one go, once nobody may want another.
async fn replay(backbone: Arc<dyn Backbone>, mut wanted: mpsc::UnboundedReceiver<Replay>) {
    let mut logs = Vec::new();
    while let Some(log) = wanted.recv().await {
        logs.push(log);
    }
    backbone.replay(logs).await;
}

fn ask<T>(inbox: &Inbox, input: impl FnOnce(oneshot::Sender<T>) -> Input) -> oneshot::Receiver<T> {
    let (answer, answered) = oneshot::channel();
    // An owner that is gone drops what it was asked.
    let _ = inbox.queue.send(input(answer));
    answered
}

fn missing(position: Position) -> BackboneError {
    BackboneError::Damaged(format!("the commit {} is missing", position.0))
}

/// Nothing is known under this name.
fn unknown(id: DeliveryId) -> Fault {
    Fault::new(FaultKind::NotFound, format!("there is no delivery {id}"))
        .hint("was it settled long ago? See the retention settings under `durable`")
}

fn refusal(failure: &BackboneError) -> Fault {
    match failure {
        BackboneError::Full(_) => Fault::new(FaultKind::StorageFull, failure.to_string())
            .hint("free some space on the disk of the data directory")
            .retry_after(Duration::from_secs(5)),
        _ => Fault::new(FaultKind::Unavailable, format!("the store failed: {failure}"))
            .hint("look at the disk, then start the host anew; `parlour doctor` helps"),
    }
}
