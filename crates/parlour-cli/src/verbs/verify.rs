//! `parlour verify`: reads all that is kept, and says what of it is damaged.

use std::path::Path;

use parlour_host::store::{self, Report, Store};
use serde_json::{Value, json};

use crate::args::Verify;
use crate::data;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, escape};

pub(crate) fn run(args: &Verify, output: &Output) -> Result<Code, Failure> {
    let settings = data::settings(&args.data, output)?;
    let Some(backup) = &args.file else {
        let dir = data::directory(&settings.config)?;
        let from = dir.clone();
        let mut report =
            data::work(output, move |stop, watch| Store::open(&from, stop)?.verify(watch))?;
        show(&dir, &report, output)?;
        // What contradicts damaged logs may be the view's being right.
        let can_repair = args.repair_view && report.damages.is_empty();
        if can_repair && report.view.as_ref().is_some_and(|view| !view.is_right()) {
            store::forget_view(&dir).map_err(|error| data::store_failure(&error))?;
            output.note("the view was removed; the next host makes it anew");
            report.view = None;
        }
        return judge(&dir, &report);
    };
    refuse_directory(backup)?;
    let from = backup.clone();
    let report =
        data::work(output, move |stop, watch| Store::open_backup(&from, stop)?.verify(watch))?;
    show(backup, &report, output)?;
    judge(backup, &report)
}

/// A backup is a file.
pub(crate) fn refuse_directory(backup: &Path) -> Result<(), Failure> {
    if !backup.is_dir() {
        return Ok(());
    }
    let failure =
        Failure::new(Code::Usage, format!("{} is a directory, not a backup", backup.display()));
    Err(failure.hint("name the directory of a host with --data DIR"))
}

fn judge(path: &Path, report: &Report) -> Result<Code, Failure> {
    if report.is_sound() {
        return Ok(Code::Ok);
    }
    let path = path.display();
    Err(if report.damages.is_empty() {
        Failure::new(Code::Storage, format!("{path}: the view is not what the logs say"))
            .hint("end the host, and have it made anew: `parlour verify --repair-view`")
    } else {
        Failure::new(Code::Storage, format!("{path} is damaged"))
            .hint("look at the disk; `parlour restore` puts a backup into another directory")
    })
}

/// Prints what is there, and what of it is damaged.
pub(crate) fn show(path: &Path, report: &Report, output: &Output) -> Result<(), Failure> {
    if output.mode() != Mode::Text {
        return output.json(&document(path, report));
    }
    let state = if report.is_sound() { "as it was written" } else { "DAMAGED" };
    output.line(&format!("{}: {state}", escape(&path.display().to_string())))?;
    let (totals, standing) = (report.totals, report.standing);
    let ended = totals.completed + totals.cancelled + totals.expired + totals.discarded;
    let lines = [
        ("format", report.format.to_string()),
        ("partitions", report.partitions.to_string()),
        ("commits", format!("{}, {}", report.commits, data::mebibytes(report.bytes))),
        ("accepted", totals.accepted.to_string()),
        ("ended", ended.to_string()),
        ("not ended", (standing.waiting + standing.in_flight).to_string()),
        ("dead", standing.dead.to_string()),
    ];
    for (name, value) in lines {
        output.line(&format!("{name:<16}{value}"))?;
    }
    if let Some(view) = &report.view {
        let state = match &view.unreadable {
            Some(error) => format!("cannot be read: {}", escape(error)),
            None if view.is_right() => format!("{} ends, as the logs say", view.ends),
            None => format!(
                "{} ends; {} missing, {} elsewhere, {} too many",
                view.ends, view.missing, view.misplaced, view.surplus
            ),
        };
        output.line(&format!("{:<16}{state}", "view"))?;
    }
    for damage in &report.damages {
        output.line(&format!("{:<16}{}", "damaged", escape(&damage.to_string())))?;
    }
    Ok(())
}

fn document(path: &Path, report: &Report) -> Value {
    let (totals, standing) = (report.totals, report.standing);
    let damaged: Vec<_> = report
        .damages
        .iter()
        .map(|damage| {
            json!({
                "partition": damage.commit.map(|(partition, _)| partition.0),
                "position": damage.commit.map(|(_, position)| position.0),
                "needed": damage.is_needed,
                "detail": damage.detail,
            })
        })
        .collect();
    json!({
        "path": path.display().to_string(),
        "sound": report.is_sound(),
        "format": report.format,
        "partitions": report.partitions,
        "commits": report.commits,
        "bytes": report.bytes,
        "oldest": report.times.map(|(oldest, _)| oldest.0),
        "newest": report.times.map(|(_, newest)| newest.0),
        "deliveries": {
            "accepted": totals.accepted,
            "completed": totals.completed,
            "cancelled": totals.cancelled,
            "expired": totals.expired,
            "discarded": totals.discarded,
            "waiting": standing.waiting,
            "in_flight": standing.in_flight,
            "dead": standing.dead,
        },
        "damaged": damaged,
        "view": report.view.as_ref().map(|view| json!({
            "right": view.is_right(),
            "ends": view.ends,
            "missing": view.missing,
            "misplaced": view.misplaced,
            "surplus": view.surplus,
            "unreadable": view.unreadable,
        })),
    })
}
