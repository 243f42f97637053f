//! What a disk is, and what its fsync is worth.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parlour_host::store::{Stop, StoreError};
use rustix::fs::statvfs;
use rustix::process::geteuid;
use tokio::time::Instant;

use super::{Finding, Verdict};
use crate::data::mebibytes;
use crate::exit::Code;

/// How many writes are measured, of how many bytes, and for how long at the most.
const WRITES: usize = 300;
const WRITE: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(5);
/// No disk writes faster than this, whatever it is made of.
const FASTEST: Duration = Duration::from_micros(15);
/// A plate does not turn faster than this, nor do two writes to one place.
const FASTEST_TURN: Duration = Duration::from_millis(1);
/// From here on whoever waits for an acknowledgement notices.
const SLOW: Duration = Duration::from_millis(20);
/// A host that has less soon refuses what is new.
const LEAST: u64 = 64 << 20;

const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];
const OVER_A_NETWORK: [&str; 12] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "afs",
    "ceph",
    "glusterfs",
    "lustre",
    "fuse.sshfs",
    "fuse.glusterfs",
    "fuse.ceph",
];

pub(super) fn check(dir: &Path, retention: u64, stop: &Stop) -> Result<Vec<Finding>, StoreError> {
    let (place, is_there) = nearest(dir);
    let mut findings = vec![directory(dir, &place, is_there)];
    if findings.iter().any(|it| matches!(it.verdict, Verdict::Failed(_))) {
        return Ok(findings);
    }
    findings.push(space(&place, retention));
    let mount = std::fs::read_to_string("/proc/self/mountinfo")
        .ok()
        .and_then(|text| Mount::of(&place.canonicalize().ok()?, &text));
    findings.push(file_system(mount.as_ref()));
    findings.extend(match measure(&place, stop) {
        Ok(times) => vec![speed(&times), honesty(&times, mount.as_ref())],
        Err(_) if stop.check().is_err() => return Err(StoreError::Stopped),
        Err(error) => vec![cannot(&place, &error)],
    });
    Ok(findings)
}

/// The directory, or what is there of the way to it.
fn nearest(dir: &Path) -> (PathBuf, bool) {
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    let place = dir.ancestors().find(|path| path.symlink_metadata().is_ok());
    let place = place.unwrap_or_else(|| Path::new("/")).to_owned();
    let is_there = place == dir;
    (place, is_there)
}

fn cannot(path: &Path, error: &io::Error) -> Finding {
    let detail = format!("cannot write to {}: {error}", path.display());
    let hint = match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "mount it so that it can be written, or look in the \
            kernel's log why it became read-only; --data DIR takes another"
        }
        io::ErrorKind::StorageFull => "free some space on its disk",
        io::ErrorKind::NotADirectory => "give a directory with --data DIR",
        _ => {
            "have its owner give this user the right to write there (`ls -ld`), or take another with \
              --data DIR"
        }
    };
    Finding::new("directory", Verdict::Failed(Code::Storage), detail).hint(hint)
}

fn directory(dir: &Path, place: &Path, is_there: bool) -> Finding {
    const CHECK: &str = "directory";
    let probe = || {
        let found = place.metadata()?;
        if !found.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Probe::begin(place)?;
        for file in ["lock", "parlour.db", "view.db"] {
            match OpenOptions::new().write(true).open(place.join(file)) {
                Err(error) if is_there && error.kind() != io::ErrorKind::NotFound => {
                    return Err(error);
                }
                _ => {}
            }
        }
        Ok(found.uid())
    };
    let owner = match probe() {
        Ok(owner) => owner,
        Err(error) => return cannot(place, &error),
    };
    let (user, dir) = (geteuid().as_raw(), dir.display());
    if !is_there {
        return Finding::ok(CHECK, format!("{dir} is not there; a host makes it when it starts"));
    }
    if owner != user {
        let detail = format!("{dir} belongs to user {owner}, and this is user {user}");
        return Finding::warning(CHECK, detail)
            .hint("run the host as its owner: it cannot use what another makes there");
    }
    Finding::ok(CHECK, format!("{dir} can be written, and belongs to this user"))
}

fn space(place: &Path, retention: u64) -> Finding {
    const CHECK: &str = "space";
    let free = match statvfs(place) {
        Ok(found) => found.f_bavail * found.f_frsize,
        Err(error) => return Finding::warning(CHECK, format!("it cannot be told: {error}")),
    };
    let shown = mebibytes(free);
    let finding = if free < LEAST {
        Finding::new(CHECK, Verdict::Failed(Code::Storage), format!("only {shown} are free"))
            .hint("free some, or take another disk with --data DIR")
    } else if free < retention {
        let detail = format!("{shown} are free, less than durable.retention_bytes may take");
        Finding::warning(CHECK, detail)
            .hint("lower durable.retention_bytes, or have more space than what waits and has ended")
    } else {
        Finding::ok(CHECK, format!("{shown} are free"))
    };
    finding.figure("free_bytes", free)
}

/// A mounted file system, as the kernel tells of it.
#[derive(Debug, Eq, PartialEq)]
struct Mount {
    kind: String,
    options: String,
    device: String,
    /// Of the device, such as `253:0`.
    number: String,
}

impl Mount {
    /// That of `path`, out of `/proc/self/mountinfo` (proc(5)).
    fn of(path: &Path, mountinfo: &str) -> Option<Self> {
        let parse = |line: &str| {
            let (mount, of) = line.split_once(" - ")?;
            let mut mount = mount.split(' ');
            let number = mount.nth(2)?.to_owned();
            let point = unescape(mount.nth(1)?);
            let mut of = of.split(' ');
            let (kind, device) = (of.next()?.to_owned(), unescape(of.next()?));
            let options = format!("{},{}", mount.next()?, of.next().unwrap_or_default());
            let is_over = path.starts_with(&point);
            is_over.then_some((point.len(), Self { kind, options, device, number }))
        };
        // Of two that are mounted at one place, the later hides the earlier.
        let found = mountinfo.lines().filter_map(parse).max_by_key(|(length, _)| *length);
        found.map(|(_, mount)| mount)
    }

    fn option(&self, names: &[&str]) -> Option<&str> {
        self.options.split(',').find(|option| names.contains(option))
    }

    /// What the kernel says of the queue of its device, or of that of which it is a part.
    fn queue(&self, name: &str) -> Option<String> {
        let device = Path::new("/sys/dev/block").join(&self.number);
        let read = |queue: &str| std::fs::read_to_string(device.join(queue).join(name)).ok();
        let text = read("queue").or_else(|| read("../queue"))?;
        Some(text.trim().to_owned())
    }
}

/// Spaces and the like are written as `\040`.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

fn file_system(mount: Option<&Mount>) -> Finding {
    const CHECK: &str = "file system";
    let Some(mount) = mount else {
        return Finding::ok(CHECK, "its kind cannot be told on this system");
    };
    let Mount { kind, device, .. } = mount;
    let finding = if IN_MEMORY.contains(&&**kind) {
        Finding::warning(CHECK, format!("{kind} is memory: nothing on it survives a power cut"))
            .hint("put the data on a disk with --data DIR")
    } else if OVER_A_NETWORK.contains(&&**kind) {
        let detail = format!(
            "{kind} is a network's: its locks and its fsync are not relied on, so nothing on it is \
             sure to survive"
        );
        Finding::warning(CHECK, detail)
            .hint("put the data on a disk of this machine with --data DIR")
    } else if kind == "overlay" {
        let detail = "overlay is a container's own: what is on it goes with the container";
        Finding::warning(CHECK, detail).hint("mount a volume, and name it with --data DIR")
    } else if let Some(option) = mount.option(&["nobarrier", "barrier=0"]) {
        let detail =
            format!("{kind} on {device} is mounted with {option}: fsync does not reach the disk");
        Finding::warning(CHECK, detail).hint("mount it without that")
    } else {
        Finding::ok(CHECK, format!("{kind} on {device}"))
    };
    finding.figure("kind", kind.as_str())
}

/// A file of no use but this, which is removed when it has served.
struct Probe {
    path: PathBuf,
    file: File,
}

impl Probe {
    fn begin(dir: &Path) -> io::Result<Self> {
        let path = dir.join(format!("doctor-{}.tmp", std::process::id()));
        let file = OpenOptions::new().create_new(true).write(true).open(&path)?;
        Ok(Self { path, file })
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // If it stays, its name says what it was.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// How long it takes until a small write is on the disk, the fastest first.
fn measure(dir: &Path, stop: &Stop) -> io::Result<Vec<Duration>> {
    let mut probe = Probe::begin(dir)?;
    let begun = Instant::now();
    let mut times = Vec::with_capacity(WRITES);
    while times.len() < WRITES && (begun.elapsed() < PATIENCE || times.is_empty()) {
        stop.check().map_err(io::Error::other)?;
        let before = Instant::now();
        probe.file.write_all(&[b'x'; WRITE])?;
        probe.file.sync_data()?;
        times.push(before.elapsed());
    }
    times.sort_unstable();
    Ok(times)
}

fn quantile(times: &[Duration], of: f64) -> Duration {
    let last = times.len().saturating_sub(1);
    times.get((last as f64 * of).round() as usize).copied().unwrap_or_default()
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn speed(times: &[Duration]) -> Finding {
    const CHECK: &str = "fsync speed";
    let (p50, p99) = (quantile(times, 0.5), quantile(times, 0.99));
    let detail = format!(
        "{} writes of {WRITE} bytes: p50 {} ms, p99 {} ms; so long an acknowledgement waits at least, \
         and those who wait share one",
        times.len(),
        millis(p50),
        millis(p99)
    );
    let finding = if p50 > SLOW {
        Finding::warning(CHECK, detail)
            .hint("a faster disk acknowledges faster; --data DIR takes one")
    } else {
        Finding::ok(CHECK, detail)
    };
    finding
        .figure("writes", times.len())
        .figure("p50_ms", millis(p50))
        .figure("p99_ms", millis(p99))
}

/// What can be said of whether fsync tells the truth. Only a power cut would show it.
fn honesty(times: &[Duration], mount: Option<&Mount>) -> Finding {
    const CHECK: &str = "fsync honesty";
    let p50 = quantile(times, 0.5);
    let cache = mount.and_then(|mount| mount.queue("write_cache")).unwrap_or_default();
    let turns = mount.and_then(|mount| mount.queue("rotational")).as_deref() == Some("1");
    let is_virtual = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
        text.lines().any(|line| line.starts_with("flags") && line.contains(" hypervisor"))
    });
    let in_memory = mount.is_some_and(|mount| IN_MEMORY.contains(&&*mount.kind));
    let suspicion = if in_memory {
        Some("there is no disk below it: fsync does nothing".to_owned())
    } else if p50 < FASTEST {
        Some(format!("{p50:?} is faster than any disk: what it calls written is likely in memory"))
    } else if turns && !is_virtual && p50 < FASTEST_TURN {
        Some(format!("{p50:?} is faster than a plate turns: a cache answers for it"))
    } else {
        None
    };
    let is_suspect = suspicion.is_some();
    let finding = match suspicion {
        Some(suspicion) => Finding::warning(CHECK, suspicion).hint(
            "have the write cache turned off (`hdparm -W 0`) unless a battery backs it, or take \
             another disk with --data DIR",
        ),
        None => {
            let told = match &*cache {
                "write back" => "the kernel has the disk empty its cache each time",
                "write through" => "the disk says that it has no cache to empty",
                _ => "nothing is known of a cache",
            };
            let beyond = if is_virtual { ", or the machine below this virtual one," } else { "" };
            Finding::ok(
                CHECK,
                format!(
                    "as slow as a disk; {told}. Whether the disk{beyond} does as it says, only a power cut shows"
                ),
            )
        }
    };
    finding.figure("suspect", is_suspect)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 253:0 / / rw,noatime shared:1 - ext4 /dev/vda1 rw,barrier=0
30 27 0:30 / /mnt/a\\040b rw - nfs4 server:/x rw
31 27 0:31 / /mnt/a\\040b rw - tmpfs tmpfs rw,size=1k
";

    #[test]
    fn a_path_is_on_the_mount_that_hides_the_others() {
        let kind = |path: &str| Mount::of(Path::new(path), MOUNTS).unwrap().kind;
        assert_eq!(kind("/srv/parlour"), "ext4");
        assert_eq!(kind("/mnt/a b/parlour"), "tmpfs");
        assert_eq!(kind("/mnt/a"), "ext4");
        let root = Mount::of(Path::new("/"), MOUNTS).unwrap();
        assert_eq!((&*root.number, &*root.device), ("253:0", "/dev/vda1"));
        assert_eq!(root.option(&["nobarrier", "barrier=0"]), Some("barrier=0"));
    }

    #[test]
    fn a_disk_that_is_faster_than_any_is_suspected() {
        let of = |micros| vec![Duration::from_micros(micros); 10];
        assert_eq!(honesty(&of(2), None).verdict, Verdict::Warning);
        assert_eq!(honesty(&of(300), None).verdict, Verdict::Ok);
        assert_eq!(speed(&of(300)).verdict, Verdict::Ok);
        assert_eq!(speed(&of(30_000)).verdict, Verdict::Warning);
    }
}
