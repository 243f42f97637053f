//! Servers and clients that Parlour is compared with, as far as they had to be written for that.
//!
//! - `raw`: forwards WebSocket frames by a number in front of them. What the sockets cost; with a file
//!   to write them to, what a disk costs too.
//! - `axum-host`: what one would write instead of a host, with axum.
//! - `sdk-load`: calls through two client libraries, Parlour's and async-nats.
//!
//! `bench/compare` builds and runs them.

pub mod frame;
