//! The tasks of a host, none of which outlives it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

/// Every connection's and channel's task. Clones are the same ones.
#[derive(Clone, Default)]
pub(crate) struct Tasks(Arc<Inner>);

#[derive(Default)]
struct Inner {
    tracker: TaskTracker,
    next: AtomicU64,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    /// `None` for one that has ended before its handle was there.
    handles: HashMap<u64, Option<AbortHandle>>,
    /// Whether tasks are aborted as soon as they are there.
    over: bool,
}

/// Dropped with its task.
struct Guard {
    tasks: Tasks,
    number: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let handles = &mut self.tasks.0.running.lock().handles;
        if handles.remove(&self.number).is_none() {
            handles.insert(self.number, None);
        }
    }
}

impl Tasks {
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let number = self.0.next.fetch_add(1, Relaxed);
        let guard = Guard { tasks: self.clone(), number };
        // Without the lock held: a runtime that shuts down drops the task here.
        let task = self.0.tracker.spawn(async move {
            let _guard = guard;
            task.await;
        });
        let mut running = self.0.running.lock();
        if running.over {
            task.abort();
        }
        if running.handles.remove(&number).is_none() {
            running.handles.insert(number, Some(task.abort_handle()));
        }
    }

    /// Waits until all have ended, and aborts those that have not after `patience`.
    pub(crate) async fn end(&self, patience: Duration) {
        self.0.tracker.close();
        if timeout(patience, self.0.tracker.wait()).await.is_ok() {
            return;
        }
        {
            let mut running = self.0.running.lock();
            running.over = true;
            running.handles.values().flatten().for_each(AbortHandle::abort);
        }
        self.0.tracker.wait().await;
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}
