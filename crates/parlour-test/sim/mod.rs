//! A whole room under one seed: workers, callers and topics on a network that fails in every way a
//! network can, and what must hold whatever happens.
//!
//! One seed always takes the same course. All choices come from it; the runtime has one thread and a
//! paused clock; what host and SDK draw at random comes from `fastrand`, which is seeded too.

mod agents;
mod book;
mod callers;
mod calm;
mod chaos;
mod old;
mod referee;
mod slots;
mod web;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once};
use std::time::Duration;

use fastrand::Rng;
use parlour::Client;
use parlour_test::{Config, Network, Room};
use tokio::task::JoinSet;
use tokio::time::timeout;

use book::Book;
use old::Old;
use slots::Slot;

/// What became of one seed.
#[derive(Debug)]
pub(crate) struct Report {
    /// Of everything that happened, with its times.
    pub(crate) hash: u64,
    /// How often which fault, and what only a fault can bring about, happened; and how many calls.
    pub(crate) counts: BTreeMap<&'static str, u64>,
    /// What should have held and did not.
    pub(crate) violations: Vec<String>,
}

/// Everyone and everything of one run.
struct Stage {
    room: Room,
    book: Book,
    slots: Vec<Slot>,
    callers: Vec<Caller>,
    /// How long a call may take that states no deadline.
    default_timeout: Duration,
    /// Whether the client of the dialect has its socket.
    is_old_up: AtomicBool,
}

/// A program that calls, publishes and subscribes.
struct Caller {
    number: u32,
    client: Client,
    network: Network,
}

/// How long everything may take to find back together once all faults have ended. The longest
/// heartbeat is 15 s, and a peer counts as dead after two.
const RECOVERY: Duration = Duration::from_secs(120);

/// How long a run may take, by its own clock.
const LONGEST: Duration = Duration::from_secs(3600);

/// Runs one seed. `print` shows each step as it happens.
pub(crate) fn run(seed: u64, print: bool) -> Report {
    count_panics();
    let panics = PANICS.get();
    fastrand::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O");
    let book = runtime.block_on(async {
        let book = Book::new(print);
        if timeout(LONGEST, simulate(seed, &book)).await.is_err() {
            book.violation(format!("the run has not ended after {LONGEST:?}"));
        }
        book
    });
    drop(runtime);
    if PANICS.get() > panics {
        book.violation("a task panicked".to_owned());
    }
    book.report()
}

async fn simulate(seed: u64, book: &Book) {
    let mut rng = Rng::with_seed(seed);
    let config = config(&mut rng);
    let default_timeout = config.calls.default_timeout;
    let room = Room::with_config(config);
    let slots: Vec<_> =
        (0..rng.usize(1..=4)).map(|number| Slot::start(number, &room, book)).collect();
    let mut callers = Vec::new();
    for number in 0..rng.u32(1..=3) {
        let builder = Client::builder(room.url()).name(format!("caller {number}"));
        match room.join(builder).await {
            Ok((client, network)) => callers.push(Caller { number, client, network }),
            Err(error) => book.violation(format!("caller {number} cannot connect: {error}")),
        }
    }
    let is_old_up = AtomicBool::new(false);
    let stage = Stage { room, book: book.clone(), slots, callers, default_timeout, is_old_up };
    let stage = Arc::new(stage);
    let (old, listener) = (Old::start(&stage, rng.fork()), web::Listener::start(&stage, &mut rng));
    calm::recover(&stage).await;

    let mut work = JoinSet::new();
    let referee = referee::Referee::start(&stage, rng.fork());
    callers::subscribe(&stage, &mut rng).await;
    for index in 0..stage.callers.len() {
        work.spawn(callers::work(stage.clone(), index, rng.fork()));
    }
    work.spawn(web::work(stage.clone(), rng.fork()));
    // One seed in ten sees nothing but good weather.
    if rng.u8(..10) > 0 {
        chaos::storm(&stage, rng.fork()).await;
    }
    chaos::end(&stage).await;
    old.stay();
    let ended =
        timeout(Duration::from_secs(600), async { while work.join_next().await.is_some() {} });
    if ended.await.is_err() {
        book.violation("callers still wait, long after the last deadline".to_owned());
    }
    calm::recover(&stage).await;
    calm::check(&stage, &mut rng).await;
    referee.stop().await;
    old.stop().await;
    listener.stop().await;
    calm::leave(stage).await;
}

/// A host whose limits are met now and then.
fn config(rng: &mut Rng) -> Config {
    let mut config = Config::default();
    let choices: [(&str, &[&str]); 8] = [
        ("calls.default_timeout", &["5s", "10s", "30s"]),
        ("timeouts.grace", &["100ms", "1s", "5s", "5s"]),
        ("timeouts.heartbeat", &["2s", "5s", "15s"]),
        ("timeouts.stalled_write", &["2s", "10s"]),
        ("limits.queue_messages", &["48", "256", "4096"]),
        ("limits.queue_bytes", &["256KiB", "8MiB"]),
        ("limits.worker_in_flight", &["64", "1024"]),
        ("server.drain_timeout", &["1s", "25s"]),
    ];
    for (key, values) in choices {
        let value = values[rng.usize(..values.len())];
        config.set(key, value).expect("a setting of this host");
    }
    config
}

/// The mistakes that the crates can be told to make: see `parlour_core::bug`.
pub(crate) const MISTAKES: &[&str] = &[
    "reply_sent_twice",
    "reply_to_dropped",
    "deadline_not_enforced",
    "cancel_not_forwarded",
    "ids_mixed",
    "out_of_order",
    "wrong_subscriber",
    "queue_not_released",
    "session_not_cleaned",
    "drain_forgets_calls",
    "key_moved_too_early",
    "may_have_run_denied",
    "resume_without_deduplication",
    "resume_without_resending",
    "credit_never_returned",
    "progress_left_out",
    "progress_overtaken",
    "waiter_forgotten",
    "refusal_not_named",
    "reset_drops_frames",
];

/// What must have happened somewhere in any fifty seeds, or they show nothing.
pub(crate) const FAULTS: &[&str] = &[
    "calls",
    "connections cut",
    "delays",
    "host crashes",
    "host restarts in order",
    "leaps of the clock",
    "one-way partitions",
    "partitions",
    "recipients named",
    "sessions resumed",
    "sessions resumed by the referee",
    "sessions that the host no longer knew",
    "slow readers",
    "sockets that the dialect left",
    "updates of progress",
    "worker crashes",
    "worker drains",
];

/// Makes one mistake throughout the seeds below `seeds`, or up to the first that finds it, and
/// returns which find it by what.
pub(crate) fn find(mistake: &'static str, seeds: u64, all: bool) -> Vec<(u64, String)> {
    parlour_core::bugs::plant(Some(mistake));
    let found = (0..seeds).filter_map(|seed| {
        let violation = run(seed, false).violations.into_iter().next();
        violation.map(|violation| (seed, violation))
    });
    let found = found.take(if all { usize::MAX } else { 1 }).collect();
    parlour_core::bugs::plant(None);
    found
}

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// A panic in a task is caught by the runtime, and would go unseen.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
    });
}
