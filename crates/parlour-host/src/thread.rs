//! A thread for work that waits for a disk.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::{fmt, io};

/// A thread that does jobs in the order in which they come. Dropping it waits until all are done.
pub(crate) struct Thread<J> {
    jobs: Option<mpsc::Sender<J>>,
    handle: Option<JoinHandle<()>>,
}

impl<J: Send + 'static> Thread<J> {
    /// Starts a thread of this name that runs `run` over its queue of jobs.
    pub(crate) fn start(
        name: &str,
        run: impl FnOnce(&mpsc::Receiver<J>) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let handle = std::thread::Builder::new().name(name.into()).spawn(move || run(&queue))?;
        Ok(Self { jobs: Some(jobs), handle: Some(handle) })
    }

    /// Has `job` done. If the thread has panicked, it is dropped.
    pub(crate) fn send(&self, job: J) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }
}

impl<J> Drop for Thread<J> {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(handle) = self.handle.take() {
            // What it panicked with was said then.
            let _ = handle.join();
        }
    }
}

impl<J> fmt::Debug for Thread<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Thread").finish_non_exhaustive()
    }
}
