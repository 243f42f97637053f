//! What a host counts, and how `/metrics` writes it.

use std::sync::atomic::AtomicI64;

use parlour_core::{AgentType, Fault, FaultKind};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::Config;

/// All counters and gauges of one host.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) calls_in_flight: Gauge<i64, AtomicI64>,
    calls_ok: Counter,
    calls_faulted: Vec<(FaultKind, Counter)>,
    /// Of those, and of events.
    pub(crate) moving: Gauge<i64, AtomicI64>,
    pub(crate) events: Counter,
    pub(crate) events_delivered: Counter,
    pub(crate) events_dropped: Counter,
    pub(crate) connections: Gauge<i64, AtomicI64>,
    pub(crate) channels: Gauge<i64, AtomicI64>,
    pub(crate) channels_opened: Counter,
    pub(crate) stalled_writes: Counter,
    pub(crate) missed_heartbeats: Counter,
    pub(crate) sessions_resumed: Counter,
    pub(crate) replies_unasked: Counter,
    pub(crate) senders_refused: Counter,
    limit_hits: Family<Key, Counter>,
    paused: Family<OfType, Gauge>,
    pub(crate) deliveries: Deliveries,
}

/// Where all deliveries are: `accepted = completed + cancelled + expired + discarded + dead + waiting +
/// in_flight`, at every moment and after every restart.
#[derive(Debug)]
pub(crate) struct Deliveries {
    pub(crate) accepted: Counter,
    pub(crate) completed: Counter,
    pub(crate) cancelled: Counter,
    pub(crate) expired: Counter,
    pub(crate) discarded: Counter,
    pub(crate) waiting: Gauge<i64, AtomicI64>,
    pub(crate) in_flight: Gauge<i64, AtomicI64>,
    pub(crate) dead: Gauge<i64, AtomicI64>,
    /// Not accepted yet, but owed by the log of a topic.
    pub(crate) owed: Gauge<i64, AtomicI64>,
    pub(crate) events: Counter,
    /// Idempotency keys that are remembered.
    pub(crate) keys: Gauge<i64, AtomicI64>,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct Key {
    key: String,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq, EncodeLabelSet)]
struct OfType {
    agent_type: String,
}

impl Metrics {
    pub(crate) fn new(config: &Config) -> Self {
        let mut registry = Registry::with_prefix("parlour");
        let calls = Family::<Outcome, Counter>::default();
        registry.register("calls", "Calls that ended, by outcome", calls.clone());
        let outcome = |outcome| calls.get_or_create_owned(&Outcome { outcome });
        let limits = Family::<Key, Gauge>::default();
        registry.register("limit", "Configured limits, in messages or bytes", limits.clone());
        for (key, value) in config.limits() {
            limits.get_or_create(&Key { key: key.into() }).set(value as i64);
        }
        let limit_hits = Family::<Key, Counter>::default();
        registry.register("limit_hits", "Times a limit was met", limit_hits.clone());

        let paused = Family::<OfType, Gauge>::default();
        registry.register("agent_paused", "Agent types that are paused", paused.clone());

        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let events = counter("events", "Events published");
        let events_delivered = counter("events_delivered", "Events handed to a connection");
        let events_dropped = counter("events_dropped", "Events a recipient did not get");
        let channels_opened = counter("channels_opened", "Channels opened");
        let stalled_writes = counter("stalled_writes", "Peers cut because they took no byte");
        let missed_heartbeats = counter("missed_heartbeats", "Peers cut because they were silent");
        let sessions_resumed =
            counter("sessions_resumed", "Sessions that went on over another socket");
        let replies_unasked = counter("replies_unasked", "Replies to calls not in flight");
        let accepted =
            counter("deliveries_accepted", "Durable messages accepted, one per recipient");
        let completed = counter("deliveries_completed", "Deliveries that were answered");
        let cancelled = counter("deliveries_cancelled", "Deliveries that somebody gave up");
        let expired = counter("deliveries_expired", "Deliveries whose time was over");
        let durable_events = counter("durable_events", "Durable events published");
        let discarded = counter("deliveries_discarded", "Dead deliveries that somebody gave up");
        let senders_refused = counter("senders_refused", "Senders that were not passed on");
        let mut gauge = |name: &str, help: &str| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let deliveries = Deliveries {
            accepted,
            completed,
            cancelled,
            expired,
            discarded,
            waiting: gauge("deliveries_waiting", "Deliveries that wait for an attempt"),
            in_flight: gauge("deliveries_in_flight", "Deliveries with an attempt under way"),
            dead: gauge("deliveries_dead", "Deliveries that failed for good"),
            owed: gauge(
                "deliveries_owed",
                "Deliveries of durable events, before they are accepted",
            ),
            events: durable_events,
            keys: gauge("idempotency_keys", "Idempotency keys that are remembered"),
        };
        Self {
            deliveries,
            calls_in_flight: gauge("calls_in_flight", "Calls that have not ended"),
            moving: gauge("moving", "Messages that wait for their agent to move"),
            connections: gauge("connections", "Open connections"),
            channels: gauge("channels", "Open channels"),
            calls_ok: outcome("ok"),
            calls_faulted: FaultKind::ALL.iter().map(|&k| (k, outcome(k.name()))).collect(),
            events,
            events_delivered,
            events_dropped,
            channels_opened,
            stalled_writes,
            missed_heartbeats,
            sessions_resumed,
            replies_unasked,
            senders_refused,
            limit_hits,
            paused,
            registry,
        }
    }

    /// Counts the end of a call.
    pub(crate) fn call_ended(&self, fault: Option<FaultKind>) {
        let counter = match fault {
            None => Some(&self.calls_ok),
            Some(kind) => self.calls_faulted.iter().find(|(k, _)| *k == kind).map(|(_, c)| c),
        };
        if let Some(counter) = counter {
            counter.inc();
        }
    }

    /// Completes the fault of whoever met the limit of this key, and counts that it was met.
    pub(crate) fn limit_met(&self, key: &'static str, max: Option<usize>, fault: Fault) -> Fault {
        self.limit_hit(key);
        fault.limit(key, max.map(|max| max as u64))
    }

    /// Counts that the limit of this key was met, where nobody is told by a fault.
    pub(crate) fn limit_hit(&self, key: &str) {
        self.limit_hits.get_or_create(&Key { key: key.into() }).inc();
    }

    /// Tells whether an agent type is paused.
    pub(crate) fn paused(&self, agent_type: &AgentType, is_paused: bool) {
        let of_type = OfType { agent_type: agent_type.to_string() };
        if is_paused {
            self.paused.get_or_create(&of_type).set(1);
        } else {
            self.paused.remove(&of_type);
        }
    }

    /// All of them in the text format of Prometheus (OpenMetrics 1.0).
    pub(crate) fn render(&self) -> String {
        let mut out = String::new();
        // Writing into a string cannot fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}
