//! The whole room under many seeds.

#[path = "../sim/mod.rs"]
mod sim;

use std::collections::BTreeMap;

/// Runs the seeds of one part in six, so that the parts can run at once.
fn part(number: u64) {
    let mut counts = BTreeMap::new();
    for seed in (0..300).filter(|seed| seed % 6 == number) {
        let report = sim::run(seed, false);
        assert!(
            report.violations.is_empty(),
            "seed {seed}:\n  {}\nscripts/torture sim --seed {seed} --verbose",
            report.violations.join("\n  ")
        );
        for (what, times) in report.counts {
            *counts.entry(what).or_insert(0) += times;
        }
    }
    for fault in sim::FAULTS {
        assert!(counts.contains_key(fault), "no {fault}: {counts:?}");
    }
}

#[test]
fn what_must_hold_holds_under_any_seed_1() {
    part(0);
}

#[test]
fn what_must_hold_holds_under_any_seed_2() {
    part(1);
}

#[test]
fn what_must_hold_holds_under_any_seed_3() {
    part(2);
}

#[test]
fn what_must_hold_holds_under_any_seed_4() {
    part(3);
}

#[test]
fn what_must_hold_holds_under_any_seed_5() {
    part(4);
}

#[test]
fn what_must_hold_holds_under_any_seed_6() {
    part(5);
}

/// Mistakes that a host can make, of which each must be found.
#[test]
fn every_mistake_put_in_on_purpose_is_found() {
    for name in sim::MISTAKES {
        assert!(!sim::find(name, 100, false).is_empty(), "no seed of 100 finds {name}");
    }
}

#[test]
fn a_seed_always_takes_the_same_course_and_another_takes_another() {
    for seed in 1000..1010 {
        assert_eq!(sim::run(seed, false).hash, sim::run(seed, false).hash, "seed {seed}");
    }
    assert_ne!(sim::run(1, false).hash, sim::run(2, false).hash);
}
