use std::path::Path;

use tempfile::TempDir;

use super::*;

async fn append(backbone: &Embedded, partition: u16, last: Position, bytes: usize) -> Position {
    let commit = Bytes::from(vec![7; bytes]);
    backbone.append(PartitionId(partition), last, commit).await.unwrap()
}

/// The files as a host that is killed now leaves them.
fn image(of: &Path) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in [DATABASE, "parlour.db-wal"] {
        std::fs::copy(of.join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn flip(file: &Path, at: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[tokio::test]
async fn damage_in_the_write_ahead_log_is_noticed_and_a_torn_tail_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let backbone = Embedded::open(dir.path(), 1).unwrap();
    let mut last = Position(0);
    let mut lengths = Vec::new();
    for _ in 0..4 {
        last = append(&backbone, 0, last, 20_000).await;
        lengths.push(std::fs::metadata(dir.path().join("parlour.db-wal")).unwrap().len());
    }
    for (damaged, opens) in [(lengths[0] + 100, false), (lengths[2] + 100, true)] {
        let image = image(dir.path());
        flip(&image.path().join("parlour.db-wal"), damaged);
        // However often it is tried.
        if !opens {
            Embedded::open(image.path(), 1).unwrap_err();
        }
        match Embedded::open(image.path(), 1) {
            Ok(opened) => {
                assert!(opens);
                let all = opened.read(PartitionId(0), Position(1), usize::MAX).await.unwrap();
                assert_eq!(all.len(), 3);
            }
            Err(error) => {
                assert!(!opens, "{error}");
                assert!(matches!(error, OpenError::Damaged { commits: 3, .. }), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn a_log_that_has_lost_what_was_acknowledged_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let backbone = Embedded::open(dir.path(), 2).unwrap();
    let first = append(&backbone, 0, Position(0), 20_000).await;
    let log = |dir: &Path| dir.join("parlour.db-wal");
    let length = std::fs::metadata(log(dir.path())).unwrap().len();
    let behind_first = image(dir.path());
    let last = append(&backbone, 1, Position(0), 20_000).await;
    assert_eq!(head::acknowledged(dir.path()).unwrap(), last);
    let cut = |image: &Path| {
        OpenOptions::new().write(true).open(log(image)).unwrap().set_len(length).unwrap();
    };
    let noted = |image: &Path| {
        std::fs::copy(dir.path().join("head"), image.join("head")).unwrap();
    };
    let refused = |image: &Path, ends: Position| {
        // However often it is tried.
        for _ in 0..2 {
            match Embedded::open(image, 2).unwrap_err() {
                OpenError::Behind { acknowledged, last: found, .. } => {
                    assert_eq!((acknowledged, found), (last.0, ends.0));
                }
                other => panic!("{other}"),
            }
        }
    };
    let all = image(dir.path());
    noted(all.path());
    drop(Embedded::open(all.path(), 2).unwrap());
    let shortened = image(dir.path());
    noted(shortened.path());
    cut(shortened.path());
    refused(shortened.path(), first);
    // Where one bit of the last commit is not as it was.
    let flipped = image(dir.path());
    noted(flipped.path());
    flip(&log(flipped.path()), length + 100);
    refused(flipped.path(), first);
    // Where the database is gone, and its log stays.
    let missing = image(dir.path());
    noted(missing.path());
    std::fs::rename(missing.path().join(DATABASE), missing.path().join("moved")).unwrap();
    refused(missing.path(), Position(0));
    std::fs::rename(missing.path().join("moved"), missing.path().join(DATABASE)).unwrap();
    drop(Embedded::open(missing.path(), 2).unwrap());
    // The control: nobody has written it down, or what was written is damaged.
    for damage in [false, true] {
        let unknown = image(dir.path());
        if damage {
            noted(unknown.path());
            flip(&unknown.path().join("head"), 19);
            head::acknowledged(unknown.path()).unwrap_err();
        }
        cut(unknown.path());
        drop(Embedded::open(unknown.path(), 2).unwrap());
        assert_eq!(head::acknowledged(unknown.path()).unwrap(), first);
    }
    // What is behind the logs is what a crash may leave.
    std::fs::write(behind_first.path().join("head"), "").unwrap();
    let opened = Embedded::open(behind_first.path(), 2).unwrap();
    assert_eq!(head::acknowledged(behind_first.path()).unwrap(), first);
    append(&opened, 0, first, 10).await;
}

#[tokio::test]
async fn logs_are_written_where_nothing_can_be_noted_beside_them() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("head")).unwrap();
    let mut last = Position(0);
    for _ in 0..3 {
        let backbone = Embedded::open(dir.path(), 1).unwrap();
        assert_eq!(backbone.last(PartitionId(0)).await.unwrap().map_or(last, |it| it.0), last);
        last = append(&backbone, 0, last, 10).await;
    }
}

#[tokio::test]
async fn what_is_let_go_leaves_the_logs_as_long_as_what_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let backbone = Embedded::open(dir.path(), 2).unwrap();
    let (mut last, mut before) = (Position(0), Position(0));
    for _ in 0..20 {
        before = last;
        last = append(&backbone, 0, last, 10).await;
    }
    backbone.trim(PartitionId(0), before).await.unwrap();
    let look = Connection::open(dir.path().join(DATABASE)).unwrap();
    let count = || look.query_row("SELECT count(*) FROM commits", [], |row| row.get::<_, u32>(0));
    while count().unwrap() > 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(head::acknowledged(dir.path()).unwrap(), last);
    drop((look, backbone));
    drop(Embedded::open(dir.path(), 2).unwrap());
}

#[tokio::test]
async fn logs_that_somebody_reads_as_they_were_are_not_opened_before_that_ends() {
    let dir = tempfile::tempdir().unwrap();
    let backbone = Embedded::open(dir.path(), 1).unwrap();
    let first = append(&backbone, 0, Position(0), 10).await;
    let mut reader = Connection::open(dir.path().join(DATABASE)).unwrap();
    let old = reader.transaction().unwrap();
    let count = |it: &Connection| {
        it.query_row("SELECT count(*) FROM commits", [], |row| row.get::<_, u32>(0)).unwrap()
    };
    assert_eq!(count(&old), 1);
    let last = append(&backbone, 0, first, 10).await;
    drop(backbone);
    assert!(matches!(Embedded::open(dir.path(), 1), Err(OpenError::Read(_))));
    drop(old);
    // One that reads what is there now is in nobody's way.
    let new = reader.transaction().unwrap();
    assert_eq!(count(&new), 2);
    let backbone = Embedded::open(dir.path(), 1).unwrap();
    assert_eq!(backbone.last(PartitionId(0)).await.unwrap().unwrap().0, last);
}

#[tokio::test]
async fn logs_end_where_they_ended_however_long_ago_that_was() {
    let dir = tempfile::tempdir().unwrap();
    let backbone = Embedded::open(dir.path(), 3).unwrap();
    let quiet = append(&backbone, 1, Position(0), 100).await;
    let mut last = Position(0);
    // The write-ahead log is moved in between, and something is written behind that.
    for _ in 0..20 {
        last = append(&backbone, 0, last, 1 << 20).await;
    }
    let image = image(dir.path());
    let opened = Embedded::open(image.path(), 3).unwrap();
    for (partition, end, bytes) in [(0, last, 20 << 20), (1, quiet, 100), (2, Position(0), 0)] {
        let partition = PartitionId(partition);
        let found = opened.last(partition).await.unwrap();
        assert_eq!(found.map_or(Position(0), |(position, _)| position), end);
        assert_eq!(opened.size(partition).await, Ok(bytes));
    }
    assert!(opened.backlog(PartitionId(1), quiet) >= 20 << 20);
    assert!(append(&opened, 2, Position(0), 1).await > last);
}

#[tokio::test]
async fn what_was_trimmed_leaves_the_table_and_what_others_need_stays() {
    let dir = tempfile::tempdir().unwrap();
    let backbone = Embedded::open(dir.path(), 2).unwrap();
    let kept = append(&backbone, 1, Position(0), 10).await;
    let mut last = Position(0);
    let mut before = last;
    for _ in 0..3000 {
        before = last;
        last = append(&backbone, 0, last, 10).await;
    }
    backbone.trim(PartitionId(0), before).await.unwrap();
    let look = Connection::open(dir.path().join(DATABASE)).unwrap();
    let ids = || {
        let mut ids = look.prepare("SELECT id FROM commits ORDER BY id").unwrap();
        let ids = ids.query_map([], |row| row.get::<_, i64>(0)).unwrap();
        ids.collect::<Result<Vec<_>, _>>().unwrap()
    };
    // The thread does it when nothing else is to be done.
    while ids().len() > 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(ids(), [id_of(PartitionId(1), kept), id_of(PartitionId(0), last)]);
    drop(backbone);
    let opened = Embedded::open(dir.path(), 2).unwrap();
    assert_eq!(opened.size(PartitionId(0)).await, Ok(10));
    assert_eq!(opened.last(PartitionId(1)).await.unwrap().unwrap().0, kept);
}
