//! The directory in which a host keeps what is durable.

use std::path::PathBuf;

use parlour_host::Config;
use parlour_host::backbone::{Embedded, OpenError};

use crate::exit::{Code, Failure};

/// Where `config` keeps it: `server.data`, or else `parlour` under `$XDG_DATA_HOME`
/// (XDG Base Directory Specification 0.8).
pub(crate) fn directory(config: &Config) -> Result<PathBuf, Failure> {
    if !config.server.data.is_empty() {
        return Ok(config.server.data.as_str().into());
    }
    let absolute = |name: &str| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let base = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")));
    base.map(|base| base.join("parlour")).ok_or_else(|| {
        Failure::new(Code::BadConfig, "there is no directory to keep data in: HOME is not set")
            .hint("give --data DIR, or --memory to keep nothing")
    })
}

/// Opens it.
pub(crate) fn open(config: &Config) -> Result<Embedded, Failure> {
    let directory = directory(config)?;
    Embedded::open(&directory, config.durable.partitions as u16).map_err(|error| failure(&error))
}

fn failure(error: &OpenError) -> Failure {
    let (code, hint) = match error {
        OpenError::InUse(_) => (
            Code::AlreadyRunning,
            "end that host first, or give this one a directory of its own with --data DIR",
        ),
        OpenError::Io { .. } => (
            Code::Storage,
            "is it a directory that this user may write to? --data DIR takes another",
        ),
        OpenError::Newer { .. } => (
            Code::BadConfig,
            "start the version that wrote it, or give another directory with --data DIR",
        ),
        OpenError::Foreign(_) => (Code::BadConfig, "give a directory of its own with --data DIR"),
        OpenError::Partitions { .. } => (
            Code::BadConfig,
            "set durable.partitions to what it was, or begin in another directory",
        ),
        _ => (Code::Storage, "look at the disk, or restore a backup into another directory"),
    };
    Failure::new(code, error.to_string()).hint(hint)
}
