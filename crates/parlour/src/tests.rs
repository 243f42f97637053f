//! A client and a worker against a host that the test plays itself, or a real one (`room`), over in-memory
//! streams and on a clock that stands still unless all wait.

mod client;
mod handlers;
mod limits;
mod progress;
mod publishing;
mod resume;
mod room;
mod scripted;
mod sending;
mod shutdown;
mod subscription;
mod worker;
