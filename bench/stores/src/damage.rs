//! What a store makes of files that a power cut or a bad disk left behind.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{Options, command, files};

/// The smallest piece that a disk writes whole.
const SECTOR: usize = 512;

type Files = BTreeMap<PathBuf, Vec<u8>>;

/// Runs a step until it says a line, kills it, and returns its directory and the line.
pub fn killed(
    options: &Options,
    spec: &str,
    step: &str,
    number: &str,
) -> Result<(PathBuf, String)> {
    let dir = options.dir.join("killed");
    let mut running = Running::start(spec, &dir, step, number)?;
    let line = running.line()?;
    running.child.kill()?;
    running.child.wait()?;
    Ok((dir, line))
}

struct Running {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Running {
    fn start(spec: &str, dir: &Path, step: &str, number: &str) -> Result<Self> {
        let mut child = command(step, spec, dir)?
            .arg(number)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("stdout")?);
        Ok(Self { child, lines })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.lines.read_line(&mut line)? > 0, "the step ended");
        Ok(line.trim().to_owned())
    }
}

/// How a store took it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Outcome {
    /// Everything acknowledged is there.
    Whole,
    /// It says so itself, with an error or a panic.
    Store,
    /// The checksum of a commit does not match.
    Checksum,
    /// A position is missing between two others.
    Gap,
    /// Acknowledged commits at the end of a partition are gone, and nothing says so.
    Lost,
    /// It opened, though it did not end in 10 s.
    Hung,
}

fn check(spec: &str, dir: &Path, acknowledged: &[u64]) -> Result<Outcome> {
    let mut child = command("@check", spec, dir)?;
    let mut child =
        child.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if std::time::Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Ok(Outcome::Hung);
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    Ok(match status.code() {
        Some(0) => {
            let line = std::io::read_to_string(child.stdout.take().context("stdout")?)?;
            let last = numbers(&line)?;
            if last.iter().zip(acknowledged).all(|(have, want)| have >= want) {
                Outcome::Whole
            } else {
                Outcome::Lost
            }
        }
        Some(4) => Outcome::Checksum,
        Some(5) => Outcome::Gap,
        _ => Outcome::Store,
    })
}

fn numbers(line: &str) -> Result<Vec<u64>> {
    Ok(line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
}

/// A power cut during the last commit: any part of what it wrote may be on the disk.
pub fn torn(options: &Options, stores: &[&str]) -> Result<()> {
    let (transactions, times) = if options.quick { ("20", 20) } else { ("40", 300) };
    println!(
        "\ntorn: any sectors of the unacknowledged commit; the longest-growing file cut within it; cut before it"
    );
    for spec in stores {
        let dir = options.dir.join("killed");
        let mut running = Running::start(spec, &dir, "@steps", transactions)?;
        let acknowledged = numbers(&running.line()?)?;
        let before = read(&dir)?;
        running.child.stdin.as_mut().context("stdin")?.write_all(b"\n")?;
        running.line()?;
        running.child.kill()?;
        running.child.wait()?;
        let after = read(&dir)?;
        std::fs::remove_dir_all(&dir)?;

        let try_with = |state: &Files| -> Result<Outcome> {
            write(&dir, state)?;
            let outcome = check(spec, &dir, &acknowledged);
            std::fs::remove_dir_all(&dir)?;
            outcome
        };
        ensure!(
            try_with(&before)? == Outcome::Whole && try_with(&after)? == Outcome::Whole,
            "{spec}: not whole"
        );
        let mut outcomes = BTreeMap::new();
        for _ in 0..times {
            *outcomes.entry(try_with(&mixed(&before, &after))?).or_insert(0) += 1;
        }
        println!("{spec}: any sectors {outcomes:?}");

        let empty = Vec::new();
        let start = |path: &PathBuf| before.get(path).unwrap_or(&empty).len();
        // The shared memory of a WAL is rebuilt, and its length says nothing.
        let logs = after.iter().filter(|(path, _)| !path.to_string_lossy().ends_with("-shm"));
        let (log, bytes) = logs
            .max_by_key(|(path, bytes)| bytes.len() - start(path).min(bytes.len()))
            .context("no file")?;
        let (start, end) = (start(log), bytes.len());
        let (mut within, mut earlier) = (BTreeMap::new(), BTreeMap::new());
        for n in 0..times {
            let mut state = after.clone();
            let cut = start + (end - start) * n / times;
            state.get_mut(log).context("the log")?.truncate(cut);
            *within.entry(try_with(&state)?).or_insert(0) += 1;
            state.get_mut(log).context("the log")?.truncate(fastrand::usize(1..start.max(2)));
            *earlier.entry(try_with(&state)?).or_insert(0) += 1;
        }
        if end > start {
            println!("{spec}: {} cut at {start}..{end} {within:?}", log.display());
        } else {
            println!("{spec}: no file grew with the last commit");
        }
        println!("{spec}: {} cut before {start} {earlier:?}", log.display());
    }
    Ok(())
}

/// Some sectors as they were before, some as after; the length of the one or the other.
fn mixed(before: &Files, after: &Files) -> Files {
    let mut state = after.clone();
    for (path, bytes) in &mut state {
        let old = before.get(path).map_or(&[][..], Vec::as_slice);
        if old == bytes.as_slice() {
            continue;
        }
        let share = fastrand::f64();
        for at in (0..bytes.len()).step_by(SECTOR) {
            if fastrand::f64() < share {
                continue;
            }
            let end = bytes.len().min(at + SECTOR);
            for (offset, byte) in bytes[at..end].iter_mut().enumerate() {
                *byte = old.get(at + offset).copied().unwrap_or(0);
            }
        }
        if fastrand::bool() && fastrand::bool() && old.len() < bytes.len() {
            bytes.truncate(old.len());
        }
    }
    state
}

/// One bit, anywhere in the files of a store that was killed.
pub fn flips(options: &Options, stores: &[&str]) -> Result<()> {
    let (transactions, times) = if options.quick { ("100", 25) } else { ("300", 300) };
    println!("\nflips: one bit anywhere");
    for spec in stores {
        let (dir, line) = killed(options, spec, "@steps", transactions)?;
        let acknowledged = numbers(&line)?;
        let whole = read(&dir)?;
        std::fs::remove_dir_all(&dir)?;
        let total: usize = whole.values().map(Vec::len).sum();
        let mut outcomes = BTreeMap::new();
        for _ in 0..times {
            let mut state = whole.clone();
            let mut at = fastrand::usize(..total);
            for (path, bytes) in &mut state {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << fastrand::u8(..8);
                    let name =
                        path.extension().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
                    write(&dir, &state)?;
                    *outcomes.entry((name, check(spec, &dir, &acknowledged)?)).or_insert(0) += 1;
                    std::fs::remove_dir_all(&dir)?;
                    break;
                }
                at -= bytes.len();
            }
        }
        println!("{spec}: {} KiB {outcomes:?}", total >> 10);
    }
    Ok(())
}

fn read(dir: &Path) -> Result<Files> {
    files(dir)?
        .into_iter()
        .map(|path| Ok((path.strip_prefix(dir)?.to_owned(), std::fs::read(&path)?)))
        .collect()
}

fn write(dir: &Path, state: &Files) -> Result<()> {
    for (path, bytes) in state {
        let path = dir.join(path);
        std::fs::create_dir_all(path.parent().context("a parent")?)?;
        std::fs::write(path, bytes)?;
    }
    Ok(())
}
