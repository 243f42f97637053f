//! The doors: HTTP/1.1 and HTTP/2 on one port, and what stands behind each path.

mod agents;
pub(crate) mod answer;
mod body;
mod dead_letters;
mod deliveries;
pub(crate) mod guard;
mod operators;
pub(crate) mod phase;
pub(crate) mod problem;
mod rest;
pub(crate) mod router;
mod rpc;
pub(crate) mod server;
mod settings;
pub(crate) mod sse;
mod subscriptions;
pub(crate) mod tasks;
pub(crate) mod upgrade;
