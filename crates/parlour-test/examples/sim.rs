//! Runs the simulation over many seeds, or shows one: `scripts/torture sim` has the options.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people at a terminal"
)]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

#[path = "../sim/mod.rs"]
mod sim;

struct Options {
    seeds: Option<u64>,
    from: u64,
    seed: Option<u64>,
    verbose: bool,
    bugs: bool,
    bug: Option<String>,
}

fn options() -> Result<Options, String> {
    let mut options =
        Options { seeds: None, from: 0, seed: None, verbose: false, bugs: false, bug: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut number = || {
            let value = arguments.next().ok_or_else(|| format!("{name} wants a number"))?;
            value.parse().map_err(|_| format!("{name} wants a number, not `{value}`"))
        };
        match name.as_str() {
            "--seeds" => options.seeds = Some(number()?),
            "--from" => options.from = number()?,
            "--seed" => options.seed = Some(number()?),
            "--bugs" => options.bugs = true,
            "--bug" => options.bug = arguments.next(),
            "--verbose" => options.verbose = true,
            _ => return Err(format!("unknown option {name}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    if options.bugs {
        return bugs(options.seeds.unwrap_or(100));
    }
    if let Some(name) = &options.bug {
        let Some(name) = sim::MISTAKES.iter().find(|known| *known == name) else {
            eprintln!("there is no mistake {name}; there are {:?}", sim::MISTAKES);
            return ExitCode::from(2);
        };
        parlour_core::bugs::plant(Some(name));
    }
    if let Some(seed) = options.seed {
        let report = sim::run(seed, options.verbose);
        println!("seed {seed}, hash {:016x}", report.hash);
        report.counts.iter().for_each(|(what, times)| println!("  {times} {what}"));
        report.violations.iter().for_each(|violation| println!("  {violation}"));
        return if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    many(&options)
}

/// Shows how many seeds each mistake takes.
fn bugs(seeds: u64) -> ExitCode {
    let next = AtomicUsize::new(0);
    let missed = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..cores() {
            scope.spawn(|| {
                while let Some(name) = sim::MISTAKES.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let found = sim::find(name, seeds, true);
                    if let Some((first, violation)) = found.first() {
                        let (times, after) = (found.len(), first + 1);
                        println!(
                            "{name}: {times} of {seeds} seeds, first by number {after}: {violation}"
                        );
                    } else {
                        missed.store(true, Ordering::Relaxed);
                        println!("{name}: NOT FOUND by {seeds} seeds");
                    }
                }
            });
        }
    });
    if missed.into_inner() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Runs all seeds, on all cores.
fn many(options: &Options) -> ExitCode {
    let began = tokio::time::Instant::now();
    let (from, seeds) = (options.from, options.seeds.unwrap_or(20_000));
    let (next, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    let counts = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        for _ in 0..cores() {
            scope.spawn(|| {
                loop {
                    let done = next.fetch_add(1, Ordering::Relaxed);
                    if done >= seeds {
                        return;
                    }
                    if done > 0 && done.is_multiple_of(1000) {
                        eprintln!("{done} seeds");
                    }
                    let seed = from.saturating_add(done);
                    let report = sim::run(seed, false);
                    if !report.violations.is_empty() {
                        failed.fetch_add(1, Ordering::Relaxed);
                        println!("seed {seed} failed:");
                        report.violations.iter().for_each(|violation| println!("  {violation}"));
                        println!("  scripts/torture sim --seed {seed} --verbose");
                    }
                    let mut counts = counts.lock().unwrap_or_else(|it| it.into_inner());
                    for (what, times) in report.counts {
                        *counts.entry(what).or_insert(0) += times;
                    }
                }
            });
        }
    });
    let counts = counts.into_inner().unwrap_or_else(|it| it.into_inner());
    counts.iter().for_each(|(what, times)| println!("{times:>10} {what}"));
    let missing: Vec<_> = sim::FAULTS.iter().filter(|it| !counts.contains_key(*it)).collect();
    if seeds >= 50 && !missing.is_empty() {
        println!("of no use: never happened {missing:?}");
        return ExitCode::FAILURE;
    }
    let (failed, seconds) = (failed.into_inner(), began.elapsed().as_secs_f64());
    let rate = seeds as f64 / seconds;
    println!(
        "{seeds} seeds from {from}: {failed} failed; {seconds:.0} s, {rate:.0} seeds a second"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
