//! What durable things are named by.

use std::fmt;
use std::time::Duration;

use crate::directory::fnv1a;
use crate::{AgentId, InvalidName, TopicType};

/// A time of day in milliseconds since the Unix epoch, as the clock of the host tells it. It never
/// goes back within one log.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(clippy::exhaustive_structs, reason = "a number with a unit")]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// This much later; at the end of time at the latest.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(wait.as_millis().try_into().unwrap_or(u64::MAX)))
    }

    /// How long it is from `earlier` until this; zero if that is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// A part of the room whose durable messages are in one log. The hash of an agent's name chooses it.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(clippy::exhaustive_structs, reason = "a number with a name")]
pub struct PartitionId(pub u16);

impl PartitionId {
    /// The log beside so many partitions that is the room's own, and of no agent.
    pub fn of_room(partitions: u16) -> Self {
        Self(partitions)
    }

    /// Which of so many keeps the messages for `agent`: the same for good, as the logs rely on it.
    pub fn of(agent: &AgentId, partitions: u16) -> Self {
        let name = agent.agent_type.as_str().bytes().chain([b'/']);
        let hash = fnv1a(name.chain(agent.key.as_str().bytes()));
        Self::at(hash, partitions)
    }

    /// Which of so many keeps the events of a topic type, of whatever source.
    pub fn of_topic(topic_type: &TopicType, partitions: u16) -> Self {
        Self::at(fnv1a(topic_type.as_str().bytes()), partitions)
    }

    fn at(hash: u64, partitions: u16) -> Self {
        // Mixes the high bits into the low ones.
        Self(((hash ^ hash >> 32) % u64::from(partitions)) as u16)
    }
}

impl fmt::Display for PartitionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The place of a commit in its log. The first is 1.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(clippy::exhaustive_structs, reason = "a number with a name")]
pub struct Position(pub u64);

impl Position {
    /// The place behind this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Names a delivery for good. Written `partition-epoch-number`, such as `3-9f2c11aa-512`.
///
/// ```
/// # use parlour_core::durable::DeliveryId;
/// let id = DeliveryId::parse("3-9f2c11aa-512")?;
/// assert_eq!((id.partition.0, id.number), (3, 512));
/// assert_eq!(id.to_string(), "3-9f2c11aa-512");
/// # Ok::<(), parlour_core::InvalidName>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(clippy::exhaustive_structs, reason = "a delivery is named by these for good")]
pub struct DeliveryId {
    /// The partition of its agent.
    pub partition: PartitionId,
    /// Drawn at random by each owner of the partition, so that a log which was restored from a backup
    /// names nothing twice.
    pub epoch: u32,
    /// Counts the deliveries that the partition accepted.
    pub number: u64,
}

impl DeliveryId {
    /// Parses the text that `Display` writes.
    pub fn parse(id: &str) -> Result<Self, InvalidName> {
        let parts = || {
            let mut parts = id.split('-');
            let (partition, epoch, number) = (parts.next()?, parts.next()?, parts.next()?);
            let parsed = Self {
                partition: PartitionId(partition.parse().ok()?),
                epoch: u32::from_str_radix(epoch, 16).ok()?,
                number: number.parse().ok()?,
            };
            // Each delivery has one name: no signs, no further zeros.
            (parts.next().is_none() && parsed.to_string() == id).then_some(parsed)
        };
        parts().ok_or_else(|| {
            InvalidName::new("delivery id", id, "what the answer to its acceptance named it")
        })
    }
}

impl fmt::Display for DeliveryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // By hand, from its end, as each delivery's is written several times.
        let mut text = [b'-'; MOST];
        let mut at = decimal(self.number, &mut text) - 1;
        for shift in (0..32).step_by(4) {
            at -= 1;
            text[at] = b"0123456789abcdef"[(self.epoch >> shift) as usize % 16];
        }
        let at = decimal(self.partition.0.into(), &mut text[..at - 1]);
        f.write_str(std::str::from_utf8(&text[at..]).map_err(|_| fmt::Error)?)
    }
}

/// The most characters that the name of a delivery has.
const MOST: usize = "65535-".len() + "ffffffff-".len() + "18446744073709551615".len();

/// Writes a number so that it ends where `text` does. Returns where it begins.
fn decimal(mut number: u64, text: &mut [u8]) -> usize {
    let mut at = text.len();
    loop {
        at -= 1;
        text[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_and_the_greatest_delivery_have_names() {
        for (partition, epoch, number, name) in [
            (0, 0, 0, "0-00000000-0"),
            (10, 0x1f, 100, "10-0000001f-100"),
            (u16::MAX, u32::MAX, u64::MAX, "65535-ffffffff-18446744073709551615"),
        ] {
            let id = DeliveryId { partition: PartitionId(partition), epoch, number };
            assert_eq!(id.to_string(), name);
            assert_eq!(DeliveryId::parse(name).unwrap(), id);
        }
    }

    #[test]
    fn a_delivery_has_one_name() {
        for bad in
            ["", "3-9f2c11aa", "3-9F2C11AA-1", "03-9f2c11aa-1", "3-1-1", "3-9f2c11aa-1-", "-"]
        {
            assert!(DeliveryId::parse(bad).is_err(), "{bad:?}");
        }
    }
}
