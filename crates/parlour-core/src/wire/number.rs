//! The numbers of frames and fields, as `docs/protocol.md` has them.

/// The kinds of frames. Numbers are never given to another kind.
pub(super) mod kind {
    pub(in crate::wire) const HELLO: u8 = 1;
    pub(in crate::wire) const WELCOME: u8 = 2;
    pub(in crate::wire) const REGISTER: u8 = 3;
    pub(in crate::wire) const UNREGISTER: u8 = 4;
    pub(in crate::wire) const SUBSCRIBE: u8 = 5;
    pub(in crate::wire) const UNSUBSCRIBE: u8 = 6;
    pub(in crate::wire) const DONE: u8 = 7;
    pub(in crate::wire) const CALL: u8 = 8;
    pub(in crate::wire) const REPLY: u8 = 9;
    pub(in crate::wire) const FAULT: u8 = 10;
    pub(in crate::wire) const PUBLISH: u8 = 11;
    pub(in crate::wire) const EVENT: u8 = 12;
    pub(in crate::wire) const CANCEL: u8 = 13;
    pub(in crate::wire) const PING: u8 = 14;
    pub(in crate::wire) const PONG: u8 = 15;
    pub(in crate::wire) const DRAIN: u8 = 16;
    pub(in crate::wire) const ACK: u8 = 17;
    pub(in crate::wire) const PROGRESS: u8 = 18;
    pub(in crate::wire) const LEAVE: u8 = 19;
    pub(in crate::wire) const RECEIVED: u8 = 20;
    pub(in crate::wire) const SEND: u8 = 21;
    pub(in crate::wire) const ACCEPTED: u8 = 22;
    pub(in crate::wire) const WAIT: u8 = 23;
    pub(in crate::wire) const DELIVERY: u8 = 24;
    pub(in crate::wire) const CANCEL_DELIVERY: u8 = 25;
    pub(in crate::wire) const STALE: u8 = 26;
}

/// The fields of headers. A number means the same in every frame.
pub(super) mod field {
    pub(in crate::wire) const ID: u64 = 1;
    pub(in crate::wire) const AGENT_TYPE: u64 = 2;
    pub(in crate::wire) const KEY: u64 = 3;
    pub(in crate::wire) const TOPIC_TYPE: u64 = 4;
    pub(in crate::wire) const SOURCE: u64 = 5;
    pub(in crate::wire) const CONTENT_TYPE: u64 = 6;
    pub(in crate::wire) const DATA_TYPE: u64 = 7;
    pub(in crate::wire) const METADATA: u64 = 8;
    pub(in crate::wire) const TIMEOUT_MS: u64 = 9;
    pub(in crate::wire) const MESSAGE_ID: u64 = 10;
    pub(in crate::wire) const CONVERSATION: u64 = 11;
    pub(in crate::wire) const CAUSE: u64 = 12;
    pub(in crate::wire) const SENDER_TYPE: u64 = 13;
    pub(in crate::wire) const SENDER_KEY: u64 = 14;
    pub(in crate::wire) const PRINCIPAL: u64 = 15;
    pub(in crate::wire) const TRACEPARENT: u64 = 16;
    pub(in crate::wire) const HOPS: u64 = 17;
    pub(in crate::wire) const IDEMPOTENCY_KEY: u64 = 18;
    pub(in crate::wire) const FAULT_KIND: u64 = 19;
    pub(in crate::wire) const DETAIL: u64 = 20;
    pub(in crate::wire) const HINT: u64 = 21;
    pub(in crate::wire) const MAY_HAVE_RUN: u64 = 22;
    pub(in crate::wire) const RETRY_AFTER_MS: u64 = 23;
    pub(in crate::wire) const CONFIG_KEY: u64 = 24;
    pub(in crate::wire) const LIMIT: u64 = 25;
    pub(in crate::wire) const EXCLUSIVE: u64 = 26;
    pub(in crate::wire) const CAPABILITY: u64 = 27;
    pub(in crate::wire) const TOPIC_PREFIX: u64 = 28;
    pub(in crate::wire) const SUBSCRIPTION: u64 = 29;
    pub(in crate::wire) const RECIPIENTS: u64 = 30;
    pub(in crate::wire) const DROPPED: u64 = 31;
    pub(in crate::wire) const VERSION: u64 = 32;
    pub(in crate::wire) const FEATURE: u64 = 33;
    pub(in crate::wire) const NAME: u64 = 34;
    pub(in crate::wire) const MAX_PAYLOAD: u64 = 35;
    pub(in crate::wire) const HEARTBEAT_MS: u64 = 36;
    pub(in crate::wire) const CAPACITY: u64 = 37;
    pub(in crate::wire) const RECEIVED: u64 = 38;
    pub(in crate::wire) const SESSION: u64 = 39;
    pub(in crate::wire) const RESUMED: u64 = 40;
    pub(in crate::wire) const GRACE_MS: u64 = 41;
    pub(in crate::wire) const WINDOW_MESSAGES: u64 = 42;
    pub(in crate::wire) const WINDOW_BYTES: u64 = 43;
    pub(in crate::wire) const RESENT: u64 = 44;
    pub(in crate::wire) const PROGRESS: u64 = 45;
    pub(in crate::wire) const DELIVERY: u64 = 46;
    pub(in crate::wire) const ATTEMPT: u64 = 47;
    pub(in crate::wire) const DELAY_MS: u64 = 48;
    pub(in crate::wire) const DELIVER_AT: u64 = 49;
    pub(in crate::wire) const TTL_MS: u64 = 50;
    pub(in crate::wire) const MAX_ATTEMPTS: u64 = 51;
    pub(in crate::wire) const ACK: u64 = 52;
    pub(in crate::wire) const GENERATION: u64 = 53;
    pub(in crate::wire) const KNOWN: u64 = 54;
    pub(in crate::wire) const STATE: u64 = 55;
    pub(in crate::wire) const LEVEL: u64 = 56;
    pub(in crate::wire) const DETAILS: u64 = 57;
    /// Within a metadata entry.
    pub(in crate::wire) const ENTRY_NAME: u64 = 1;
    pub(in crate::wire) const ENTRY_VALUE: u64 = 2;
}

/// What the value of a field is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum FieldType {
    /// A number.
    Number,
    /// 0 or 1.
    Flag,
    /// A text.
    Text,
    /// An entry of metadata.
    Entry,
}

/// The numbers and names of all kinds of frames.
pub static KINDS: &[(u8, &str)] = &[
    (kind::HELLO, "hello"),
    (kind::WELCOME, "welcome"),
    (kind::REGISTER, "register"),
    (kind::UNREGISTER, "unregister"),
    (kind::SUBSCRIBE, "subscribe"),
    (kind::UNSUBSCRIBE, "unsubscribe"),
    (kind::DONE, "done"),
    (kind::CALL, "call"),
    (kind::REPLY, "reply"),
    (kind::FAULT, "fault"),
    (kind::PUBLISH, "publish"),
    (kind::EVENT, "event"),
    (kind::CANCEL, "cancel"),
    (kind::PING, "ping"),
    (kind::PONG, "pong"),
    (kind::DRAIN, "drain"),
    (kind::ACK, "ack"),
    (kind::PROGRESS, "progress"),
    (kind::LEAVE, "leave"),
    (kind::RECEIVED, "received"),
    (kind::SEND, "send"),
    (kind::ACCEPTED, "accepted"),
    (kind::WAIT, "wait"),
    (kind::DELIVERY, "delivery"),
    (kind::CANCEL_DELIVERY, "cancel_delivery"),
    (kind::STALE, "stale"),
];

/// What a sentence calls a kind of frame.
pub(super) fn kind_name(number: u8) -> String {
    match KINDS.iter().find(|(known, _)| *known == number) {
        Some((_, name)) => name.to_uppercase(),
        None => format!("kind {number}"),
    }
}

/// What a sentence calls a field.
pub(super) fn field_name(number: u64) -> String {
    match FIELDS.iter().find(|(known, ..)| *known == number) {
        Some((_, name, _)) => format!("`{name}` (field {number})"),
        None => format!("field {number}"),
    }
}

/// The numbers, names and types of all fields.
pub static FIELDS: &[(u64, &str, FieldType)] = &[
    (field::ID, "id", FieldType::Number),
    (field::AGENT_TYPE, "agent_type", FieldType::Text),
    (field::KEY, "key", FieldType::Text),
    (field::TOPIC_TYPE, "topic_type", FieldType::Text),
    (field::SOURCE, "source", FieldType::Text),
    (field::CONTENT_TYPE, "content_type", FieldType::Text),
    (field::DATA_TYPE, "data_type", FieldType::Text),
    (field::METADATA, "metadata", FieldType::Entry),
    (field::TIMEOUT_MS, "timeout_ms", FieldType::Number),
    (field::MESSAGE_ID, "message_id", FieldType::Text),
    (field::CONVERSATION, "conversation", FieldType::Text),
    (field::CAUSE, "cause", FieldType::Text),
    (field::SENDER_TYPE, "sender_type", FieldType::Text),
    (field::SENDER_KEY, "sender_key", FieldType::Text),
    (field::PRINCIPAL, "principal", FieldType::Text),
    (field::TRACEPARENT, "traceparent", FieldType::Text),
    (field::HOPS, "hops", FieldType::Number),
    (field::IDEMPOTENCY_KEY, "idempotency_key", FieldType::Text),
    (field::FAULT_KIND, "fault_kind", FieldType::Text),
    (field::DETAIL, "detail", FieldType::Text),
    (field::HINT, "hint", FieldType::Text),
    (field::MAY_HAVE_RUN, "may_have_run", FieldType::Flag),
    (field::RETRY_AFTER_MS, "retry_after_ms", FieldType::Number),
    (field::CONFIG_KEY, "config_key", FieldType::Text),
    (field::LIMIT, "limit", FieldType::Number),
    (field::EXCLUSIVE, "exclusive", FieldType::Flag),
    (field::CAPABILITY, "capability", FieldType::Text),
    (field::TOPIC_PREFIX, "topic_prefix", FieldType::Text),
    (field::SUBSCRIPTION, "subscription", FieldType::Number),
    (field::RECIPIENTS, "recipients", FieldType::Number),
    (field::DROPPED, "dropped", FieldType::Text),
    (field::VERSION, "version", FieldType::Number),
    (field::FEATURE, "feature", FieldType::Text),
    (field::NAME, "name", FieldType::Text),
    (field::MAX_PAYLOAD, "max_payload", FieldType::Number),
    (field::HEARTBEAT_MS, "heartbeat_ms", FieldType::Number),
    (field::CAPACITY, "capacity", FieldType::Number),
    (field::RECEIVED, "received", FieldType::Number),
    (field::SESSION, "session", FieldType::Text),
    (field::RESUMED, "resumed", FieldType::Flag),
    (field::GRACE_MS, "grace_ms", FieldType::Number),
    (field::WINDOW_MESSAGES, "window_messages", FieldType::Number),
    (field::WINDOW_BYTES, "window_bytes", FieldType::Number),
    (field::RESENT, "resent", FieldType::Flag),
    (field::PROGRESS, "progress", FieldType::Flag),
    (field::DELIVERY, "delivery", FieldType::Text),
    (field::ATTEMPT, "attempt", FieldType::Number),
    (field::DELAY_MS, "delay_ms", FieldType::Number),
    (field::DELIVER_AT, "deliver_at", FieldType::Number),
    (field::TTL_MS, "ttl_ms", FieldType::Number),
    (field::MAX_ATTEMPTS, "max_attempts", FieldType::Number),
    (field::ACK, "ack", FieldType::Text),
    (field::GENERATION, "generation", FieldType::Number),
    (field::KNOWN, "known", FieldType::Flag),
    (field::STATE, "state", FieldType::Text),
    (field::LEVEL, "level", FieldType::Text),
    (field::DETAILS, "details", FieldType::Text),
];
