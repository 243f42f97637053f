//! What runs in a process of its own: load on a store, opening it, looking into it. Each prints one line of figures.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::store::{self, Batch, PARTITIONS, Row, Store, verify};

/// What an accept with 256 bytes of payload takes in a commit, and what its settlement takes.
pub const ACCEPT: usize = 350;
const SETTLEMENT: usize = 150;

/// Above this a body is not part of the commit.
const BODY: usize = 100 << 10;

/// Makes commits out of what is queued, and lets the oldest go once the log is longer than `retain`.
pub struct Log {
    noise: Vec<u8>,
    last: [u64; PARTITIONS as usize],
    transaction: u64,
    by_position: bool,
    kept: VecDeque<(u16, u64, u64)>,
    length: u64,
    retain: Option<u64>,
}

impl Log {
    pub fn new(spec: &str, retain: Option<u64>) -> Self {
        // Nothing that a store could compress.
        let noise = std::iter::repeat_with(|| fastrand::u8(..)).take(1 << 16).collect();
        Self {
            noise,
            last: [0; PARTITIONS as usize],
            transaction: 0,
            by_position: store::settings(spec).1.by_position(),
            kept: VecDeque::new(),
            length: 0,
            retain,
        }
    }

    /// One row for each partition that has something to write.
    pub fn batch(&mut self, accepts: &[u16], settlements: &[u16]) -> Batch {
        let mut values = vec![Vec::new(); usize::from(PARTITIONS)];
        for (partitions, size) in [(accepts, ACCEPT), (settlements, SETTLEMENT)] {
            for &partition in partitions {
                let at = fastrand::usize(..self.noise.len() - size);
                values[usize::from(partition)].extend_from_slice(&self.noise[at..at + size]);
            }
        }
        let mut batch = Batch::default();
        self.transaction += 1;
        for (partition, value) in (0..).zip(values) {
            if !value.is_empty() {
                let last = &mut self.last[usize::from(partition)];
                let before = *last;
                *last = if self.by_position { self.transaction } else { before + 1 };
                let position = *last;
                self.length += value.len() as u64;
                self.kept.push_back((partition, position, value.len() as u64));
                batch.rows.push(Row::new(partition, position, before, &value));
            }
        }
        if let Some(retain) = self.retain
            && self.length > retain + retain / 256
        {
            let mut trims = [0; PARTITIONS as usize];
            while self.length > retain
                && let Some((partition, position, length)) = self.kept.pop_front()
            {
                self.length -= length;
                trims[usize::from(partition)] = position;
                batch.trim_through = Some((partition, position));
            }
            batch.trims = (0..).zip(trims).filter(|(_, up_to)| *up_to > 0).collect();
        }
        batch
    }
}

pub struct Load {
    pub writers: usize,
    pub seconds: f64,
    /// Stop after so many commits instead.
    pub commits: Option<u64>,
    /// Settle each accept in the next commit, and hold the log at this length.
    pub retain: Option<u64>,
    /// Every so many commits a body goes beside.
    pub body_every: Option<u64>,
}

/// Closed loop: each writer hands in an accept and the next one once that is acknowledged. Writers cost no thread, so
/// what is measured is the store.
pub fn load(spec: &str, dir: &Path, load: &Load) -> Result<String> {
    let mut store = store::open(spec, dir)?;
    let mut log = Log::new(spec, load.retain);
    if let Some(retain) = load.retain {
        while log.length < retain - retain / 8 {
            let accepts: Vec<u16> = (0..1024).map(|n| n % PARTITIONS).collect();
            store.commit(&log.batch(&accepts, &[]))?;
        }
    }
    let filled = size(dir)?;

    let (submit, accepts) = channel();
    let (acknowledge, acknowledged) = channel();
    let (seconds, writers) = (load.seconds, load.writers);
    let (written, disk, cpu) = (written()?, disk(dir)?, cpu()?);
    let start = Instant::now();
    let callers = std::thread::spawn(move || call(writers, seconds, &submit, &acknowledged));
    let (mut commits, mut largest, mut bodies) = (0, filled, 0);
    let mut ended = Vec::new();
    let (mut ids, mut partitions) = (Vec::new(), Vec::new());
    while let Ok((id, partition)) = accepts.recv() {
        ids.clear();
        partitions.clear();
        ids.push(id);
        partitions.push(partition);
        for (id, partition) in accepts.try_iter() {
            ids.push(id);
            partitions.push(partition);
        }
        let settlements = if load.retain.is_some() {
            std::mem::replace(&mut ended, partitions.clone())
        } else {
            vec![]
        };
        let mut batch = log.batch(&partitions, &settlements);
        if load.body_every.is_some_and(|every| commits % every == 0) {
            bodies += 1;
            batch.bodies.push((commits, log.noise.iter().copied().cycle().take(BODY).collect()));
        }
        store.commit(&batch)?;
        commits += 1;
        if load.retain.is_some() && commits % 64 == 0 {
            largest = largest.max(size(dir)?);
        }
        if load.commits == Some(commits) || acknowledge.send(ids.clone()).is_err() {
            break;
        }
    }
    drop((acknowledge, accepts));
    let mut waits = callers.join().map_err(|_| anyhow::anyhow!("the callers panicked"))?;
    let elapsed = start.elapsed().as_secs_f64();
    let count = waits.len() as f64;
    ensure!(!waits.is_empty() || load.commits.is_some(), "nothing was acknowledged");
    let written = (self::written()? - written) as f64;
    let disk = (self::disk(dir)? - disk) as f64;
    let cpu = self::cpu()? - cpu;
    waits.sort_unstable();
    let at = |q: f64| waits.get((q * (count - 1.0)) as usize).copied().unwrap_or(0);
    let size = size(dir)?;
    let bytes = count * (ACCEPT + if load.retain.is_some() { SETTLEMENT } else { 0 }) as f64
        + (bodies * BODY) as f64;
    Ok(format!(
        "rate={:.0} p50={} p99={} max={} per_commit={:.1} dirtied={:.2} disk={:.2} cpu={:.2} filled={filled} size={size} largest={largest} commits={commits}",
        count / elapsed,
        at(0.5),
        at(0.99),
        at(1.0),
        count / commits as f64,
        written / bytes,
        disk / bytes,
        cpu * 1e6 / count,
    ))
}

/// The waits in µs.
fn call(
    writers: usize,
    seconds: f64,
    submit: &Sender<(usize, u16)>,
    acknowledged: &Receiver<Vec<usize>>,
) -> Vec<u32> {
    let start = Instant::now();
    let mut since = vec![start; writers];
    let mut waits = Vec::new();
    let send = |id| submit.send((id, fastrand::u16(..PARTITIONS))).is_ok();
    if !(0..writers).all(send) {
        return waits;
    }
    while let Ok(ids) = acknowledged.recv() {
        let now = Instant::now();
        for id in ids {
            waits.push((now - since[id]).as_micros() as u32);
            since[id] = now;
            if now - start < Duration::from_secs_f64(seconds) && !send(id) {
                return waits;
            }
        }
        if now - start >= Duration::from_secs_f64(seconds) {
            break;
        }
    }
    waits
}

/// Writes as many accepts, in commits of 64, says so and waits to be killed.
pub fn fill(spec: &str, dir: &Path, accepts: u64) -> Result<()> {
    let mut store = store::open(spec, dir)?;
    let mut log = Log::new(spec, None);
    // A transaction of the fill has a commit of 64 for each partition.
    let partitions: Vec<u16> = (0..64 * PARTITIONS).map(|n| n % PARTITIONS).collect();
    for _ in 0..accepts.div_ceil(partitions.len() as u64) {
        store.commit(&log.batch(&partitions, &[]))?;
    }
    println!("filled");
    wait_for_line()?;
    Ok(())
}

/// Writes transactions of mixed size, and says the last positions; at each line it is given, it writes one more.
pub fn steps(spec: &str, dir: &Path, transactions: u64) -> Result<()> {
    fastrand::seed(7);
    let mut store = store::open(spec, dir)?;
    let mut log = Log::new(spec, None);
    let mut left = transactions;
    loop {
        let accepts: Vec<u16> =
            (0..fastrand::usize(1..200)).map(|_| fastrand::u16(..PARTITIONS)).collect();
        store.commit(&log.batch(&accepts, &[]))?;
        left = left.saturating_sub(1);
        if left == 0 {
            println!("{}", log.last.iter().fold(String::new(), |line, n| line + &format!("{n} ")));
            wait_for_line()?;
        }
    }
}

/// Opens after a kill, reads everything in order and verifies it.
pub fn reopen(spec: &str, dir: &Path, cold: bool) -> Result<String> {
    if cold {
        forget(dir)?;
    }
    let start = Instant::now();
    let mut store = store::open(spec, dir)?;
    let open = start.elapsed();
    let (mut commits, mut bytes) = (0, 0);
    let last = last_positions(store.as_mut(), &mut |value| {
        commits += 1;
        bytes += value.len();
    })?;
    let read = start.elapsed();
    ensure!(last.iter().all(|n| *n > 0), "a partition is empty");
    Ok(format!(
        "open={:.2} read={:.1} commits={commits} bytes={bytes} peak={} anonymous={}",
        open.as_secs_f64() * 1e3,
        read.as_secs_f64() * 1e3,
        status("VmHWM")?,
        status("RssAnon")?,
    ))
}

/// Says the last position of each partition, or fails: with 3 for an error of the store, 4 for a checksum, 5 for a gap.
pub fn check(spec: &str, dir: &Path) -> Result<()> {
    let mut store = store::open(spec, dir)?;
    let last = last_positions(store.as_mut(), &mut |_| {})?;
    println!("{}", last.iter().fold(String::new(), |line, n| line + &format!("{n} ")));
    Ok(())
}

/// What our own checks say: exit code and text.
#[derive(Debug)]
pub struct Damage(pub i32, String);

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.1)
    }
}

impl std::error::Error for Damage {}

fn last_positions(store: &mut dyn Store, each: &mut dyn FnMut(&[u8])) -> Result<Vec<u64>> {
    let mut last = vec![0; usize::from(PARTITIONS)];
    store.read_all(&mut |partition, position, value| {
        let Some(before) = last.get_mut(usize::from(partition)) else {
            bail!(Damage(5, format!("no partition {partition}")));
        };
        match verify(partition, position, value) {
            None => bail!(Damage(4, format!("checksum of {partition}/{position}"))),
            Some(last) if last != *before => {
                bail!(Damage(5, format!("{position} follows {last}, not {before}")))
            }
            Some(_) => *before = position,
        }
        each(value);
        Ok(())
    })?;
    Ok(last)
}

/// One commit by its key, out of the disk and out of memory.
pub fn lookup(spec: &str, dir: &Path, lookups: usize) -> Result<String> {
    let mut store = store::open(spec, dir)?;
    let mut keys = Vec::new();
    store.read_all(&mut |partition, position, _| {
        keys.push((partition, position));
        Ok(())
    })?;
    let mut figures = String::new();
    for (name, lookups, cold) in [("cold", lookups.div_ceil(50), true), ("warm", lookups, false)] {
        let mut times = Vec::new();
        for _ in 0..lookups {
            if cold {
                // A new connection, so that the store's own cache is empty too.
                drop(store);
                store = store::open(spec, dir)?;
                forget(dir)?;
            }
            let (partition, position) = keys[fastrand::usize(..keys.len())];
            let start = Instant::now();
            let value = store.get(partition, position)?.context("a commit is missing")?;
            times.push(start.elapsed().as_nanos() as f64 / 1e3);
            ensure!(verify(partition, position, &value).is_some(), "a wrong commit");
        }
        times.sort_unstable_by(f64::total_cmp);
        let at = |q: f64| times[(q * (times.len() - 1) as f64) as usize];
        write!(figures, "{name}_p50={:.1} {name}_p99={:.1} ", at(0.5), at(0.99))?;
    }
    Ok(figures)
}

/// Takes the files out of the page cache.
fn forget(dir: &Path) -> Result<()> {
    for path in crate::files(dir)? {
        let file = std::fs::File::open(path)?;
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

pub fn wait_for_line() -> Result<()> {
    std::io::stdout().flush()?;
    let mut line = String::new();
    ensure!(std::io::stdin().lock().read_line(&mut line)? > 0, "nobody is there");
    Ok(())
}

pub fn size(dir: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    // What is allocated: a file may be longer than what it takes. One may be gone by now.
    Ok(crate::files(dir)?
        .iter()
        .filter_map(|path| path.metadata().ok())
        .map(|m| m.blocks() * 512)
        .sum())
}

fn written() -> Result<u64> {
    let io = std::fs::read_to_string("/proc/self/io")?;
    let line =
        io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).context("no write_bytes")?;
    Ok(line.parse()?)
}

/// What the whole disk has written: the process's own count goes by the pages of a folio, dirty or not, and leaves out
/// the file system's journal. Others who write at the same time are in it.
fn disk(dir: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let device = std::fs::metadata(dir)?.dev();
    let (major, minor) =
        (rustix::fs::major(device).to_string(), rustix::fs::minor(device).to_string());
    let disks = std::fs::read_to_string("/proc/diskstats")?;
    for line in disks.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields.len() > 9 && fields[0] == major && fields[1] == minor {
            return Ok(fields[9].parse::<u64>()? * 512);
        }
    }
    bail!("the disk of {} is not in /proc/diskstats", dir.display())
}

/// Seconds of processor time of all threads, in user mode and in the kernel.
fn cpu() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().context("stat")?.split_whitespace().collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

/// In MiB.
fn status(name: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line =
        status.lines().find(|line| line.starts_with(name)).context("no such line in status")?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse::<u64>()? >> 10)
}
