//! The protocols that are spoken on a channel.

pub(crate) mod dialect;
pub(crate) mod native;
pub(crate) mod text;
