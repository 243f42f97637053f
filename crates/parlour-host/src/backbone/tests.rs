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
            async fn of_two_commits_for_one_position_one_is_refused() {
                let (_kept, backbone) = $make;
                suite::of_two_commits_for_one_position_one_is_refused(backbone).await;
            }

            #[tokio::test]
            async fn partitions_do_not_know_of_each_other() {
                let (_kept, backbone) = $make;
                suite::partitions_do_not_know_of_each_other(backbone).await;
            }

            #[tokio::test]
            async fn what_was_trimmed_is_gone_and_the_rest_is_there() {
                let (_kept, backbone) = $make;
                suite::what_was_trimmed_is_gone_and_the_rest_is_there(backbone).await;
            }

            #[tokio::test]
            async fn of_many_writers_at_once_each_position_has_one() {
                let (_kept, backbone) = $make;
                suite::of_many_writers_at_once_each_position_has_one(backbone).await;
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

fn place(n: u64) -> (Position, Bytes) {
    (Position(n), commit(n))
}

async fn fill(backbone: &dyn Backbone, partition: PartitionId, until: u64) {
    for n in 1..=until {
        backbone.append(partition, Position(n), commit(n)).await.unwrap();
    }
}

pub(crate) async fn commits_are_read_in_the_order_in_which_they_were_appended(
    backbone: Arc<dyn Backbone>,
) {
    let partition = PartitionId(1);
    assert_eq!(backbone.last(partition).await.unwrap(), None);
    assert_eq!(backbone.read(partition, Position(1), ALL).await.unwrap(), []);
    fill(&*backbone, partition, 5).await;
    let read = |from, bytes| backbone.read(partition, Position(from), bytes);
    assert_eq!(read(1, ALL).await.unwrap(), [1, 2, 3, 4, 5].map(place));
    assert_eq!(read(4, ALL).await.unwrap(), [4, 5].map(place));
    assert_eq!(read(2, 2 * commit(1).len()).await.unwrap(), [2, 3].map(place));
    assert_eq!(read(2, 1).await.unwrap(), [place(2)]);
    assert_eq!(read(6, ALL).await.unwrap(), []);
    assert_eq!(backbone.last(partition).await.unwrap(), Some(place(5)));
}

pub(crate) async fn of_two_commits_for_one_position_one_is_refused(backbone: Arc<dyn Backbone>) {
    let partition = PartitionId(0);
    fill(&*backbone, partition, 2).await;
    for position in [Position(0), Position(1), Position(2), Position(4)] {
        let refused = backbone.append(partition, position, commit(9)).await;
        assert_eq!(refused, Err(BackboneError::Fenced), "{position:?}");
    }
    backbone.append(partition, Position(3), commit(3)).await.unwrap();
    let read = backbone.read(partition, Position(1), ALL).await.unwrap();
    assert_eq!(read, [1, 2, 3].map(place));
}

pub(crate) async fn partitions_do_not_know_of_each_other(backbone: Arc<dyn Backbone>) {
    assert_eq!(backbone.partitions(), 3);
    fill(&*backbone, PartitionId(0), 2).await;
    fill(&*backbone, PartitionId(2), 4).await;
    backbone.trim(PartitionId(2), Position(1)).await.unwrap();
    let last = [0, 1, 2].map(|partition| backbone.last(PartitionId(partition)));
    let [a, b, c] = last;
    assert_eq!((a.await.unwrap(), b.await.unwrap()), (Some(place(2)), None));
    assert_eq!(c.await.unwrap(), Some(place(4)));
    assert_eq!(backbone.read(PartitionId(0), Position(1), ALL).await.unwrap().len(), 2);
}

pub(crate) async fn what_was_trimmed_is_gone_and_the_rest_is_there(backbone: Arc<dyn Backbone>) {
    let partition = PartitionId(1);
    fill(&*backbone, partition, 4).await;
    let each = commit(1).len() as u64;
    assert_eq!(backbone.size(partition).await, Ok(4 * each));
    assert_eq!(backbone.trim(partition, Position(2)).await, Ok(2 * each));
    assert_eq!(backbone.trim(partition, Position(1)).await, Ok(0));
    assert_eq!(backbone.size(partition).await, Ok(2 * each));
    assert_eq!(backbone.size(PartitionId(0)).await, Ok(0));
    let read = backbone.read(partition, Position(1), ALL).await.unwrap();
    assert_eq!(read, [3, 4].map(place));
    assert!(backbone.trim(partition, Position(4)).await.is_err());
    let refused = backbone.append(partition, Position(1), commit(1)).await;
    assert_eq!(refused, Err(BackboneError::Fenced));
    backbone.append(partition, Position(5), commit(5)).await.unwrap();
}

pub(crate) async fn of_many_writers_at_once_each_position_has_one(backbone: Arc<dyn Backbone>) {
    let partition = PartitionId(0);
    let writers = (0..8_u64).map(|writer| {
        let backbone = backbone.clone();
        tokio::spawn(async move {
            let mut won = 0;
            for n in 1..=20 {
                match backbone.append(partition, Position(n), commit(writer)).await {
                    Ok(()) => won += 1,
                    Err(error) => assert_eq!(error, BackboneError::Fenced),
                }
            }
            won
        })
    });
    let mut won = 0;
    for writer in writers.collect::<Vec<_>>() {
        won += writer.await.unwrap();
    }
    let read = backbone.read(partition, Position(1), ALL).await.unwrap();
    // A writer that is ahead of the log is refused too, so that not every position need be filled.
    assert_eq!(won, read.len());
    assert!(read.iter().map(|(position, _)| position.0).eq(1..=won as u64));
}
