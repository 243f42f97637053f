//! What every backbone does: one suite for all.

use std::sync::Arc;

use super::*;

/// Runs the suite on what `$make` opens: a backbone with three partitions and empty logs, behind what
/// is kept as long.
macro_rules! conformance {
    ($name:ident, $make:expr) => {
        mod $name {
            use crate::backbone::tests as suite;

            #[tokio::test]
            async fn commits_are_read_in_the_order_in_which_they_were_appended() {
                let (_kept, backbone) = $make;
                suite::commits_are_read_in_the_order_in_which_they_were_appended(backbone).await;
            }

            #[tokio::test]
            async fn of_two_commits_behind_the_same_one_the_second_is_refused() {
                let (_kept, backbone) = $make;
                suite::of_two_commits_behind_the_same_one_the_second_is_refused(backbone).await;
            }

            #[tokio::test]
            async fn partitions_do_not_know_of_each_other() {
                let (_kept, backbone) = $make;
                suite::partitions_do_not_know_of_each_other(backbone).await;
            }

            #[tokio::test]
            async fn the_room_has_a_log_of_its_own() {
                let (_kept, backbone) = $make;
                suite::the_room_has_a_log_of_its_own(backbone).await;
            }

            #[tokio::test]
            async fn what_was_trimmed_is_gone_and_the_rest_is_there() {
                let (_kept, backbone) = $make;
                suite::what_was_trimmed_is_gone_and_the_rest_is_there(backbone).await;
            }

            #[tokio::test]
            async fn several_logs_are_replayed_at_once_each_from_where_it_is_wanted() {
                let (_kept, backbone) = $make;
                suite::several_logs_are_replayed_at_once_each_from_where_it_is_wanted(backbone)
                    .await;
            }

            #[tokio::test]
            async fn of_many_writers_at_once_each_commit_has_one_before_it() {
                let (_kept, backbone) = $make;
                suite::of_many_writers_at_once_each_commit_has_one_before_it(backbone).await;
            }
        }
    };
}

conformance!(memory, ((), std::sync::Arc::new(crate::backbone::Memory::new(3))));
conformance!(embedded, suite::temporary());

/// An embedded backbone, and the directory that it is in.
fn temporary() -> (tempfile::TempDir, Arc<dyn Backbone>) {
    let dir = tempfile::tempdir().unwrap();
    let backbone = Embedded::open(dir.path(), 3).unwrap();
    (dir, Arc::new(backbone))
}

const ALL: usize = 1 << 20;

fn commit(n: u64) -> Bytes {
    format!("commit {n}").into()
}

/// Appends so many commits, and returns where each is.
async fn fill(backbone: &dyn Backbone, partition: PartitionId, count: u64) -> Commits {
    let mut commits = Commits::new();
    let mut last = Position(0);
    for n in 1..=count {
        let position = backbone.append(partition, last, commit(n)).await.unwrap();
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
        let refused = backbone.append(partition, wrong, commit(9)).await;
        assert_eq!(refused, Err(BackboneError::Fenced), "{wrong:?}");
    }
    all.push((backbone.append(partition, last, commit(3)).await.unwrap(), commit(3)));
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
    let second = backbone.append(PartitionId(1), Position(0), commit(1)).await.unwrap();
    assert_eq!(backbone.last(PartitionId(1)).await.unwrap(), Some((second, commit(1))));
}

pub(crate) async fn the_room_has_a_log_of_its_own(backbone: Arc<dyn Backbone>) {
    let room = PartitionId::of_room(backbone.partitions());
    let other = fill(&*backbone, PartitionId(2), 3).await;
    assert_eq!(backbone.last(room).await.unwrap(), None);
    let all = fill(&*backbone, room, 2).await;
    let refused = backbone.append(room, all[0].0, commit(2)).await;
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
    let refused = backbone.append(partition, Position(0), commit(1)).await;
    assert_eq!(refused, Err(BackboneError::Fenced));
    backbone.append(partition, all[3].0, commit(5)).await.unwrap();
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
        last = backbone.append(first, last, commit.clone()).await.unwrap();
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
            for _ in 0..20 {
                match backbone.append(partition, last, commit(writer)).await {
                    Ok(position) => {
                        won.push((position, commit(writer)));
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
