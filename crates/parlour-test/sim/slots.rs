//! Places for worker processes: when one dies, another takes its place.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parlour_test::{Network, Room};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::agents;
use super::book::Book;

/// What becomes of a process.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// It dies, and another comes after this time.
    Crash(Duration),
    /// It shuts down in order, and another comes after this time.
    Drain(Duration),
    /// It shuts down in order, and none comes.
    Stop,
}

/// A place for a worker.
pub(crate) struct Slot {
    pub(crate) number: usize,
    pub(crate) network: Network,
    pub(crate) is_up: Arc<AtomicBool>,
    orders: mpsc::UnboundedSender<Order>,
    supervisor: JoinHandle<()>,
}

impl Slot {
    pub(crate) fn start(number: usize, room: &Room, book: &Book) -> Self {
        let (orders, inbox) = mpsc::unbounded_channel();
        let (network, is_up) = (room.network(), Arc::new(AtomicBool::new(false)));
        let supervise =
            supervise(number, room.clone(), book.clone(), network.clone(), is_up.clone(), inbox);
        let supervisor = tokio::spawn(supervise);
        Self { number, network, is_up, orders, supervisor }
    }

    pub(crate) fn order(&self, order: Order) {
        // A supervisor takes orders until it is told to stop.
        let _ = self.orders.send(order);
    }

    /// Waits until the process has ended for good.
    pub(crate) async fn stopped(self) {
        self.order(Order::Stop);
        let _ = self.supervisor.await;
    }
}

async fn supervise(
    slot: usize,
    room: Room,
    book: Book,
    network: Network,
    is_up: Arc<AtomicBool>,
    mut orders: mpsc::UnboundedReceiver<Order>,
) {
    // No two processes of a run have the same number.
    for process in slot as u32 * 1000.. {
        let worker = agents::worker(&room, &book, slot, process);
        let worker = match room.worker_over(worker, &network).await {
            Ok(worker) => worker,
            Err(error) => {
                book.note(format_args!("process {process} cannot start: {error}"));
                sleep(Duration::from_millis(500)).await;
                continue;
            }
        };
        book.note(format_args!("process {process} serves"));
        is_up.store(true, Ordering::Relaxed);
        let order = loop {
            let waited = tokio::time::timeout(Duration::from_secs(1), orders.recv()).await;
            match waited {
                Ok(order) => break order.unwrap_or(Order::Stop),
                Err(_) if worker.has_ended() => break Order::Crash(Duration::ZERO),
                Err(_) => {}
            }
        };
        is_up.store(false, Ordering::Relaxed);
        book.note(format_args!("process {process}: {order:?}"));
        match order {
            Order::Crash(pause) => {
                worker.crash();
                sleep(pause).await;
            }
            Order::Drain(pause) => {
                let ended = worker.drain().await;
                book.note(format_args!("process {process} has drained: {}", ended.is_ok()));
                sleep(pause).await;
            }
            Order::Stop => {
                let _ = worker.drain().await;
                return;
            }
        }
    }
}
