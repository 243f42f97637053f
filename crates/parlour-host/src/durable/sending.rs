//! A message as a door was given it, until it is accepted.

use std::sync::Arc;
use std::time::Duration;

use parlour_core::durable::{Accept, Accepted, Message, MessageKind, Timestamp};
use parlour_core::{AgentId, Fault, FaultKind, Header, Payload};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::owner::Input;
use super::{Durable, Failure, Inbox, is_gone};

/// What is to be delivered, to whom and when.
#[derive(Debug)]
pub(crate) struct Sending {
    pub(crate) agent: AgentId,
    pub(crate) header: Header,
    pub(crate) payload: Payload,
    /// Not before so long from now.
    pub(crate) delay: Option<Duration>,
    /// Not before this.
    pub(crate) deliver_at: Option<Timestamp>,
    /// Not after so long from now.
    pub(crate) ttl: Option<Duration>,
    pub(crate) max_attempts: Option<u32>,
}

type Tell<T> = dyn FnOnce(Result<T, Fault>) + Send;

/// Who is told whether something is accepted.
pub(crate) enum Receipt<T> {
    Waiter(oneshot::Sender<Result<T, Fault>>),
    Teller(Teller<T>),
}

/// What is called when it is known, if only that the owner is gone.
pub(crate) struct Teller<T> {
    tell: Option<Box<Tell<T>>>,
    failure: Arc<Failure>,
}

impl<T> Receipt<T> {
    /// Whether nobody waits any more, so that nobody would learn that it was accepted.
    pub(super) fn is_unwanted(&self) -> bool {
        match self {
            Self::Waiter(answer) => answer.is_closed(),
            Self::Teller(_) => false,
        }
    }

    /// Hands something new to the owner whose inbox has room for it, or tells why that cannot be.
    pub(super) fn hand_in(self, entered: Result<(&Inbox, impl FnOnce(Self) -> Input), Fault>) {
        match entered {
            // An owner that is gone drops it.
            Ok((inbox, input)) => drop(inbox.queue.send(input(self))),
            Err(fault) => self.send(Err(fault)),
        }
    }

    pub(super) fn send(self, accepted: Result<T, Fault>) {
        match self {
            Self::Waiter(answer) => drop(answer.send(accepted)),
            Self::Teller(mut teller) => teller.tell(accepted),
        }
    }
}

impl<T> Teller<T> {
    fn tell(&mut self, accepted: Result<T, Fault>) {
        if let Some(tell) = self.tell.take() {
            tell(accepted);
        }
    }
}

impl<T> Drop for Teller<T> {
    fn drop(&mut self) {
        if self.tell.is_some() {
            self.tell(Err(is_gone(&self.failure)));
        }
    }
}

impl Durable {
    /// Takes what is to be delivered. When it returns, the message is as safe as [`ack`](Self::ack) says.
    pub(crate) async fn send(&self, sending: Sending, now: Instant) -> Result<Accepted, Fault> {
        let (answer, answered) = oneshot::channel();
        self.begin_accept(sending, now, Receipt::Waiter(answer));
        self.answer(answered).await?
    }

    /// Takes what is to be delivered, in the order in which it is called. Once the message is as safe as
    /// [`ack`](Self::ack) says, or is refused, `tell` is called, which must not take long.
    pub(crate) fn send_and_tell(
        &self,
        sending: Sending,
        now: Instant,
        tell: impl FnOnce(Result<Accepted, Fault>) + Send + 'static,
    ) {
        self.begin_accept(sending, now, self.teller(tell));
    }

    /// Has `tell` called when it is known.
    pub(super) fn teller<T>(
        &self,
        tell: impl FnOnce(Result<T, Fault>) + Send + 'static,
    ) -> Receipt<T> {
        let failure = self.0.failure.clone();
        Receipt::Teller(Teller { tell: Some(Box::new(tell)), failure })
    }

    /// Hands a message that is to be delivered to the owner of its partition.
    fn begin_accept(&self, sending: Sending, now: Instant, receipt: Receipt<Accepted>) {
        let entered = self.read(sending, now).and_then(|accept| {
            let inbox = self.enter(self.partition_of(&accept.agent), accept.message.weight())?;
            Ok((inbox, |receipt| Input::Accept(Box::new(accept), receipt)))
        });
        receipt.hand_in(entered);
    }

    fn read(&self, sending: Sending, now: Instant) -> Result<Accept, Fault> {
        let Sending { agent, header, payload, delay, deliver_at, ttl, max_attempts } = sending;
        let exchange = &self.0.exchange;
        exchange.admit_message(&header, &payload)?;
        let invalid = |detail| Fault::new(FaultKind::Invalid, detail);
        if max_attempts == Some(0) {
            return Err(invalid("the most attempts are 0, so that it would never be tried")
                .hint("ask for 1 or more, or leave it to the host"));
        }
        if delay.is_some() && deliver_at.is_some() {
            return Err(invalid("a delay and a time of delivery are both given")
                .hint("say when in one way"));
        }
        let time = Timestamp(exchange.unix_time(now).as_millis() as u64);
        let not_before = delay.map(|delay| time.after(delay)).or(deliver_at);
        let expires_at = ttl.map(|ttl| time.after(ttl));
        if let (Some(begins), Some(ends)) = (not_before, expires_at)
            && ends <= begins
        {
            return Err(invalid("the message expires before it may be delivered")
                .hint("give it a longer time to live, or deliver it sooner"));
        }
        let settings = &exchange.config().durable;
        let target = [agent.agent_type.as_str(), agent.key.as_str()];
        let key = key_of(&header, "deliveries", target, &payload);
        let key = key.map(|(key, body)| (key, body, settings.idempotency_window));
        let message = Message { kind: MessageKind::Call, header, payload };
        let max_attempts = max_attempts.unwrap_or(0);
        Ok(Accept { not_before, expires_at, max_attempts, key, ..Accept::new(agent, message) })
    }
}

/// Digests of the idempotency key, with whom and what it is for, and of what is sent under it. They are
/// the same whichever door it comes through.
pub(super) fn key_of(
    header: &Header,
    door: &str,
    target: [&str; 2],
    payload: &Payload,
) -> Option<(u128, u64)> {
    let key = header.idempotency_key.as_ref()?;
    let [kind, name] = target.map(str::as_bytes);
    let principal = header.principal.as_str().as_bytes();
    let name = digest(&[principal, door.as_bytes(), kind, name, key.as_bytes()]);
    let Payload { content_type, data_type, bytes, .. } = payload;
    let body = digest(&[content_type.as_bytes(), data_type.as_bytes(), bytes]);
    Some((name, body as u64))
}

/// 128 bits that tell these texts from any others.
fn digest(texts: &[&[u8]]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    for text in texts {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text);
    }
    let mut digest = [0; 16];
    hasher.finalize_xof().fill(&mut digest);
    u128::from_le_bytes(digest)
}
