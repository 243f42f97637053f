//! The room's own log: settings that outlive the host. One task writes it, anybody reads what it says.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use parlour_core::durable::{AgentSettings, PartitionId, Position, RetryPolicy, RoomSettings};
use parlour_core::{AgentType, Fault, FaultKind};
use tokio::sync::{SetOnce, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::owner::Input;
use super::{Durable, refusal};
use crate::Config;
use crate::backbone::BackboneError;
use crate::config::limits;

/// Changes that are taken into one commit, and that may wait for it.
const BATCH: usize = 64;
/// After how many commits the older ones are let go. Only the last is ever read.
const KEPT: u32 = 16;

/// What the room's log says.
pub(super) struct Room {
    said: ArcSwap<RoomSettings>,
    wishes: mpsc::Sender<Wish>,
    /// Set when the log was read, or could not be.
    is_read: SetOnce<bool>,
}

/// A change that somebody wants, which may find that it is not possible.
type Change = Box<dyn FnOnce(&mut RoomSettings) -> Result<(), Fault> + Send>;

/// A change, and who waits for it.
pub(super) struct Wish {
    change: Change,
    answer: oneshot::Sender<Result<Arc<RoomSettings>, Fault>>,
}

impl Room {
    /// A room of which nothing is known yet, and what its [`Writer`] takes.
    pub(super) fn new() -> (Self, mpsc::Receiver<Wish>) {
        let (wishes, queue) = mpsc::channel(BATCH);
        (Self { said: ArcSwap::default(), wishes, is_read: SetOnce::new() }, queue)
    }

    /// Waits until the log was read. Returns whether it could be.
    pub(super) async fn is_read(&self) -> bool {
        *self.is_read.wait().await
    }

    /// What it says now.
    pub(super) fn said(&self) -> Guard<Arc<RoomSettings>> {
        self.said.load()
    }

    /// Has it say something else. When it returns, that is as safe as an acceptance.
    pub(super) async fn change(
        &self,
        change: impl FnOnce(&mut RoomSettings) -> Result<(), Fault> + Send + 'static,
    ) -> Option<Result<Arc<RoomSettings>, Fault>> {
        let (answer, answered) = oneshot::channel();
        self.wishes.send(Wish { change: Box::new(change), answer }).await.ok()?;
        answered.await.ok()
    }
}

/// What holds for the deliveries to agents of one type: what the room asks for, and else what the
/// settings of the host say.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) retry: RetryPolicy,
    pub(crate) attempt_timeout: Duration,
    pub(crate) concurrency: usize,
    pub(crate) strict: bool,
    pub(crate) max_dead: usize,
}

impl Terms {
    pub(crate) fn new(config: &Config, room: &RoomSettings, agent_type: &AgentType) -> Self {
        let host = &config.durable;
        let asked = room.agents.get(agent_type);
        let number = |asked: Option<u32>, host: usize| asked.unwrap_or(host as u32);
        Self {
            retry: RetryPolicy {
                max_attempts: number(asked.and_then(|it| it.max_attempts), host.max_attempts),
                max_lost: number(asked.and_then(|it| it.max_lost), host.max_lost),
                base: asked.and_then(|it| it.backoff_base).unwrap_or(host.backoff_base),
                cap: asked.and_then(|it| it.backoff_cap).unwrap_or(host.backoff_cap),
            },
            attempt_timeout: asked
                .and_then(|it| it.attempt_timeout)
                .unwrap_or(host.attempt_timeout),
            concurrency: concurrency(config, asked),
            strict: asked.is_some_and(|it| it.strict),
            max_dead: asked
                .and_then(|it| it.max_dead)
                .map_or(host.dead_letters, |most| most as usize),
        }
    }
}

/// The most attempts at once of a type that this is asked for.
pub(super) fn concurrency(config: &Config, asked: Option<&AgentSettings>) -> usize {
    let host = config.durable.type_in_flight;
    asked.and_then(|it| it.concurrency).map_or(host, |most| host.min(most as usize))
}

/// The task that writes the room's log.
pub(super) struct Writer {
    durable: Durable,
    log: PartitionId,
    /// The last commit.
    position: Position,
    /// How many commits were written and not let go, this one included.
    kept: u32,
    queue: mpsc::Receiver<Wish>,
}

impl Writer {
    pub(super) fn new(durable: Durable, queue: mpsc::Receiver<Wish>) -> Self {
        let log = PartitionId::of_room(durable.0.backbone.partitions());
        Self { durable, log, position: Position::default(), kept: 0, queue }
    }

    /// Writes until the host ends or the log cannot be written.
    pub(super) async fn run(mut self, closing: CancellationToken) {
        let shared = self.durable.0.clone();
        let opened = self.open().await;
        if opened.is_ok() {
            shared.open_one();
        }
        let is_read = opened.is_ok();
        let result = match opened {
            Ok(()) => {
                let _ = shared.room.is_read.set(true);
                self.serve(&closing).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            tracing::error!(%error, "the log of the room failed");
            shared.fail(error);
        }
        if !is_read {
            let _ = shared.room.is_read.set(false);
        }
    }

    async fn open(&mut self) -> Result<(), BackboneError> {
        if let Some((position, commit)) = self.durable.0.backbone.last(self.log).await? {
            self.position = position;
            self.publish(&Arc::new(RoomSettings::decode(&commit)?));
        }
        Ok(())
    }

    async fn serve(&mut self, closing: &CancellationToken) -> Result<(), BackboneError> {
        let mut wishes = Vec::with_capacity(BATCH);
        loop {
            tokio::select! {
                biased;
                taken = self.queue.recv_many(&mut wishes, BATCH) => if taken == 0 {
                    return Ok(());
                },
                () = closing.cancelled() => return Ok(()),
            }
            let before = self.durable.0.room.said.load_full();
            let mut next = before.clone();
            let mut answers = Vec::new();
            for Wish { change, answer } in wishes.drain(..) {
                // Nobody waits any more, so nobody would learn that it was changed.
                if answer.is_closed() {
                    continue;
                }
                match self.changed(&next, change) {
                    Ok(changed) => {
                        next = Arc::new(changed);
                        answers.push(answer);
                    }
                    Err(fault) => drop(answer.send(Err(fault))),
                }
            }
            let written = if next == before { Ok(()) } else { self.write(&next).await };
            let answer = written.as_ref().map(|()| next).map_err(refusal);
            answers.into_iter().for_each(|it| drop(it.send(answer.clone())));
            match written {
                // Of what did not fit nothing was written, and whoever asked can ask again.
                Ok(()) | Err(BackboneError::Full(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// What the room says after this change, if it may.
    fn changed(&self, room: &RoomSettings, change: Change) -> Result<RoomSettings, Fault> {
        let mut changed = room.clone();
        change(&mut changed)?;
        let exchange = &self.durable.0.exchange;
        let limit = exchange.config().limits.room_bytes;
        let length = changed.encode().len();
        // What makes it smaller is always possible.
        if length > limit.0 && length > room.encode().len() {
            let detail = format!("all settings of the room would have {length} bytes");
            let fault = Fault::new(FaultKind::TooLarge, detail)
                .hint("reset what is not needed: `parlour agents settings` lists it");
            return Err(exchange.metrics().limit_met(limits::room_bytes, Some(limit.0), fault));
        }
        Ok(changed)
    }

    /// Writes what the room says from now on, and lets it be known.
    async fn write(&mut self, next: &Arc<RoomSettings>) -> Result<(), BackboneError> {
        let backbone = self.durable.0.backbone.clone();
        let subscriptions = self.durable.0.room.said().subscriptions.len();
        if next.subscriptions.len() < subscriptions && parlour_core::bug!("unsubscribed_in_memory")
        {
            self.publish(next);
            return Ok(());
        }
        let position = backbone.append(self.log, self.position, next.encode()).await?;
        let before = std::mem::replace(&mut self.position, position);
        self.publish(next);
        self.kept += 1;
        if self.kept > KEPT {
            match backbone.trim(self.log, before).await {
                Ok(()) => self.kept = 1,
                // They go another time.
                Err(BackboneError::Full(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lets it be known, and has those begin that waited for it.
    fn publish(&self, next: &Arc<RoomSettings>) {
        let shared = &self.durable.0;
        let before = shared.room.said.swap(next.clone());
        let all = before.agents.keys().chain(next.agents.keys());
        for agent_type in all {
            let (old, new) = (before.of(agent_type), next.of(agent_type));
            if old == new {
                continue;
            }
            shared.exchange.metrics().paused(agent_type, new.paused);
            for inbox in &*shared.inboxes {
                // A partition whose owner is gone starts nothing.
                let _ = inbox.queue.send(Input::Wake(agent_type.clone()));
            }
        }
    }
}
