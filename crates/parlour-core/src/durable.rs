//! Messages that are kept until they have ended: their lives, and the log these are folded from.
//!
//! A host writes what happens to durable messages into logs, one per [`Partition`]. A log is a row of
//! commits, each of which carries [`Record`]s. The state of a partition is what its records say, one
//! after the other, and nothing else: [`Partition::replay`] makes it from a log, and every command
//! goes the same way, as a record that is applied and then written.
//!
//! Nothing here writes, waits or looks at a clock. Whoever owns a partition gives it commands and the
//! time, appends what [`Partition::take_commit`] returns, and acts on the outcome when that is on disk.

mod bucket;
mod commit;
mod delivery;
mod id;
mod line;
mod log;
mod outbox;
mod partition;
mod policy;
mod record;
mod room;

pub use bucket::Bucket;
pub use commit::{
    Commit, Place, Settled, Totals, epoch_of, previous_of, published_in, record_at, settled_in,
    time_of,
};
pub use delivery::{Change, Counts, Delivery, Level, MAX_STEPS, Stale, State, Step};
pub use id::{DeliveryId, PartitionId, Position, Timestamp};
pub use line::Gate;
pub use partition::{
    Accept, Accepted, Handover, Partition, Publish, Published, Standing, Start, Tally,
};
pub use policy::RetryPolicy;
pub use record::{Corrupt, FORMAT, KeyEntry, Message, MessageKind, Owed, Record, Source};
pub use room::{AgentSettings, DurableSubscription, Rate, RoomSettings};
