use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parlour_core::durable::{DeliveryId, Level};
use parlour_core::wire::{
    AcceptedFrame, CallFrame, DeliveryFrame, Done, Frame, HeaderFields, PublishFrame,
    PublishedFrame, SendFrame, WaitFrame,
};
use parlour_core::{
    AgentId, ByteString, CallId, Event, Fault, FaultKind, Payload, TopicFilter, TopicId,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::{Error, ErrorKind, Later};

/// How many requests may wait to be written.
const QUEUE_MESSAGES: usize = 1024;
/// The longest pause that a host can ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How many bytes may wait to be written.
const QUEUE_BYTES: usize = 8 * 1024 * 1024;

/// The way to a connection's driver. Cheap to clone; the driver ends when the last one is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Handle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    // Needs no bound of its own: what carries a payload holds a permit of `queue`, and of the rest
    // there is at most one for each of those.
    commands: mpsc::UnboundedSender<Command>,
    queue: Arc<Semaphore>,
    ids: Arc<Ids>,
    default_timeout: Duration,
}

/// Numbers for calls, requests and subscriptions. None is used twice, not even by two connections.
#[derive(Debug, Default)]
pub(crate) struct Ids(AtomicU64);

impl Ids {
    /// The next number. Begins with 1: the host answers to 0 when it means the whole connection.
    pub(crate) fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// What a driver is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Send a call, publish or subscription, and hand on what comes back.
    Request { request: Box<Request>, deadline: Instant, waiting: Waiting },
    /// Tell the caller of a call that runs here something before its end.
    Progress { call: CallId, payload: Payload, permit: OwnedSemaphorePermit },
    /// Nobody waits for this one any more.
    Abandon(CallId),
    /// End a subscription.
    Unsubscribe(u64),
    /// Say goodbye and end.
    Close,
}

/// A frame that waits to be written and will be answered.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: CallId,
    pub(crate) frame: Frame,
    /// Its place in the queue, which is free again when the request is written or given up.
    pub(crate) _permit: Option<OwnedSemaphorePermit>,
}

/// Who waits for an answer.
#[derive(Debug)]
pub(crate) enum Waiting {
    Call(Answer<Payload>, Option<mpsc::Sender<Payload>>),
    /// Of a publish, or of a delivery that is given up.
    Confirm(Answer<Done>),
    Send(Answer<AcceptedFrame>),
    Publish(Answer<PublishedFrame>),
    Wait(Answer<DeliveryFrame>),
    Subscribe(LocalSubscription, Answer<Done>),
    /// The driver itself, for a registration, or a subscription that it makes anew.
    Setup(Option<LocalSubscription>),
}

pub(crate) type Answer<T> = oneshot::Sender<Result<T, Error>>;

/// Where the events of a subscription go.
#[derive(Clone, Debug)]
pub(crate) struct LocalSubscription {
    pub(crate) number: u64,
    pub(crate) filter: TopicFilter,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) outcome: Arc<Outcome>,
}

/// What there is to say of a subscription besides its events.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) missed: AtomicU64,
    /// Why it ended by itself.
    pub(crate) error: OnceLock<Error>,
}

impl Handle {
    pub(crate) fn new(
        default_timeout: Duration,
    ) -> (Self, mpsc::UnboundedReceiver<Command>, Arc<Ids>) {
        let (commands, inbox) = mpsc::unbounded_channel();
        let ids = Arc::new(Ids::default());
        let queue = Arc::new(Semaphore::new(QUEUE_BYTES));
        let inner = Inner { commands, queue, ids: Arc::clone(&ids), default_timeout };
        (Self(Arc::new(inner)), inbox, ids)
    }

    pub(crate) fn default_timeout(&self) -> Duration {
        self.0.default_timeout
    }

    /// Makes a call, of which what comes before its end goes to `progress`. Dropping the future gives the
    /// call up, at the host too.
    pub(crate) async fn call(
        &self,
        target: AgentId,
        header: HeaderFields,
        payload: Payload,
        deadline: Instant,
        progress: Option<mpsc::Sender<Payload>>,
    ) -> Result<Payload, Error> {
        let permit = self.place(&payload, deadline).await?;
        let id = CallId(self.0.ids.next());
        // The time left is filled in when the frame is written.
        let frame = Frame::from(CallFrame {
            id,
            target,
            timeout: None,
            progress: progress.is_some(),
            resent: false,
            attempt: None,
            topic: None,
            header,
            payload,
        });
        let request = Request { id, frame, _permit: Some(permit) };
        self.request(request, deadline, |answer| Waiting::Call(answer, progress)).await
    }

    /// Tells the caller of `call` something before its end. Cancel safe: it is told, or it is not.
    pub(crate) async fn progress(
        &self,
        call: CallId,
        payload: Payload,
        deadline: Instant,
    ) -> Result<(), Error> {
        let permit = self.place(&payload, deadline).await?;
        let command = Command::Progress { call, payload, permit };
        self.0.commands.send(command).map_err(|_| Error::closed())
    }

    /// Publishes an event. Dropping the future before the event is written takes it back.
    pub(crate) async fn publish(
        &self,
        topic: TopicId,
        header: HeaderFields,
        payload: Payload,
        deadline: Instant,
    ) -> Result<Done, Error> {
        let permit = self.place(&payload, deadline).await?;
        let id = CallId(self.0.ids.next());
        let publish = PublishFrame { request: Some(id), ack: None, topic, header, payload };
        let frame = Frame::from(publish);
        let request = Request { id, frame, _permit: Some(permit) };
        self.request(request, deadline, Waiting::Confirm).await
    }

    /// Publishes an event that is to be kept. Its header names an idempotency key: when the session is
    /// lost before the answer came, it is published again, and accepted once.
    pub(crate) async fn publish_durably(
        &self,
        topic: TopicId,
        header: HeaderFields,
        payload: Payload,
        deadline: Instant,
    ) -> Result<PublishedFrame, Error> {
        let frame = |id, payload| {
            Frame::from(PublishFrame {
                request: Some(id),
                ack: Some(ByteString::from_static("durable")),
                topic: topic.clone(),
                header: header.clone(),
                payload,
            })
        };
        self.request_until_accepted(payload, deadline, frame, Waiting::Publish).await
    }

    /// Has a message accepted that is delivered later. Its header names an idempotency key: when the
    /// session is lost before the answer came, it is sent again, and accepted once.
    pub(crate) async fn send(
        &self,
        later: Later,
        header: HeaderFields,
        payload: Payload,
        deadline: Instant,
    ) -> Result<AcceptedFrame, Error> {
        let begun = now();
        // Its times count from the first time it was sent.
        let left = |time: Duration| time.saturating_sub(now().duration_since(begun));
        let frame = |request, payload| {
            Frame::from(SendFrame {
                request,
                target: later.agent.clone(),
                delay: later.delay.map(left).filter(|delay| !delay.is_zero()),
                deliver_at: later.deliver_at,
                ttl: later.ttl.map(left),
                max_attempts: later.max_attempts,
                header: header.clone(),
                payload,
            })
        };
        self.request_until_accepted(payload, deadline, frame, Waiting::Send).await
    }

    /// What is known of a delivery, when that is newer or `patience` is over; without, when the host
    /// finds that it was long enough. Asks again when the session is lost. Dropping the future gives the
    /// wait up, at the host too.
    pub(crate) async fn wait(
        &self,
        delivery: DeliveryId,
        generation: u64,
        level: Option<Level>,
        patience: Option<Duration>,
        deadline: Instant,
    ) -> Result<DeliveryFrame, Error> {
        loop {
            let id = CallId(self.0.ids.next());
            let level = level.map(|level| ByteString::from_static(level.name()));
            // Without a patience the time left is filled in when the frame is written.
            let wait = WaitFrame { request: id, delivery, generation, level, timeout: patience };
            let request = Request { id, frame: Frame::from(wait), _permit: None };
            match self.request(request, deadline, Waiting::Wait).await {
                Err(error) => pause(error, true, deadline).await?,
                found => return found,
            }
        }
    }

    /// Gives a delivery up.
    pub(crate) async fn cancel_delivery(
        &self,
        delivery: DeliveryId,
        reason: ByteString,
        deadline: Instant,
    ) -> Result<(), Error> {
        let request = CallId(self.0.ids.next());
        let frame = Frame::CancelDelivery { request, delivery, reason };
        let request = Request { id: request, frame, _permit: None };
        self.request(request, deadline, Waiting::Confirm).await.map(drop)
    }

    /// Subscribes, under the number that `subscription` has.
    pub(crate) async fn subscribe(
        &self,
        subscription: LocalSubscription,
        deadline: Instant,
    ) -> Result<Done, Error> {
        let id = CallId(self.0.ids.next());
        let frame = crate::state::subscribe_frame(id, &subscription);
        let request = Request { id, frame, _permit: None };
        self.request(request, deadline, |answer| Waiting::Subscribe(subscription, answer)).await
    }

    /// A number for a new subscription.
    pub(crate) fn next_number(&self) -> u64 {
        self.0.ids.next()
    }

    pub(crate) fn unsubscribe(&self, number: u64) {
        // A driver that has ended has no subscriptions.
        let _ = self.0.commands.send(Command::Unsubscribe(number));
    }

    /// Ends the driver, and waits until it has said goodbye.
    pub(crate) async fn close(&self) {
        if self.0.commands.send(Command::Close).is_ok() {
            self.0.commands.closed().await;
        }
    }

    /// Waits for a place in the queue: as many bytes of it as the payload has, and at least so many
    /// that no more than [`QUEUE_MESSAGES`] fit in.
    async fn place(
        &self,
        payload: &Payload,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, Error> {
        let bytes = payload.weight().clamp(QUEUE_BYTES / QUEUE_MESSAGES, QUEUE_BYTES) as u32;
        let permit = Arc::clone(&self.0.queue).acquire_many_owned(bytes);
        // What one task asks for at once is sent in that order: tokio wakes those whom it makes pause for
        // the sake of other tasks in the opposite one.
        let permit = tokio::task::unconstrained(permit);
        match tokio::time::timeout_at(deadline.into(), permit).await {
            Ok(permit) => permit.map_err(|_| Error::closed()),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                "the deadline passed before the request could be written",
            )
            .with_hint("allow more time, or send less at once")),
        }
    }

    /// Asks to keep a payload, and again when it was not learned whether it is kept.
    async fn request_until_accepted<T>(
        &self,
        payload: Payload,
        deadline: Instant,
        frame: impl Fn(CallId, Payload) -> Frame,
        waiting: impl Fn(Answer<T>) -> Waiting,
    ) -> Result<T, Error> {
        loop {
            let permit = self.place(&payload, deadline).await?;
            let id = CallId(self.0.ids.next());
            let frame = frame(id, payload.clone());
            let request = Request { id, frame, _permit: Some(permit) };
            match self.request(request, deadline, &waiting).await {
                Err(error) => pause(error, false, deadline).await?,
                accepted => return accepted,
            }
        }
    }

    async fn request<T>(
        &self,
        request: Request,
        deadline: Instant,
        waiting: impl FnOnce(Answer<T>) -> Waiting,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let mut abandon = AbandonOnDrop { handle: self, id: Some(request.id) };
        let command =
            Command::Request { request: Box::new(request), deadline, waiting: waiting(answer) };
        if self.0.commands.send(command).is_err() {
            abandon.id = None;
            return Err(Error::closed());
        }
        let answer = answered.await;
        abandon.id = None;
        // A driver that was closed drops who waits; whether they had been sent is then unknown.
        answer.unwrap_or_else(|_| Err(Error::closed().may_have_run_if(true)))
    }
}

/// The pause after which the same can be asked again, or `error` if it cannot: neither when it would
/// help nothing, nor when the pause is longer than what is left. A host that has `too_much` to do may
/// be asked again, too.
async fn pause(error: Error, too_much: bool, deadline: Instant) -> Result<(), Error> {
    let kind = error.kind();
    // A host that goes away, or asks for patience, says for how long.
    let asks = kind == ErrorKind::Fault(FaultKind::Unavailable)
        || (too_much && kind == ErrorKind::Fault(FaultKind::Overloaded));
    let asked = error.fault().and_then(Fault::retry_after_time).filter(|_| asks);
    let at = match asked {
        Some(pause) => now() + pause.min(LONGEST_PAUSE).mul_f64(1.0 + fastrand::f64()),
        // The driver pauses between connections.
        None if kind == ErrorKind::ConnectionLost => now(),
        None => return Err(error),
    };
    if at >= deadline {
        return Err(error);
    }
    tokio::time::sleep_until(at.into()).await;
    Ok(())
}

/// Tells the driver that a future was dropped before its answer came.
struct AbandonOnDrop<'a> {
    handle: &'a Handle,
    id: Option<CallId>,
}

impl Drop for AbandonOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            // A driver that has ended has forgotten the call already.
            let _ = self.handle.0.commands.send(Command::Abandon(id));
        }
    }
}

/// When `duration` from now is over. One too long for the clock is as good as a year.
pub(crate) fn after(duration: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    now() + duration.min(YEAR)
}

/// The time now by tokio's clock, which tests can stop.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
