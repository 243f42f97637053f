//! The whole host in memory, on a paused clock.

mod outcomes;
mod patience;
mod room;
