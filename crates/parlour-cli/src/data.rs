//! The directory in which a host keeps what is durable.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parlour_host::Config;
use parlour_host::backbone::{Embedded, OpenError};
use parlour_host::store::{Progress, Stop, StoreError, Task, Watch};
use tokio::time::Instant;

use crate::args::Data;
use crate::config::Settings;
use crate::exit::{Code, Failure};
use crate::output::Output;
use crate::room;
use crate::signals::Signals;

/// What takes less than this shows nothing of how far it has come.
const SHORT: Duration = Duration::from_secs(1);

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

/// The setting that `--data` stands for.
pub(crate) fn flag(
    dir: Option<&Path>,
) -> Result<Option<(&'static str, &'static str, String)>, Failure> {
    let Some(dir) = dir else { return Ok(None) };
    match dir.to_str() {
        Some(dir) => Ok(Some(("--data", "server.data", dir.to_owned()))),
        None => Err(Failure::new(Code::Usage, "the name of the directory is not UTF-8")),
    }
}

/// The settings of a verb that looks at what a host keeps.
pub(crate) fn settings(data: &Data, output: &Output) -> Result<Settings, Failure> {
    settings_with(data, None, output)
}

/// The same with one more flag.
pub(crate) fn settings_with(
    data: &Data,
    more: Option<(&'static str, &str, String)>,
    output: &Output,
) -> Result<Settings, Failure> {
    let flags: Vec<_> = flag(data.data.as_deref())?.into_iter().chain(more).collect();
    let settings = Settings::load(&data.sources, &flags)?;
    settings.warnings.iter().for_each(|warning| output.warn(warning));
    Ok(settings)
}

/// Works on files until it is done, or a signal stops it; shows a person how far it has come.
pub(crate) fn work<T: Send + 'static>(
    output: &Output,
    job: impl FnOnce(Stop, Watch<'_>) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Failure> {
    let runtime = room::runtime()?;
    runtime.block_on(async {
        let mut signals = Signals::install()?;
        let stop = Stop::default();
        let shown = output.shows_progress().then_some(*output);
        let mut job = tokio::task::spawn_blocking({
            let stop = stop.clone();
            move || {
                let mut shower = Shower::new(shown);
                job(stop, &mut |progress| shower.show(progress))
            }
        });
        let (ended, code) = tokio::select! {
            ended = &mut job => (ended, None),
            code = signals.next() => {
                stop.stop();
                (job.await, Some(code))
            }
        };
        let ended = ended.map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
        ended.map_err(|error| match (&error, code) {
            (StoreError::Stopped, Some(code)) => {
                output.note("stopped; nothing of it is left");
                Failure::silent(code)
            }
            _ => store_failure(&error),
        })
    })
}

/// Tells a person how far something has come.
struct Shower {
    output: Option<Output>,
    begun: Instant,
    shown: Instant,
    has_shown: bool,
}

impl Shower {
    fn new(output: Option<Output>) -> Self {
        let now = Instant::now();
        Self { output, begun: now, shown: now, has_shown: false }
    }

    fn show(&mut self, progress: Progress) {
        let Some(output) = &self.output else { return };
        let now = Instant::now();
        if now - self.begun < SHORT || now - self.shown < SHORT / 5 {
            return;
        }
        (self.shown, self.has_shown) = (now, true);
        let task = match progress.task {
            Task::Copy => "copying",
            Task::Verify => "checking",
        };
        let percent = progress.done * 100 / progress.total.max(1);
        output.progress(&format!("{task}: {percent} % of {}", mebibytes(progress.total)));
    }
}

impl Drop for Shower {
    fn drop(&mut self) {
        if let Some(output) = self.output.filter(|_| self.has_shown) {
            output.progress("");
        }
    }
}

pub(crate) fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// What an error of the store means here.
pub(crate) fn store_failure(error: &StoreError) -> Failure {
    let (code, hint) = match error {
        StoreError::Open(error) => return failure(error),
        StoreError::Missing(_) => {
            (Code::Storage, "`parlour serve` makes one when it starts; --data DIR names another")
        }
        StoreError::Exists(_) => (
            Code::Conflict,
            "nothing is written over: name another place, or move away what is there",
        ),
        StoreError::Busy(_) => {
            (Code::AlreadyRunning, "wait until it has ended, or name another file")
        }
        StoreError::Damaged { .. } => {
            (Code::Storage, "`parlour verify` names all that is damaged; nothing was written")
        }
        _ => (Code::Failed, "look at the disk with `parlour doctor`"),
    };
    Failure::new(code, error.to_string()).hint(hint)
}

fn failure(error: &OpenError) -> Failure {
    let (code, hint) = match error {
        OpenError::InUse(_) => (
            Code::AlreadyRunning,
            "end that host first, or give this one a directory of its own with --data DIR",
        ),
        OpenError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            (Code::Storage, "free some space, or take another disk")
        }
        OpenError::Io { .. } => (
            Code::Storage,
            "is it a directory that this user may write to? --data DIR takes another",
        ),
        OpenError::Newer { .. } => (
            Code::BadConfig,
            "start the version that wrote it, or give another directory with --data DIR",
        ),
        OpenError::Older { .. } => (
            Code::BadConfig,
            "let the version that wrote it end what is there, and begin in another directory",
        ),
        OpenError::Foreign(_) => (Code::BadConfig, "give a directory of its own with --data DIR"),
        OpenError::Partitions { .. } => (
            Code::BadConfig,
            "set durable.partitions to what it was, or begin in another directory",
        ),
        OpenError::Behind { .. } => (
            Code::Storage,
            "look at the disk, or restore a backup into another directory; to go on without what is \
             lost, remove the file `head` beside it",
        ),
        OpenError::Read(_) => (Code::Storage, "end that program, and start again"),
        _ => (Code::Storage, "look at the disk, or restore a backup into another directory"),
    };
    Failure::new(code, error.to_string()).hint(hint)
}
