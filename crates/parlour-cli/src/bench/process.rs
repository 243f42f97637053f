//! What processes use, as Linux tells it under `/proc`.

use std::time::Duration;

use crate::exit::{Code, Failure};

/// A process on this machine.
#[derive(Clone, Copy, Debug)]
pub(super) enum Process {
    Driver,
    Pid(u32),
}

impl Process {
    /// The processor time it has used so far, in steps of 10 ms.
    pub(super) fn cpu(self) -> Result<Duration, Failure> {
        let stat = self.read("stat")?;
        // The name before it stands in parentheses and may hold anything.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let mut times =
            fields.split_whitespace().skip(11).map_while(|text| text.parse::<u64>().ok());
        match (times.next(), times.next()) {
            (Some(user), Some(system)) => {
                let per_second = rustix::param::clock_ticks_per_second();
                Ok(Duration::from_millis((user + system) * 1000 / per_second.max(1)))
            }
            _ => Err(Failure::new(Code::Failed, format!("cannot read {}", self.path("stat")))),
        }
    }

    /// The memory it holds, in bytes.
    pub(super) fn rss(self) -> Result<u64, Failure> {
        self.memory("VmRSS:")
    }

    /// The most memory it has held, in bytes.
    pub(super) fn peak_rss(self) -> Result<u64, Failure> {
        self.memory("VmHWM:")
    }

    fn memory(self, field: &str) -> Result<u64, Failure> {
        let status = self.read("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
            .map(|kilobytes| kilobytes * 1024)
            .ok_or_else(|| {
                Failure::new(Code::Failed, format!("cannot read {}", self.path("status")))
            })
    }

    fn path(self, file: &str) -> String {
        match self {
            Self::Driver => format!("/proc/self/{file}"),
            Self::Pid(pid) => format!("/proc/{pid}/{file}"),
        }
    }

    fn read(self, file: &str) -> Result<String, Failure> {
        let path = self.path(file);
        std::fs::read_to_string(&path)
            .map_err(|error| Failure::new(Code::NotFound, format!("cannot read {path}: {error}")))
    }
}

/// Keeps this thread on one processor.
#[cfg(target_os = "linux")]
pub(super) fn pin(cpu: usize) -> Result<(), Failure> {
    use rustix::thread::{CpuSet, sched_setaffinity};

    if cpu >= CpuSet::MAX_CPU {
        return Err(Failure::new(Code::Usage, format!("there is no processor {cpu}")));
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).map_err(|error| {
        Failure::new(Code::Usage, format!("cannot run on processor {cpu}: {error}"))
    })
}

/// Keeps this thread on one processor.
#[cfg(not(target_os = "linux"))]
pub(super) fn pin(_cpu: usize) -> Result<(), Failure> {
    Err(Failure::new(Code::Usage, "--pin works on Linux only"))
}

/// Makes room for so many open sockets, as far as the system allows.
pub(super) fn allow_files(count: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < count) {
        let wanted = limit.maximum.map_or(count, |maximum| maximum.min(count));
        // If it stays too low, the socket that does not fit says so.
        let _ =
            setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum });
    }
}
