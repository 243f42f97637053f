//! A backbone that keeps what a contract says, and nothing else that one may come to rely on: a map
//! behind a lock. It takes its time, works on when nobody waits, and loses questions and answers.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use parlour_core::durable::{PartitionId, Position};
use tokio::time::sleep;

use super::{Ack, Backbone, BackboneError, Work};

/// Commits in memory, that are late and hard to come by. Clones keep the same ones.
#[derive(Clone)]
pub(crate) struct Shaky(Arc<Inner>);

struct Inner {
    seed: u64,
    partitions: u16,
    slowest: Duration,
    random: Mutex<fastrand::Rng>,
    commits: Mutex<Commits>,
    /// Whether questions and answers get lost.
    is_lossy: AtomicBool,
    /// Whether a lost question is answered as if it had come: what no backbone may do.
    lies: bool,
    lost: AtomicUsize,
}

type Commits = BTreeMap<(PartitionId, Position), Bytes>;

/// What becomes of an append, beside that it takes its time.
enum Fate {
    Done,
    /// Nothing is written.
    QuestionLost,
    /// It is written, and nobody learns of it.
    AnswerLost,
    /// It is written some time after it was given up.
    Late,
}

impl Shaky {
    /// Empty logs. Each answer takes up to twice `slowest`.
    pub(crate) fn new(seed: u64, partitions: u16, slowest: Duration) -> Self {
        Self::build(seed, partitions, slowest, false)
    }

    /// One that acknowledges what it does not write.
    #[allow(dead_code, reason = "a control in the tests of the host")]
    pub(crate) fn lying(seed: u64, partitions: u16, slowest: Duration) -> Self {
        Self::build(seed, partitions, slowest, true)
    }

    fn build(seed: u64, partitions: u16, slowest: Duration, lies: bool) -> Self {
        Self(Arc::new(Inner {
            seed,
            partitions,
            slowest,
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            commits: Mutex::default(),
            is_lossy: AtomicBool::new(true),
            lies,
            lost: AtomicUsize::new(0),
        }))
    }

    /// Loses answers from here on, or does not.
    #[allow(dead_code, reason = "used in the tests of the host")]
    pub(crate) fn set_lossy(&self, is_lossy: bool) {
        self.0.is_lossy.store(is_lossy, Relaxed);
    }

    /// How many appends came to nothing, or were not answered.
    pub(crate) fn lost(&self) -> usize {
        self.0.lost.load(Relaxed)
    }

    /// Does it in a task of its own, whether somebody waits or not.
    fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Commits) -> Result<T, BackboneError> + Send + 'static,
    ) -> Work<'static, T> {
        let it = self.clone();
        let working = tokio::spawn(async move {
            it.rest().await;
            let done = work(&mut it.0.commits.lock());
            it.rest().await;
            done
        });
        Box::pin(async move { working.await.unwrap_or_else(|error| Err(failed(error))) })
    }

    async fn rest(&self) {
        let chance = self.0.random.lock().f64();
        // Often it takes no time, so that others overtake it.
        if chance < 0.5 {
            tokio::task::yield_now().await;
        } else {
            sleep(self.0.slowest.mul_f64(chance)).await;
        }
    }

    fn fate(&self) -> Fate {
        let chance = self.0.random.lock().f64();
        if !self.0.is_lossy.load(Relaxed) || chance > 0.06 {
            return Fate::Done;
        }
        self.0.lost.fetch_add(1, Relaxed);
        match chance {
            ..0.02 => Fate::QuestionLost,
            ..0.04 => Fate::AnswerLost,
            _ => Fate::Late,
        }
    }
}

impl fmt::Debug for Shaky {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shaky").field("seed", &self.0.seed).finish_non_exhaustive()
    }
}

fn failed(error: impl fmt::Display) -> BackboneError {
    BackboneError::Failed(error.to_string())
}

fn last_of(commits: &Commits, log: PartitionId) -> Option<(Position, Bytes)> {
    let mut all = commits.range((log, Position(0))..=(log, Position(u64::MAX)));
    all.next_back().map(|((_, position), commit)| (*position, commit.clone()))
}

impl Backbone for Shaky {
    fn ack(&self) -> Ack {
        Ack::Memory
    }

    fn partitions(&self) -> u16 {
        self.0.partitions
    }

    fn append(&self, log: PartitionId, last: Position, commit: Bytes) -> Work<'_, Position> {
        // Positions rise, by as much as they like.
        let position = Position(last.0 + self.0.random.lock().u64(1..=3));
        let lost = || failed("there was no answer");
        let append = move |commits: &mut Commits| {
            if last_of(commits, log).map_or(Position(0), |(position, _)| position) != last {
                return Err(BackboneError::Fenced);
            }
            commits.insert((log, position), commit);
            Ok(position)
        };
        match self.fate() {
            Fate::Done => self.work(append),
            Fate::QuestionLost if self.0.lies => self.work(move |_| Ok(position)),
            Fate::QuestionLost => self.work(move |_| Err(lost())),
            Fate::AnswerLost => self.work(move |commits| append(commits).and_then(|_| Err(lost()))),
            Fate::Late => {
                let written = self.work(append);
                let given_up = self.work(move |_| Err(lost()));
                drop(written);
                given_up
            }
        }
    }

    fn last(&self, log: PartitionId) -> Work<'_, Option<(Position, Bytes)>> {
        self.work(move |commits| Ok(last_of(commits, log)))
    }

    fn read(
        &self,
        log: PartitionId,
        position: Position,
        bytes: usize,
    ) -> Work<'_, Vec<(Position, Bytes)>> {
        self.work(move |commits| {
            let mut length = 0;
            let mut found = Vec::new();
            for ((_, position), commit) in
                commits.range((log, position)..=(log, Position(u64::MAX)))
            {
                length += commit.len();
                if !found.is_empty() && length > bytes {
                    break;
                }
                found.push((*position, commit.clone()));
            }
            Ok(found)
        })
    }

    fn trim(&self, log: PartitionId, position: Position) -> Work<'_, ()> {
        self.work(move |commits| {
            if last_of(commits, log).is_none_or(|(last, _)| position >= last) {
                return Err(failed("the last commit is not let go"));
            }
            commits.retain(|(of, at), _| *of != log || *at > position);
            Ok(())
        })
    }

    fn size(&self, log: PartitionId) -> Work<'_, u64> {
        self.work(move |commits| {
            let commits = commits.iter().filter(|((of, _), _)| *of == log);
            Ok(commits.map(|(_, commit)| commit.len() as u64).sum())
        })
    }
}
