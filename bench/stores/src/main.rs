//! Measures embedded stores under the schema of a room's log: `stores [--quick] [--dir DIR] [--stores A;B] [SECTION…]`.

#![expect(clippy::disallowed_methods, reason = "the clock is what is measured")]

mod damage;
#[cfg(feature = "fjall")]
mod fjall;
mod floor;
mod load;
#[cfg(feature = "redb")]
mod redb;
#[cfg(feature = "sqlite")]
mod sqlite;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};

use load::{Damage, Load};

const SECTIONS: &[&str] = &["commit", "fsyncs", "retention", "reopen", "torn", "flips", "lookup"];

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(error.downcast_ref::<Damage>().map_or(3, |damage| damage.0 as u8))
        }
    }
}

fn run(arguments: Vec<String>) -> Result<()> {
    let mut options = Options::default();
    let mut rest = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => options.quick = true,
            "--rounds" => options.rounds = Some(arguments.next().context("--rounds N")?.parse()?),
            "--dir" => options.dir = arguments.next().context("--dir DIR")?.into(),
            // Settings have commas, so stores are parted by semicolons.
            "--stores" => {
                options.stores = arguments
                    .next()
                    .context("--stores A;B")?
                    .split(';')
                    .map(str::to_owned)
                    .collect();
            }
            _ => rest.push(argument),
        }
    }
    if let Some((step, [spec, numbers @ ..])) =
        rest.split_first().filter(|(step, _)| step.starts_with('@'))
    {
        return child(step, spec, &options.dir, numbers);
    }
    for section in &rest {
        ensure!(
            SECTIONS.contains(&section.as_str()),
            "no section {section}; there are {SECTIONS:?}"
        );
    }
    options.dir.push(format!("stores-{}", std::process::id()));
    std::fs::create_dir_all(&options.dir)?;
    let outcome = sections(&options, &rest);
    std::fs::remove_dir_all(&options.dir)?;
    outcome
}

/// One step, in this process.
fn child(step: &str, spec: &str, dir: &Path, numbers: &[String]) -> Result<()> {
    let number = |n: usize| {
        numbers.get(n).map(|s| s.parse::<f64>()).transpose().map(|n| n.filter(|n| *n > 0.0))
    };
    let count = |n: usize| Ok::<_, anyhow::Error>(number(n)?.map(|n| n as u64));
    let figures = match step {
        "@load" => load::load(
            spec,
            dir,
            &Load {
                writers: count(0)?.context("writers")? as usize,
                seconds: number(1)?.context("seconds")?,
                commits: count(2)?,
                retain: count(3)?,
                body_every: count(4)?,
            },
        )?,
        "@fill" => return load::fill(spec, dir, count(0)?.context("accepts")?),
        "@steps" => return load::steps(spec, dir, count(0)?.context("transactions")?),
        "@check" => return load::check(spec, dir),
        "@reopen" => load::reopen(spec, dir, count(0)?.is_some())?,
        "@lookup" => load::lookup(spec, dir, count(0)?.context("lookups")? as usize)?,
        _ => bail!("no step {step}"),
    };
    println!("{figures}");
    Ok(())
}

struct Options {
    quick: bool,
    rounds: Option<usize>,
    dir: PathBuf,
    stores: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        let stores = stores_with_features().iter().map(|&name| name.to_owned()).collect();
        Self { quick: false, rounds: None, dir: std::env::temp_dir(), stores }
    }
}

pub fn stores_with_features() -> Vec<&'static str> {
    let mut stores = vec!["file", "file:prealloc=67108864"];
    if cfg!(feature = "sqlite") {
        stores.extend(["sqlite", "sqlite:order=position,page_size=8192"]);
    }
    if cfg!(feature = "redb") {
        stores.extend(["redb", "redb:order=position"]);
    }
    if cfg!(feature = "fjall") {
        stores.push("fjall");
    }
    stores
}

fn sections(options: &Options, wanted: &[String]) -> Result<()> {
    let system = Command::new("stat").args(["-f", "-c", "%T"]).arg(&options.dir).output()?;
    let system = String::from_utf8(system.stdout)?;
    ensure!(system.trim() != "tmpfs", "a file system in memory has no disk to measure; give --dir");
    println!(
        "file system {}, load {}",
        system.trim(),
        std::fs::read_to_string("/proc/loadavg")?.trim()
    );
    let quick = options.quick;
    let rounds = options.rounds.unwrap_or(if quick { 1 } else { 3 });
    let seconds = if quick { "0.4" } else { "2" };
    let readable: Vec<&str> =
        options.stores.iter().map(String::as_str).filter(|s| !s.starts_with("file")).collect();
    let all: Vec<&str> = options.stores.iter().map(String::as_str).collect();
    let with_file: Vec<&str> = all.iter().copied().filter(|s| !s.contains("prealloc")).collect();
    let wants = |section| wanted.is_empty() || wanted.iter().any(|w| w == section);

    if wants("commit") {
        for writers in ["1", "64", "1000"] {
            println!("\ncommit, {writers} writers");
            let columns = ["rate", "p50", "p99", "max", "per_commit", "disk", "cpu"];
            table(&all, rounds, &columns, |spec| {
                Ok(figures(&step(options, "@load", spec, &[writers, seconds])?))
            })?;
        }
        println!("\ncommit, 64 writers, a body of 100 KiB beside every eighth commit");
        let columns = ["rate", "p50", "p99", "disk"];
        table(&readable, rounds, &columns, |spec| {
            Ok(figures(&step(options, "@load", spec, &["64", seconds, "0", "0", "8"])?))
        })?;
    }
    if wants("fsyncs") {
        println!("\nfsyncs a commit, 64 writers");
        table(&all, 1, &["fsync", "fdatasync", "msync", "commits"], |spec| fsyncs(options, spec))?;
    }
    if wants("retention") {
        let (retain, seconds) = if quick { (16 << 20, "1") } else { (256 << 20, "6") };
        println!("\ncommit, accepts and settlements, a log held at {} MiB", retain >> 20);
        for writers in ["64", "1000"] {
            println!("{writers} writers");
            let columns = ["rate", "p50", "p99", "max", "disk", "cpu", "filled", "size", "largest"];
            table(&readable, rounds, &columns, |spec| {
                Ok(figures(&step(
                    options,
                    "@load",
                    spec,
                    &[writers, seconds, "0", &retain.to_string()],
                )?))
            })?;
        }
    }
    let accepts = if quick { "50000" } else { "1000000" };
    if wants("reopen") {
        for (text, cold) in [("out of memory", "0"), ("out of the disk", "1")] {
            println!("\nreopening {accepts} accepts after kill -9, {text}");
            let columns = ["open", "read", "commits", "bytes", "peak", "anonymous"];
            table(&with_file, rounds, &columns, |spec| {
                let dir = damage::killed(options, spec, "@fill", accepts)?.0;
                let size = load::size(&dir)?;
                let mut row = figures(&run_step("@reopen", spec, &dir, &[cold])?);
                row.insert("size".into(), size as f64);
                std::fs::remove_dir_all(dir)?;
                Ok(row)
            })?;
        }
    }
    if wants("torn") {
        damage::torn(options, &with_file)?;
    }
    if wants("flips") {
        damage::flips(options, &readable)?;
    }
    if wants("lookup") {
        println!("\npoint lookup among {accepts} accepts in commits of 64, µs");
        table(&readable, rounds, &["cold_p50", "cold_p99", "warm_p50", "warm_p99"], |spec| {
            let dir = damage::killed(options, spec, "@fill", accepts)?.0;
            let row =
                figures(&run_step("@lookup", spec, &dir, &[if quick { "2000" } else { "20000" }])?);
            std::fs::remove_dir_all(dir)?;
            Ok(row)
        })?;
    }
    println!("load {}", std::fs::read_to_string("/proc/loadavg")?.trim());
    Ok(())
}

/// Interleaved rounds; prints the median of each column.
fn table(
    stores: &[&str],
    rounds: usize,
    columns: &[&str],
    mut measure: impl FnMut(&str) -> Result<BTreeMap<String, f64>>,
) -> Result<()> {
    let mut rows = vec![Vec::new(); stores.len()];
    for _ in 0..rounds {
        for (store, row) in stores.iter().zip(&mut rows) {
            row.push(measure(store).with_context(|| (*store).to_owned())?);
        }
    }
    let width = stores.iter().map(|s| s.len()).max().unwrap_or(0);
    println!(
        "{:width$} {}",
        "",
        columns.iter().fold(String::new(), |line, c| line + &format!(" {c:>13}"))
    );
    for (store, row) in stores.iter().zip(&rows) {
        print!("{store:width$} ");
        for column in columns {
            let mut values: Vec<f64> =
                row.iter().filter_map(|figures| figures.get(*column)).copied().collect();
            values.sort_unstable_by(f64::total_cmp);
            let median = values.get(values.len() / 2).copied().unwrap_or(f64::NAN);
            print!(
                " {:>13}",
                if median.fract() == 0.0 { format!("{median}") } else { format!("{median:.2}") }
            );
        }
        println!();
    }
    Ok(())
}

/// A step on a store that is new.
fn step(options: &Options, step: &str, spec: &str, numbers: &[&str]) -> Result<String> {
    let dir = options.dir.join("new");
    let line = run_step(step, spec, &dir, numbers);
    std::fs::remove_dir_all(dir)?;
    line
}

fn run_step(step: &str, spec: &str, dir: &Path, numbers: &[&str]) -> Result<String> {
    let output = command(step, spec, dir)?.args(numbers).output()?;
    ensure!(output.status.success(), "{step} {spec}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn command(step: &str, spec: &str, dir: &Path) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--dir").arg(dir).args([step, spec]);
    Ok(command)
}

fn figures(line: &str) -> BTreeMap<String, f64> {
    let pairs = line.split_whitespace().filter_map(|pair| pair.split_once('='));
    pairs.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
}

/// How often a store makes the disk write, counted by strace in a run that is not timed.
fn fsyncs(options: &Options, spec: &str) -> Result<BTreeMap<String, f64>> {
    let dir = options.dir.join("traced");
    let report = options.dir.join("strace");
    let commits = if options.quick { 300 } else { 3000 };
    let output = Command::new("strace")
        .args(["-f", "-c", "-e", "trace=fsync,fdatasync,msync,sync_file_range", "-o"])
        .arg(&report)
        .arg(std::env::current_exe()?)
        .arg("--dir")
        .arg(&dir)
        .args(["@load", spec, "64", "600", &commits.to_string()])
        .output();
    let Ok(output) = output else {
        println!("no strace: skipped");
        return Ok(BTreeMap::new());
    };
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut row = BTreeMap::from([("commits".to_owned(), f64::from(commits))]);
    for line in std::fs::read_to_string(&report)?.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [_, _, _, calls, .., name] = words[..]
            && let Ok(calls) = calls.parse::<f64>()
        {
            row.insert(name.to_owned(), calls / f64::from(commits));
        }
    }
    std::fs::remove_dir_all(dir)?;
    Ok(row)
}

/// All files of a store, in order of their names.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(self::files(&path)?);
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
