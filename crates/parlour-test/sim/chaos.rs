//! Everything that can go wrong, drawn at random.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use parlour_test::{Direction, Network};
use tokio::time::{Instant, advance, sleep};

use super::slots::Order;
use super::{Stage, calm};

/// Faults for some time; not all have ended when this returns.
pub(crate) async fn storm(stage: &Arc<Stage>, mut rng: Rng) {
    let ends = Instant::now() + Duration::from_millis(rng.u64(3000..30_000));
    while Instant::now() < ends {
        sleep(Duration::from_millis(rng.u64(10..3000))).await;
        strike(stage, &mut rng).await;
    }
}

/// One fault.
async fn strike(stage: &Arc<Stage>, rng: &mut Rng) {
    let book = &stage.book;
    match rng.u8(..20) {
        0..9 => {
            let (name, network) = anyone(stage, rng);
            disturb(stage, &name, &network, rng);
        }
        9..12 => {
            let (name, network) = anyone(stage, rng);
            book.counts("connections cut");
            book.note(format_args!("{name} is cut"));
            network.cut();
        }
        12..15 => {
            let slot = &stage.slots[rng.usize(..stage.slots.len())];
            book.counts("worker crashes");
            let order = Order::Crash(Duration::from_millis(rng.u64(..5000)));
            slot.order(order);
        }
        15 | 16 => {
            let slot = &stage.slots[rng.usize(..stage.slots.len())];
            book.counts("worker drains");
            slot.order(Order::Drain(Duration::from_millis(rng.u64(..5000))));
        }
        17 => {
            let pause = Duration::from_millis(rng.u64(..4000));
            calm::count_resumed(stage).await;
            if rng.bool() {
                book.counts("host crashes");
                book.note(format_args!("the host dies for {pause:?}"));
                stage.room.crash().await;
            } else {
                book.counts("host restarts in order");
                book.note(format_args!("the host shuts down, and is away for {pause:?}"));
                stage.room.stop().await;
            }
            sleep(pause).await;
            stage.room.start();
            book.note("the host is back");
        }
        18 => {
            let (from, leap) = (Instant::now(), Duration::from_millis(rng.u64(1..40_000)));
            book.counts("leaps of the clock");
            book.note(format_args!("the clock leaps by {leap:?}"));
            book.leapt(from, from + leap);
            advance(leap).await;
        }
        _ => {
            for (name, network) in everyone(stage) {
                book.note(format_args!("{name} is well"));
                network.heal();
            }
        }
    }
}

/// Makes a network bad, for some time.
fn disturb(stage: &Arc<Stage>, name: &str, network: &Network, rng: &mut Rng) {
    let direction = if rng.bool() { Direction::ToHost } else { Direction::FromHost };
    let book = &stage.book;
    match rng.u8(..8) {
        0..3 => {
            let most = Duration::from_millis(rng.u64(1..400));
            book.counts("delays");
            book.note(format_args!("{name} is slow by up to {most:?}"));
            network.delay_between(Duration::ZERO..=most);
        }
        3 => {
            let (rate, capacity) = (rng.u64(500..20_000), rng.usize(256..8192));
            book.counts("slow readers");
            book.note(format_args!("{name} is narrow {direction:?}: {rate} bytes/s, {capacity}"));
            network.narrow(direction, rate, capacity);
        }
        4 | 5 => {
            book.counts("partitions");
            book.note(format_args!("{name} is cut off"));
            network.partition();
        }
        _ => {
            book.counts("one-way partitions");
            book.note(format_args!("{name} is cut off {direction:?}"));
            network.partition_one_way(direction);
        }
    }
    let longest = if rng.bool() { 2000 } else { 40_000 };
    let lasts = Duration::from_millis(rng.u64(50..longest));
    let (book, name, network) = (book.clone(), name.to_owned(), network.clone());
    tokio::spawn(async move {
        sleep(lasts).await;
        book.note(format_args!("{name} is well again"));
        network.heal();
    });
}

fn everyone(stage: &Stage) -> Vec<(String, Network)> {
    let slots = stage.slots.iter().map(|slot| (format!("slot {}", slot.number), &slot.network));
    let callers =
        stage.callers.iter().map(|caller| (format!("caller {}", caller.number), &caller.network));
    slots.chain(callers).map(|(name, network)| (name, network.clone())).collect()
}

fn anyone(stage: &Stage, rng: &mut Rng) -> (String, Network) {
    let mut all = everyone(stage);
    all.swap_remove(rng.usize(..all.len()))
}

/// Ends all faults.
pub(crate) async fn end(stage: &Stage) {
    stage.book.note("the storm is over");
    stage.room.start();
    for (_, network) in everyone(stage) {
        network.heal();
    }
}
