//! Every setting of a host: its key, its default and what it is for, said once.

use std::fmt;
use std::time::Duration;

use thiserror::Error;

/// A setting as documentation and tools see it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Setting {
    /// The dotted key, such as `limits.payload_bytes`.
    pub key: &'static str,
    /// The default, as it would be written.
    pub default: &'static str,
    /// The least and the greatest value, if it is a number.
    pub range: Option<(&'static str, &'static str)>,
    /// What it is for.
    pub doc: &'static str,
}

/// Why a setting is refused.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[non_exhaustive]
pub enum ConfigError {
    /// There is no such key.
    #[error("there is no setting `{key}`")]
    UnknownKey {
        /// The key as given.
        key: String,
        /// The key that was probably meant.
        suggestion: Option<&'static str>,
    },
    /// The value does not fit.
    #[error("`{value}` is not a value of `{key}`: expected {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What a value looks like, and between which it lies.
        expected: String,
    },
}

/// A value that a setting can have.
trait Value: PartialOrd + Sized {
    const EXPECTED: &'static str;
    fn read(text: &str) -> Option<Self>;
    fn write(&self) -> String;
    /// The value as a plain number, if it is one.
    fn number(&self) -> Option<u64> {
        None
    }
}

/// Defines [`Config`] and [`Config::SETTINGS`] from one table.
macro_rules! settings {
    ($($section:ident {
        $($name:ident: $type:ty = $default:literal $(in $least:literal to $most:literal)?,
          $doc:literal;)*
    })*) => {
        /// The settings of a host, all with defaults.
        #[derive(Clone, Debug)]
        #[expect(clippy::exhaustive_structs, reason = "made by `default` and changed by `set`")]
        pub struct Config {
            $(#[doc = concat!("Settings under `", stringify!($section), "`.")]
              pub $section: $section::Section,)*
        }

        $(
            #[doc = concat!("Settings under `", stringify!($section), "`.")]
            pub mod $section {
                #[expect(unused_imports, reason = "not every section uses every type")]
                use super::{Bytes, Duration, List};

                /// The values.
                #[derive(Clone, Debug)]
                #[non_exhaustive]
                pub struct Section { $(#[doc = $doc] pub $name: $type,)* }

                $(#[doc = concat!("The key of `", stringify!($name), "`.")]
                  #[allow(non_upper_case_globals, reason = "the name of the field it is the key of")]
                  pub(crate) const $name: &str =
                    concat!(stringify!($section), ".", stringify!($name));)*
            }
        )*

        impl Config {
            /// Every setting.
            pub const SETTINGS: &[Setting] = &[$($(Setting {
                key: concat!(stringify!($section), ".", stringify!($name)),
                default: $default,
                range: settings!(@range $($least $most)?),
                doc: $doc,
            },)*)*];

            /// Changes the setting of this key.
            pub fn set(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
                $($(if key == $section::$name {
                    let range = settings!(@range $($least $most)?);
                    self.$section.$name = read($section::$name, value, range)?;
                    return Ok(());
                })*)*
                Err(ConfigError::UnknownKey { key: key.into(), suggestion: suggestion(key) })
            }

            /// Every limit as a plain number: messages, or bytes.
            pub(crate) fn limits(&self) -> impl Iterator<Item = (&'static str, u64)> {
                let all = [$($(($section::$name, self.$section.$name.number()),)*)*];
                let all = all.into_iter().filter_map(|(key, number)| Some((key, number?)));
                all.filter(|(key, _)| key.starts_with("limits.") || LIMITS.contains(key))
            }

            /// The value of the setting of this key, as it would be written.
            pub fn value(&self, key: &str) -> Option<String> {
                $($(if key == $section::$name {
                    return Some(self.$section.$name.write());
                })*)*
                None
            }
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $($section: $section::Section {
                    $($name: read($section::$name, $default, None)
                        .expect("a test reads every default"),)*
                },)* }
            }
        }
    };
    (@range) => { None };
    (@range $least:literal $most:literal) => { Some(($least, $most)) };
}

/// The limits that stand in other sections.
const LIMITS: [&str; 4] = [
    durable::unsettled,
    durable::dead_letters,
    durable::dead_letter_bytes,
    durable::idempotency_keys,
];

settings! {
    server {
        listen: String = "127.0.0.1:9000",
            "Address and port of all doors. Port 0 takes a free one.";
        name: String = "parlour",
            "What the host calls itself, for people.";
        data: String = "",
            "Directory of what is kept on disk. Empty: parlour under $XDG_DATA_HOME.";
        threads: usize = "0" in "0" to "1024",
            "Threads that serve connections; 0 is one per core.";
        log: String = "warn",
            "What is logged on stderr: error, warn, info, debug, trace, or a filter per module.";
        token_file: String = "",
            "File with the one bearer token that clients must show. Empty: none is asked for.";
        allowed_hosts: List = "",
            "Host names, beside loopback and the listen address, that requests may name.";
        allowed_origins: List = "",
            "Web origins, such as `https://app.example.com`, whose pages may talk to the host.";
        drain_timeout: Duration = "25s" in "1ms" to "24h",
            "How long calls in flight may take to end after SIGTERM.";
    }
    calls {
        default_timeout: Duration = "30s" in "1ms" to "8760h",
            "The deadline of a call that states none.";
        max_timeout: Duration = "10m" in "1ms" to "8760h",
            "The longest deadline a call may ask for; a longer one is shortened to it.";
    }
    durable {
        partitions: usize = "16" in "1" to "1024",
            "Into how many logs the agents of a room are divided. It cannot change once there is data.";
        max_attempts: usize = "5" in "1" to "1000000",
            "Attempts of a delivery that may fail; after the last it is a dead letter.";
        max_lost: usize = "10" in "1" to "1000000",
            "Attempts of a delivery that may be lost with their worker or host.";
        backoff_base: Duration = "200ms" in "1ms" to "24h",
            "The longest wait before the second attempt. It doubles with each further one.";
        backoff_cap: Duration = "1m" in "1ms" to "8760h",
            "The longest wait between two attempts.";
        attempt_timeout: Duration = "1h" in "1ms" to "8760h",
            "How long one attempt may take.";
        longest_wait: Duration = "1m" in "1ms" to "24h",
            "How long a request may wait for a step of a delivery; then it is answered as things are.";
        unsettled: usize = "4000000" in "1" to "1000000000",
            "Deliveries to agents of one type that may wait or be in flight.";
        dead_letters: usize = "10000" in "1" to "1000000000",
            "Dead letters of one agent type; with more, nothing new is accepted for it.";
        dead_letter_bytes: Bytes = "256MiB" in "1" to "1PiB",
            "Bytes of the dead letters of one agent type.";
        idempotency_keys: usize = "4000000" in "1" to "1000000000",
            "Idempotency keys that are remembered at once.";
        owed: usize = "100000" in "1" to "10000000",
            "Deliveries of durable events that one log may owe to others that have not accepted them.";
        subscriptions: usize = "1000" in "0" to "100000",
            "Durable subscriptions of the room.";
        idempotency_window: Duration = "24h" in "1s" to "8760h",
            "For how long an idempotency key is remembered.";
        worker_in_flight: usize = "512" in "1" to "10000000",
            "Attempts that one worker has at once.";
        type_in_flight: usize = "4096" in "1" to "10000000",
            "Attempts that the workers of one agent type have at once.";
        retention_age: Duration = "168h" in "1s" to "876000h",
            "For how long what has ended is kept.";
        retention_bytes: Bytes = "1GiB" in "1MiB" to "1PiB",
            "How much of the logs is kept, beyond what has not ended.";
        memory_bytes: Bytes = "64MiB" in "0" to "1GiB",
            "Bytes of waiting messages that are kept in memory; the rest is read when its turn comes.";
    }
    limits {
        payload_bytes: Bytes = "1MiB" in "1" to "256MiB",
            "The largest payload of a message. A channel's frame may have 64 KiB more.";
        json_body_bytes: Bytes = "1MiB" in "1" to "1GiB",
            "The largest body of a JSON-RPC request.";
        json_depth: usize = "64" in "1" to "127",
            "How deep JSON may nest.";
        batch: usize = "50" in "1" to "100000",
            "Requests in one JSON-RPC batch.";
        headers: usize = "64" in "1" to "4096",
            "Header fields of a request.";
        header_bytes: Bytes = "16KiB" in "1KiB" to "16MiB",
            "Bytes of a request's line and header fields.";
        http2_streams: usize = "100" in "1" to "1000000",
            "Requests at once on one HTTP/2 connection.";
        body_bytes_per_second: Bytes = "1KiB" in "0" to "1GiB",
            "The slowest a body may come, once it has come for as long as timeouts.body_stall.";
        connections: usize = "16000" in "1" to "10000000",
            "Connections at once, and sessions beside them that wait for another socket.";
        worker_in_flight: usize = "1024" in "1" to "10000000",
            "Calls that one worker may have at once; further ones are answered `overloaded`.";
        caller_in_flight: usize = "4096" in "1" to "10000000",
            "Calls and durable messages that one channel may have made and not yet heard of.";
        caller_waits: usize = "4096" in "1" to "10000000",
            "Deliveries that one channel may wait for at once.";
        queue_messages: usize = "4096" in "1" to "10000000",
            "Messages that may wait for one connection, or for agents to move to another worker.";
        queue_bytes: Bytes = "8MiB" in "1KiB" to "1GiB",
            "Bytes of messages that may wait for one connection, or for agents to move.";
        subscriptions: usize = "1000" in "0" to "10000000",
            "Subscriptions that one connection may have for one agent type, or for itself.";
        registrations: usize = "1000" in "0" to "10000000",
            "Agent types, and single agents, that one connection may serve.";
        fan_out: usize = "10000" in "0" to "10000000",
            "Connections that one event may go to.";
        room_bytes: Bytes = "256KiB" in "4KiB" to "8MiB",
            "Bytes of all that the room keeps of agent types and beside its messages, such as pauses.";
        hops: usize = "16" in "0" to "255",
            "Messages that may follow from one another.";
    }
    timeouts {
        first_byte: Duration = "10s" in "1ms" to "24h",
            "From the opening of a connection until its protocol is known.";
        headers: Duration = "5s" in "1ms" to "24h",
            "From the first byte of a request until the end of its headers.";
        body_stall: Duration = "10s" in "1ms" to "24h",
            "Between two pieces of a body.";
        idle: Duration = "30s" in "1ms" to "24h",
            "Between two requests on one connection.";
        stalled_write: Duration = "10s" in "1ms" to "24h",
            "Without a byte, or a message, taken by a peer that has output waiting; then it is cut.";
        handshake: Duration = "10s" in "1ms" to "24h",
            "From the opening of a `parlour.v1` channel until its first frame.";
        attach: Duration = "1m" in "1ms" to "24h",
            "From the registration of a 0.1.0 worker until it opens its socket.";
        heartbeat: Duration = "15s" in "1ms" to "24h",
            "Between two pings of a channel; silent for twice as long, and the peer is dead.";
        grace: Duration = "5s" in "1ms" to "24h",
            "For how long a `parlour.v1` session waits for another socket when one breaks.";
    }
}

/// A number of bytes, written `1048576`, `16KiB` or `1MiB`.
pub type Bytes = ByteCount;

/// A number of bytes.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[expect(clippy::exhaustive_structs, reason = "a number with a unit")]
pub struct ByteCount(pub usize);

/// Texts separated by commas.
pub type List = Vec<String>;

impl Value for String {
    const EXPECTED: &'static str = "a text";

    fn read(text: &str) -> Option<Self> {
        Some(text.into())
    }

    fn write(&self) -> String {
        self.clone()
    }
}

impl Value for usize {
    const EXPECTED: &'static str = "a whole number";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn write(&self) -> String {
        self.to_string()
    }

    fn number(&self) -> Option<u64> {
        Some(*self as u64)
    }
}

impl Value for List {
    const EXPECTED: &'static str = "texts separated by commas";

    fn read(text: &str) -> Option<Self> {
        Some(text.split(',').map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()).collect())
    }

    fn write(&self) -> String {
        self.join(",")
    }
}

const BYTE_UNITS: [(&str, usize); 6] = [
    ("PiB", 1 << 50),
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

impl Value for ByteCount {
    const EXPECTED: &'static str = "a number of bytes such as 65536, 64KiB or 1MiB";

    fn read(text: &str) -> Option<Self> {
        let (number, unit) = split_unit(text);
        let (_, factor) = BYTE_UNITS.into_iter().find(|(name, _)| {
            name.eq_ignore_ascii_case(unit) || (unit.is_empty() && *name == "B")
        })?;
        number.parse::<usize>().ok()?.checked_mul(factor).map(Self)
    }

    fn write(&self) -> String {
        self.to_string()
    }

    fn number(&self) -> Option<u64> {
        Some(self.0 as u64)
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_whole =
            |&(_, factor): &(&str, usize)| self.0 >= factor && self.0.is_multiple_of(factor);
        match BYTE_UNITS.into_iter().find(is_whole) {
            Some((_, 1)) | None => write!(f, "{}", self.0),
            Some((unit, factor)) => write!(f, "{}{unit}", self.0 / factor),
        }
    }
}

/// Reads a time as settings write it, such as `500ms`, `30s` or `10m`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    Duration::read(text)
}

/// Writes a time as settings do.
pub(crate) fn written(time: Duration) -> String {
    time.write()
}

const TIME_UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

impl Value for Duration {
    const EXPECTED: &'static str = "a time such as 500ms, 30s or 10m";

    fn read(text: &str) -> Option<Self> {
        let (number, unit) = split_unit(text);
        let (_, factor) = TIME_UNITS.into_iter().find(|(name, _)| *name == unit)?;
        let millis = number.parse::<u64>().ok()?.checked_mul(factor)?;
        (millis > 0).then_some(Self::from_millis(millis))
    }

    fn write(&self) -> String {
        let millis = self.as_millis() as u64;
        let is_whole =
            |&(_, factor): &(&str, u64)| millis >= factor && millis.is_multiple_of(factor);
        let (unit, factor) = TIME_UNITS.into_iter().find(is_whole).unwrap_or(("ms", 1));
        format!("{}{unit}", millis / factor)
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

fn read<T: Value>(
    key: &'static str,
    value: &str,
    range: Option<(&str, &str)>,
) -> Result<T, ConfigError> {
    let bounds = range.and_then(|(least, most)| Some(T::read(least)?..=T::read(most)?));
    let is_in = |value: &T| bounds.as_ref().is_none_or(|bounds| bounds.contains(value));
    T::read(value).filter(is_in).ok_or_else(|| ConfigError::Value {
        key,
        value: value.into(),
        expected: match range {
            Some((least, most)) => format!("{}, from {least} to {most}", T::EXPECTED),
            None => T::EXPECTED.into(),
        },
    })
}

fn suggestion(key: &str) -> Option<&'static str> {
    let last = |key: &'static str| key.rsplit('.').next().unwrap_or(key);
    let distance = |setting: &Setting| {
        strsim::damerau_levenshtein(key, setting.key)
            .min(strsim::damerau_levenshtein(key, last(setting.key)) + 1)
    };
    let nearest = Config::SETTINGS.iter().min_by_key(|setting| distance(setting))?;
    (distance(nearest) <= 1 + key.len() / 3).then_some(nearest.key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_reads_and_writes_back() {
        let config = Config::default();
        for setting in Config::SETTINGS {
            assert_eq!(config.value(setting.key).as_deref(), Some(setting.default));
            Config::default().set(setting.key, setting.default).unwrap();
        }
    }

    #[test]
    fn every_number_has_a_range_and_is_told_when_it_is_outside() {
        let no_range = |setting: &&Setting| {
            let value = setting.default;
            setting.range.is_none() && value.starts_with(|c: char| c.is_ascii_digit())
        };
        let without: Vec<_> = Config::SETTINGS.iter().filter(no_range).map(|it| it.key).collect();
        assert_eq!(without, ["server.listen"]);
        for (setting, (least, most)) in
            Config::SETTINGS.iter().filter_map(|setting| Some((setting, setting.range?)))
        {
            let mut config = Config::default();
            config.set(setting.key, least).unwrap();
            config.set(setting.key, most).unwrap();
            let beyond = format!("9{most}");
            let error = config.set(setting.key, &beyond).unwrap_err().to_string();
            assert!(error.ends_with(&format!(", from {least} to {most}")), "{error}");
        }
    }

    #[test]
    fn what_would_wrap_panic_or_refuse_everything_is_no_value() {
        let mut config = Config::default();
        for (key, value) in [
            ("limits.http2_streams", "4294967296"),
            ("limits.connections", "18446744073709551615"),
            ("limits.queue_bytes", "9223372036854775808"),
            ("limits.payload_bytes", "18446744073709551615"),
            ("limits.queue_messages", "0"),
            ("timeouts.grace", "0s"),
        ] {
            assert!(config.set(key, value).is_err(), "{key} = {value}");
        }
    }

    #[test]
    fn a_wrong_key_is_told_which_was_meant() {
        let mut config = Config::default();
        let meant = |error| match error {
            ConfigError::UnknownKey { suggestion, .. } => suggestion,
            other => panic!("{other}"),
        };
        let error = config.set("limits.payload_byte", "1").unwrap_err();
        assert_eq!(meant(error), Some("limits.payload_bytes"));
        assert_eq!(meant(config.set("heartbeet", "1s").unwrap_err()), Some("timeouts.heartbeat"));
        assert_eq!(meant(config.set("colour", "red").unwrap_err()), None);
    }

    #[test]
    fn a_wrong_value_is_told_what_one_looks_like() {
        let mut config = Config::default();
        for (key, value) in [
            ("calls.default_timeout", "30"),
            ("limits.payload_bytes", "1 parsec"),
            ("timeouts.heartbeat", "0s"),
            ("limits.batch", "-1"),
            ("limits.queue_bytes", "99999999999GiB"),
        ] {
            let error = config.set(key, value).unwrap_err();
            assert!(matches!(error, ConfigError::Value { .. }), "{error}");
        }
        config.set("limits.payload_bytes", "64 kib").unwrap();
        assert_eq!(config.limits.payload_bytes, ByteCount(65536));
    }
}
