//! One module for each verb, each with a `run` that takes its arguments and where to print.

pub(crate) mod agents;
pub(crate) mod backup;
pub(crate) mod call;
pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod dead_letters;
pub(crate) mod deliveries;
pub(crate) mod doctor;
pub(crate) mod explain;
pub(crate) mod publish;
pub(crate) mod restore;
pub(crate) mod send;
pub(crate) mod serve;
pub(crate) mod status;
pub(crate) mod subscribe;
pub(crate) mod subscriptions;
pub(crate) mod verify;
pub(crate) mod version;
pub(crate) mod worker;
pub(crate) mod workers;
