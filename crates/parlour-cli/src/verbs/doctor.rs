//! `parlour doctor`: what a host needs of this machine, and how to remedy what it lacks.

mod disk;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parlour_host::Config;
use parlour_host::store::{self, Stop, Store, StoreError};
use rustix::process::{Resource, getrlimit};
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};

use crate::args::{Client, Doctor};
use crate::data;
use crate::exit::{Code, Failure};
use crate::output::{Mode, Output, escape};
use crate::rest::{Rest, text};
use crate::room;
use crate::verbs::serve;

/// Descriptors that a host needs beside those of its connections.
const FILES: u64 = 64;
/// Whatever has the port and is a host answers within this.
const ANSWER: Duration = Duration::from_secs(2);
/// By how much two clocks may differ over the time that the checks take.
const DRIFT: Duration = Duration::from_millis(100);
/// 2025-01-01: no clock that is right says that it is earlier.
const EARLIEST: Duration = Duration::from_secs(1_735_689_600);

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Ok,
    Warning,
    Failed(Code),
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed(_) => "FAILED",
        }
    }
}

/// What came of one check.
#[derive(Debug)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    detail: String,
    hint: Option<String>,
    figures: Map<String, Value>,
}

impl Finding {
    fn new(check: &'static str, verdict: Verdict, detail: impl Into<String>) -> Self {
        Self { check, verdict, detail: detail.into(), hint: None, figures: Map::new() }
    }

    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self::new(check, Verdict::Ok, detail)
    }

    fn warning(check: &'static str, detail: impl Into<String>) -> Self {
        Self::new(check, Verdict::Warning, detail)
    }

    /// What would end `parlour serve`.
    fn of(check: &'static str, failure: &Failure) -> Self {
        let fault = failure.faults().first();
        let detail = fault.map(|fault| fault.detail().to_owned()).unwrap_or_default();
        let finding = Self::new(check, Verdict::Failed(failure.code()), detail);
        match fault.and_then(|fault| fault.hint_text()) {
            Some(hint) => finding.hint(hint),
            None => finding,
        }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn figure(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.figures.insert(name.to_owned(), value.into());
        self
    }

    fn document(&self) -> Value {
        let verdict = self.verdict.name().to_ascii_lowercase();
        let mut document = json!({
            "check": self.check,
            "verdict": verdict,
            "detail": self.detail,
            "hint": self.hint,
        });
        if let Value::Object(fields) = &mut document {
            fields.extend(self.figures.clone());
        }
        document
    }
}

pub(crate) fn run(args: &Doctor, output: &Output) -> Result<Code, Failure> {
    let listen = args.listen.clone().map(|address| ("--listen", "server.listen", address));
    let config = data::settings_with(&args.data, listen, output)?.config;
    let dir = data::directory(&config)?;
    let (begun, time) = (Instant::now(), SystemTime::now());
    let retention = config.durable.retention_bytes.0 as u64;
    let at = dir.clone();
    let disk = data::work(output, move |stop, _| disk::check(&at, retention, &stop))?;
    room::run(async {
        let (port, has_host) = port(&config).await;
        let (used, port) = together(&dir, port, has_host);
        let mut findings = vec![kept(&dir)];
        findings.extend(disk);
        findings.extend([used, port, descriptors(&config), clock(&dir, begun, time)]);
        show(&findings, output)?;
        let failed = findings.iter().find_map(|finding| match finding.verdict {
            Verdict::Failed(code) => Some(code),
            _ => None,
        });
        Ok(failed.unwrap_or(Code::Ok))
    })
}

/// What is in the directory, as far as can be said without reading all of it.
fn kept(dir: &Path) -> Finding {
    const CHECK: &str = "data";
    match Store::open(dir, Stop::default()) {
        Ok(_) => Finding::ok(CHECK, "there is data of a format that this version knows")
            .hint("`parlour verify` reads all of it"),
        Err(StoreError::Missing(_)) => Finding::ok(CHECK, "there is none yet"),
        Err(error) => Finding::of(CHECK, &data::store_failure(&error)),
    }
}

/// Whether a host may have the address, and whether one has it already.
async fn port(config: &Config) -> (Finding, bool) {
    const CHECK: &str = "port";
    let address = &config.server.listen;
    let Err(error) = TcpListener::bind(address).await else {
        return (Finding::ok(CHECK, format!("{address} is free")), false);
    };
    let refused = serve::refused(address, &error);
    if refused.code() != Code::AlreadyRunning {
        return (Finding::of(CHECK, &refused), false);
    }
    let token_file = Some(config.server.token_file.as_str()).filter(|file| !file.is_empty());
    let url = format!("http://{address}");
    let client = Client { url, token_file: token_file.map(PathBuf::from) };
    let ask = async { Rest::new(&client)?.read("/version").await };
    let Ok(answer) = timeout(ANSWER, ask).await else {
        return (Finding::of(CHECK, &refused), false);
    };
    let name = match answer {
        Ok(version) if text(&version, "name") == "parlour" => {
            format!("parlour {}", text(&version, "version"))
        }
        // It wants a token, as only a host does in this way.
        Err(failure) if failure.is_of_host() && failure.code() == Code::Denied => "parlour".into(),
        _ => return (Finding::of(CHECK, &refused), false),
    };
    let taken = Verdict::Failed(Code::AlreadyRunning);
    let finding = Finding::new(CHECK, taken, format!("{name} listens on {address}"))
        .hint("end that host first, or take another port with --listen");
    (finding, true)
}

/// Whether a host uses the directory. If one also answers, it is taken for the same.
fn together(dir: &Path, mut port: Finding, has_host: bool) -> (Finding, Finding) {
    const CHECK: &str = "other host";
    let is_used = match store::is_in_use(dir) {
        Ok(is_used) => is_used,
        Err(error) => return (Finding::of(CHECK, &data::store_failure(&error)), port),
    };
    let used = match (is_used, has_host) {
        (false, _) => Finding::ok(CHECK, "none uses the directory"),
        (true, true) => {
            (port.verdict, port.hint) = (Verdict::Ok, None);
            Finding::ok(CHECK, "a host uses the directory, and one answers")
        }
        (true, false) => {
            let taken = Verdict::Failed(Code::AlreadyRunning);
            Finding::new(CHECK, taken, format!("one uses {}", dir.display())).hint(
                "end it first, or give this one a directory of its own with --data DIR; \
                 --listen ADDR says where the one that runs is",
            )
        }
    };
    (used, port)
}

fn descriptors(config: &Config) -> Finding {
    const CHECK: &str = "descriptors";
    let limit = getrlimit(Resource::Nofile);
    let shown = |limit: Option<u64>| limit.map_or_else(|| "no limit".into(), |it| it.to_string());
    let needed = config.limits.connections as u64 + FILES;
    let (soft, hard) = (shown(limit.current), shown(limit.maximum));
    let detail = format!(
        "at most {hard} (soft limit {soft}, which a host raises), and limits.connections needs {needed}"
    );
    let finding = if limit.maximum.is_some_and(|hard| hard < needed) {
        Finding::warning(CHECK, detail).hint(
            "raise it (`ulimit -Hn`, LimitNOFILE= of a systemd unit), or lower limits.connections",
        )
    } else {
        Finding::ok(CHECK, detail)
    };
    finding.figure("soft", limit.current).figure("hard", limit.maximum).figure("needed", needed)
}

/// Whether the clock agrees with itself, with the data, and whether something keeps it right.
fn clock(dir: &Path, begun: Instant, time: SystemTime) -> Finding {
    const CHECK: &str = "clock";
    let elapsed = begun.elapsed();
    let now = SystemTime::now();
    let went = now.duration_since(time).ok();
    if went.is_none_or(|went| went.abs_diff(elapsed) > DRIFT) {
        let detail =
            format!("it was set while this ran: {elapsed:?} passed, and it says otherwise");
        return Finding::warning(CHECK, detail)
            .hint("have one service alone keep it right, such as chrony or systemd-timesyncd");
    }
    let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    if since_epoch < EARLIEST {
        return Finding::warning(CHECK, format!("it says {} s after 1970", since_epoch.as_secs()))
            .hint("set it, and have chrony or systemd-timesyncd keep it right");
    }
    let newest = Store::open(dir, Stop::default()).and_then(|store| store.time()).ok().flatten();
    let ahead = newest.map(|newest| Duration::from_millis(newest.0).saturating_sub(since_epoch));
    if let Some(ahead) = ahead.filter(|ahead| *ahead > DRIFT) {
        return Finding::warning(CHECK, format!("the newest data is {ahead:?} ahead of it")).hint(
            "it was set back, and a host goes on where the data is; if it is wrong now, set it",
        );
    }
    Finding::ok(CHECK, format!("it runs evenly; {}", keeper()))
}

/// What keeps the clock right, as far as that can be seen.
fn keeper() -> String {
    if Path::new("/run/systemd/timesync/synchronized").exists() {
        return "systemd-timesyncd has set it right".into();
    }
    let daemons = [
        ("chrony", "/run/chrony/chronyd.pid"),
        ("chrony", "/run/chronyd.pid"),
        ("ntpd", "/run/ntpd.pid"),
        ("OpenNTPD", "/run/ntpd.sock"),
    ];
    match daemons.iter().find(|(_, file)| Path::new(file).exists()) {
        Some((name, _)) => format!("{name} keeps it right"),
        None => "whether anything keeps it right cannot be seen from here".into(),
    }
}

fn show(findings: &[Finding], output: &Output) -> Result<(), Failure> {
    if output.mode() != Mode::Text {
        let items: Vec<_> = findings.iter().map(Finding::document).collect();
        let failed = findings.iter().any(|it| matches!(it.verdict, Verdict::Failed(_)));
        return output.json(&json!({"ok": !failed, "checks": items}));
    }
    for finding in findings {
        let (verdict, check) = (finding.verdict.name(), finding.check);
        output.line(&format!("{verdict:<9}{check:<15}{}", escape(&finding.detail)))?;
        if let Some(hint) = &finding.hint {
            output.line(&format!("{:<24}hint: {}", "", escape(hint)))?;
        }
    }
    Ok(())
}
