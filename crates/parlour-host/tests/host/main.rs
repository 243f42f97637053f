//! The whole host in memory, on a paused clock.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod abuse;
mod describe;
mod durable;
mod outcomes;
mod patience;
mod pools;
mod resume;
mod room;
mod shaky;
mod shutdown;
mod texts;
