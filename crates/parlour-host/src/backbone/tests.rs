//! What every backbone does: one suite for all.

mod shaky;

use std::sync::Arc;
use std::time::Duration;

use super::*;
use shaky::Shaky;

/// Runs the suite on all that `$make` opens: backbones with three partitions and empty logs, each
/// behind what is kept as long.
macro_rules! conformance {
    ($name:ident, $make:expr) => {
        mod $name {
            use crate::backbone::tests as suite;

            #[tokio::test]
            async fn commits_are_read_in_the_order_in_which_they_were_appended() {
                for (_kept, backbone) in $make {
                    suite::commits_are_read_in_the_order_in_which_they_were_appended(backbone)
                        .await;
                }
            }

            #[tokio::test]
            async fn of_two_commits_behind_the_same_one_the_second_is_refused() {
                for (_kept, backbone) in $make {
                    suite::of_two_commits_behind_the_same_one_the_second_is_refused(backbone).await;
                }
            }

            #[tokio::test]
            async fn partitions_do_not_know_of_each_other() {
                for (_kept, backbone) in $make {
                    suite::partitions_do_not_know_of_each_other(backbone).await;
                }
            }

            #[tokio::test]
            async fn the_room_has_a_log_of_its_own() {
                for (_kept, backbone) in $make {
                    suite::the_room_has_a_log_of_its_own(backbone).await;
                }
            }

            #[tokio::test]
            async fn what_was_trimmed_is_gone_and_the_rest_is_there() {
                for (_kept, backbone) in $make {
                    suite::what_was_trimmed_is_gone_and_the_rest_is_there(backbone).await;
                }
            }

            #[tokio::test]
            async fn several_logs_are_replayed_at_once_each_from_where_it_is_wanted() {
                for (_kept, backbone) in $make {
                    suite::several_logs_are_replayed_at_once_each_from_where_it_is_wanted(backbone)
                        .await;
                }
            }

            #[tokio::test]
            async fn of_many_writers_at_once_each_commit_has_one_before_it() {
                for (_kept, backbone) in $make {
                    suite::of_many_writers_at_once_each_commit_has_one_before_it(backbone).await;
                }
            }

            #[tokio::test]
            async fn an_append_that_nobody_waits_for_is_written_once_or_not_at_all() {
                for (_kept, backbone) in $make {
                    suite::an_append_that_nobody_waits_for_is_written_once_or_not_at_all(backbone)
                        .await;
                }
            }
        }
    };
}

conformance!(memory, [((), std::sync::Arc::new(crate::backbone::Memory::new(3)))]);
conformance!(embedded, [suite::temporary()]);
conformance!(late_and_lossy, suite::shaky_ones());

/// An embedded backbone, and the directory that it is in.
fn temporary() -> (tempfile::TempDir, Arc<dyn Backbone>) {
    let dir = tempfile::tempdir().unwrap();
    let backbone = Embedded::open(dir.path(), 3).unwrap();
    (dir, Arc::new(backbone))
}

/// Backbones that are late and lose answers, each in its own way.
fn shaky_ones() -> impl Iterator<Item = ((), Arc<dyn Backbone>)> {
    let open = |seed| Arc::new(Shaky::new(seed, 3, Duration::from_micros(200)));
    (0..20).map(move |seed| ((), open(seed) as Arc<dyn Backbone>))
}

const ALL: usize = 1 << 20;

fn commit(n: u64) -> Bytes {
    format!("commit {n}").into()
}

/// Appends as whoever owns the log does: after an error it reads what became of it. Commits of all who
/// write differ.
async fn append(
    backbone: &dyn Backbone,
    partition: PartitionId,
    last: Position,
    commit: Bytes,
) -> Result<Position, BackboneError> {
    let mut is_doubtful = false;
    loop {
        let answered = backbone.append(partition, last, commit.clone()).await;
        match &answered {
            Err(BackboneError::Failed(_)) => is_doubtful = true,
            // Perhaps by what was asked before.
            Err(BackboneError::Fenced) if is_doubtful => {}
            _ => return answered,
        }
        match next(backbone, partition, last).await {
            Some((position, found)) if found == commit => return Ok(position),
            None if answered != Err(BackboneError::Fenced) => {}
            _ => return Err(BackboneError::Fenced),
        }
    }
}

/// The commit behind `last`.
async fn next(
    backbone: &dyn Backbone,
    partition: PartitionId,
    last: Position,
) -> Option<(Position, Bytes)> {
    backbone.read(partition, last.next(), 1).await.unwrap().into_iter().next()
}

/// Appends so many commits, and returns where each is.
async fn fill(backbone: &dyn Backbone, partition: PartitionId, count: u64) -> Commits {
    let mut commits = Commits::new();
    let mut last = Position(0);
    for n in 1..=count {
        let position = append(backbone, partition, last, commit(n)).await.unwrap();
        assert!(position > last, "{position:?} is not behind {last:?}");
        commits.push((position, commit(n)));
        last = position;
    }
    commits
}

pub(crate) async fn commits_are_read_in_the_order_in_which_they_were_appended(
    backbone: Arc<dyn Backbone>,
) {
    let partition = PartitionId(1);
    assert_eq!(backbone.last(partition).await.unwrap(), None);
    assert_eq!(backbone.read(partition, Position(1), ALL).await.unwrap(), []);
    let all = fill(&*backbone, partition, 5).await;
    let read = |from, bytes| backbone.read(partition, from, bytes);
    assert_eq!(read(Position(1), ALL).await.unwrap(), all);
    assert_eq!(read(all[3].0, ALL).await.unwrap(), all[3..]);
    assert_eq!(read(all[2].0.next(), ALL).await.unwrap(), all[3..]);
    assert_eq!(read(all[1].0, 2 * commit(1).len()).await.unwrap(), all[1..3]);
    assert_eq!(read(all[1].0, 1).await.unwrap(), all[1..2]);
    assert_eq!(read(all[4].0.next(), ALL).await.unwrap(), []);
    assert_eq!(backbone.last(partition).await.unwrap().as_ref(), all.last());
}

pub(crate) async fn of_two_commits_behind_the_same_one_the_second_is_refused(
    backbone: Arc<dyn Backbone>,
) {
    let partition = PartitionId(0);
    let mut all = fill(&*backbone, partition, 2).await;
    let last = all[1].0;
    for wrong in [Position(0), all[0].0, last.next()] {
        let refused = append(&*backbone, partition, wrong, commit(9)).await;
        assert_eq!(refused, Err(BackboneError::Fenced), "{wrong:?}");
    }
    all.push((append(&*backbone, partition, last, commit(3)).await.unwrap(), commit(3)));
    assert_eq!(backbone.read(partition, Position(1), ALL).await.unwrap(), all);
}

pub(crate) async fn partitions_do_not_know_of_each_other(backbone: Arc<dyn Backbone>) {
    assert_eq!(backbone.partitions(), 3);
    let first = fill(&*backbone, PartitionId(0), 2).await;
    let third = fill(&*backbone, PartitionId(2), 4).await;
    backbone.trim(PartitionId(2), third[0].0).await.unwrap();
    let [a, b, c] = [0, 1, 2].map(|partition| backbone.last(PartitionId(partition)));
    assert_eq!((a.await.unwrap().as_ref(), b.await.unwrap()), (first.last(), None));
    assert_eq!(c.await.unwrap().as_ref(), third.last());
    assert_eq!(backbone.read(PartitionId(0), Position(1), ALL).await.unwrap(), first);
    let second = append(&*backbone, PartitionId(1), Position(0), commit(1)).await.unwrap();
    assert_eq!(backbone.last(PartitionId(1)).await.unwrap(), Some((second, commit(1))));
}

pub(crate) async fn the_room_has_a_log_of_its_own(backbone: Arc<dyn Backbone>) {
    let room = PartitionId::of_room(backbone.partitions());
    let other = fill(&*backbone, PartitionId(2), 3).await;
    assert_eq!(backbone.last(room).await.unwrap(), None);
    let all = fill(&*backbone, room, 2).await;
    let refused = append(&*backbone, room, all[0].0, commit(9)).await;
    assert_eq!(refused, Err(BackboneError::Fenced));
    backbone.trim(room, all[0].0).await.unwrap();
    assert_eq!(backbone.read(room, Position(1), ALL).await.unwrap(), all[1..]);
    assert_eq!(backbone.last(PartitionId(2)).await.unwrap().as_ref(), other.last());
}

pub(crate) async fn what_was_trimmed_is_gone_and_the_rest_is_there(backbone: Arc<dyn Backbone>) {
    let partition = PartitionId(1);
    let other = fill(&*backbone, PartitionId(2), 4).await;
    let all = fill(&*backbone, partition, 4).await;
    assert_eq!(backbone.size(partition).await, Ok(4 * commit(1).len() as u64));
    assert_eq!(backbone.trim(partition, all[1].0).await, Ok(()));
    assert_eq!(backbone.trim(partition, all[0].0).await, Ok(()));
    assert_eq!(backbone.size(PartitionId(0)).await, Ok(0));
    assert_eq!(backbone.read(partition, Position(1), ALL).await.unwrap(), all[2..]);
    assert!(backbone.trim(partition, all[3].0).await.is_err());
    let refused = append(&*backbone, partition, Position(0), commit(9)).await;
    assert_eq!(refused, Err(BackboneError::Fenced));
    append(&*backbone, partition, all[3].0, commit(5)).await.unwrap();
    assert_eq!(backbone.read(PartitionId(2), Position(1), ALL).await.unwrap(), other);
}

pub(crate) async fn several_logs_are_replayed_at_once_each_from_where_it_is_wanted(
    backbone: Arc<dyn Backbone>,
) {
    let [first, second, third] = [0, 1, 2].map(PartitionId);
    // As much as several parts.
    let (mut long, mut last) = (Commits::new(), Position(0));
    for n in 0..100_u8 {
        let commit = Bytes::from(vec![n; PART / 16]);
        last = append(&*backbone, first, last, commit.clone()).await.unwrap();
        long.push((last, commit));
    }
    let short = fill(&*backbone, second, 3).await;
    fill(&*backbone, third, 3).await;
    backbone.trim(second, short[0].0).await.unwrap();
    let (wanted, mut received): (Vec<_>, Vec<_>) =
        [(first, long[10].0), (second, Position(1)), (third, Position(u64::MAX >> 16))]
            .into_iter()
            .map(|(partition, from)| {
                let (to, received) = mpsc::channel(1);
                (Replay { partition, from, to }, received)
            })
            .unzip();
    // Nobody takes anything of the last.
    let ignored = received.pop();
    let receive = received.into_iter().map(|mut parts| async move {
        let mut all = Commits::new();
        while let Some(part) = parts.recv().await {
            let part = part.unwrap();
            assert!(!part.is_empty());
            all.extend(part);
        }
        all
    });
    let (replayed, ()) = tokio::join!(join_all(receive), backbone.replay(wanted));
    assert_eq!(replayed, [&long[10..], &short[1..]]);
    drop(ignored);
}

pub(crate) async fn of_many_writers_at_once_each_commit_has_one_before_it(
    backbone: Arc<dyn Backbone>,
) {
    let partition = PartitionId(0);
    let writers = (0..8_u64).map(|writer| {
        let backbone = backbone.clone();
        tokio::spawn(async move {
            let (mut won, mut last) = (Vec::new(), Position(0));
            for turn in 0..20 {
                let commit = commit(100 * writer + turn);
                match append(&*backbone, partition, last, commit.clone()).await {
                    Ok(position) => {
                        won.push((position, commit));
                        last = position;
                    }
                    Err(error) => {
                        assert_eq!(error, BackboneError::Fenced);
                        let found = backbone.last(partition).await.unwrap();
                        last = found.map_or(Position(0), |(position, _)| position);
                    }
                }
            }
            won
        })
    });
    let mut won = Commits::new();
    for writer in writers.collect::<Vec<_>>() {
        won.extend(writer.await.unwrap());
    }
    won.sort_unstable_by_key(|(position, _)| *position);
    assert_eq!(backbone.read(partition, Position(1), ALL).await.unwrap(), won);
}

pub(crate) async fn an_append_that_nobody_waits_for_is_written_once_or_not_at_all(
    backbone: Arc<dyn Backbone>,
) {
    let partition = PartitionId(1);
    let mut all = Commits::new();
    let mut last = Position(0);
    for n in 1..=20 {
        let mut given_up = backbone.append(partition, last, commit(2 * n));
        if n % 2 == 0 {
            let _ = futures_util::poll!(&mut given_up);
        }
        drop(given_up);
        // It may be carried out still, before this one or behind it.
        match append(&*backbone, partition, last, commit(2 * n + 1)).await {
            Ok(position) => all.push((position, commit(2 * n + 1))),
            Err(BackboneError::Fenced) => {
                // That may be known before it is read.
                let (position, found) = loop {
                    if let Some(found) = next(&*backbone, partition, last).await {
                        break found;
                    }
                };
                assert_eq!(found, commit(2 * n));
                all.push((position, found));
            }
            Err(error) => panic!("{error}"),
        }
        last = all.last().unwrap().0;
    }
    assert_eq!(backbone.read(partition, Position(1), ALL).await.unwrap(), all);
}

#[tokio::test]
async fn the_shaky_ones_lose_questions_and_answers() {
    let mut lost = 0;
    for seed in 0..20 {
        let backbone = Shaky::new(seed, 3, Duration::ZERO);
        fill(&backbone, PartitionId(0), 50).await;
        lost += backbone.lost();
    }
    assert!(lost > 20, "{lost}");
}
