//! Runs the simulation over many seeds, or shows one: `scripts/torture sim` has the options.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people at a terminal"
)]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

#[path = "../sim/mod.rs"]
mod sim;

struct Options {
    seeds: u64,
    from: u64,
    seed: Option<u64>,
    verbose: bool,
    bugs: bool,
    bug: Option<String>,
}

fn options() -> Result<Options, String> {
    let mut options =
        Options { seeds: 20_000, from: 0, seed: None, verbose: false, bugs: false, bug: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut number = || {
            let value = arguments.next().ok_or_else(|| format!("{name} wants a number"))?;
            value.parse().map_err(|_| format!("{name} wants a number, not `{value}`"))
        };
        match name.as_str() {
            "--seeds" => options.seeds = number()?,
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
        return bugs();
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
        println!("seed {seed}: {} calls, hash {:016x}", report.calls, report.hash);
        report.counts.iter().for_each(|(what, times)| println!("  {times} {what}"));
        report.violations.iter().for_each(|violation| println!("  {violation}"));
        return if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    many(&options)
}

/// Shows after how many seeds each mistake is found.
fn bugs() -> ExitCode {
    let mut missed = false;
    for name in sim::MISTAKES {
        match sim::find(name, 1000) {
            Some((seed, violation)) => println!("{name}: seed {seed}: {violation}"),
            None => {
                missed = true;
                println!("{name}: NOT FOUND by 1,000 seeds");
            }
        }
    }
    if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Runs all seeds, on all cores.
fn many(options: &Options) -> ExitCode {
    let began = tokio::time::Instant::now();
    let end = options.from.saturating_add(options.seeds);
    let (next, failed, calls) =
        (AtomicU64::new(options.from), AtomicU64::new(0), AtomicU64::new(0));
    let counts = Mutex::new(BTreeMap::new());
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let report = sim::run(seed, false);
                    calls.fetch_add(report.calls as u64, Ordering::Relaxed);
                    for (what, times) in report.counts {
                        let mut counts = counts.lock().unwrap_or_else(|it| it.into_inner());
                        *counts.entry(what).or_insert(0) += times;
                    }
                    let done = seed - options.from + 1;
                    if done.is_multiple_of(1000) {
                        eprintln!("{done} seeds");
                    }
                    if !report.violations.is_empty() {
                        failed.fetch_add(1, Ordering::Relaxed);
                        println!("seed {seed} failed:");
                        report.violations.iter().for_each(|violation| println!("  {violation}"));
                        println!("  scripts/torture sim --seed {seed} --verbose");
                    }
                }
            });
        }
    });
    for (what, times) in counts.into_inner().unwrap_or_else(|it| it.into_inner()) {
        println!("{times:>8} {what}");
    }
    let (failed, calls) = (failed.into_inner(), calls.into_inner());
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{} seeds from {}, {calls} calls: {failed} failed; {:.0} s, {:.0} seeds a second",
        options.seeds,
        options.from,
        seconds,
        options.seeds as f64 / seconds
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
