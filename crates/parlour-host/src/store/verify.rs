//! Reads all that is kept, and says what is not as it was written.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;

use bytes::Bytes;
use parlour_core::durable::{
    Corrupt, Delivery, DeliveryId, Partition, PartitionId, Place, Position, RoomSettings, Settled,
    Standing, Timestamp, Totals, previous_of, settled_in, time_of,
};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension as _, Row};

use super::{Progress, Store, StoreError, Task, Watch, is_in_use, open_to_read};
use crate::backbone::OpenError;
use crate::backbone::embedded::{checksum, make_tables, place_of, stored_ends, tail};
use crate::view;

/// How many lines SQLite may say of the structure of its file.
const COMPLAINTS: usize = 100;

/// What is in a store, and what of it is damaged.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// The version of the tables.
    pub format: i64,
    /// How many partitions the room has.
    pub partitions: u16,
    /// How many commits were read.
    pub commits: u64,
    /// And how many bytes they have.
    pub bytes: u64,
    /// When the oldest of them was made, and the newest.
    pub times: Option<(Timestamp, Timestamp)>,
    /// How many deliveries there ever were, and how those ended that have.
    pub totals: Totals,
    /// Where the others are.
    pub standing: Standing,
    /// What is not as it was written.
    pub damages: Vec<Damage>,
    /// The index of what has ended. A backup has none.
    pub view: Option<ViewReport>,
}

impl Report {
    /// Whether all of it is as it was written.
    pub fn is_sound(&self) -> bool {
        self.damages.is_empty() && self.view.as_ref().is_none_or(ViewReport::is_right)
    }
}

/// Something that is not as it was written.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Damage {
    /// The commit, if it is one.
    pub commit: Option<(PartitionId, Position)>,
    /// Whether the host needs it for what has not ended: it does not serve the partition then.
    /// Otherwise it tells only of what has.
    pub is_needed: bool,
    /// What is wrong.
    pub detail: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((partition, position)) = self.commit else { return f.write_str(&self.detail) };
        let of = if self.is_needed { "" } else { " (it tells only of what has ended)" };
        write!(f, "commit {} of partition {partition}: {}{of}", position.0, self.detail)
    }
}

/// How the index of what has ended compares with the logs.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct ViewReport {
    /// How many ends the logs tell of that it should know.
    pub ends: u64,
    /// How many of those it does not have.
    pub missing: u64,
    /// How many it says are elsewhere.
    pub misplaced: u64,
    /// How many it has that the logs do not tell of.
    pub surplus: u64,
    /// Why it cannot be read, if it cannot.
    pub unreadable: Option<String>,
}

impl ViewReport {
    /// Whether it says what the logs say.
    pub fn is_right(&self) -> bool {
        self.missing + self.misplaced + self.surplus == 0 && self.unreadable.is_none()
    }
}

impl Store {
    /// Reads every commit: its checksum, whether it contradicts those before it, and whether what a
    /// host finds by its view is where the view says.
    ///
    /// What is damaged is in the report. An error is returned only if nothing can be said.
    pub fn verify(&self, watch: Watch<'_>) -> Result<Report, StoreError> {
        // A host that runs may just write it.
        match self.acknowledged().or_else(|_| self.acknowledged()) {
            Ok(acknowledged) => self.check(acknowledged, watch),
            Err(error) => {
                let mut report = self.check(Position(0), watch)?;
                let detail =
                    format!("up to where the logs were acknowledged is not known: {error}");
                report.damages.push(Damage { commit: None, is_needed: false, detail });
                Ok(report)
            }
        }
    }

    /// The same for logs that reached to `acknowledged` before this was called.
    pub(super) fn check(
        &self,
        acknowledged: Position,
        watch: Watch<'_>,
    ) -> Result<Report, StoreError> {
        // First, as it follows the logs: it knows nothing yet of what they are told meanwhile.
        let view = self.views.as_deref().and_then(|dir| View::open(dir, self));
        let mut check = Check::new(self)?;
        check.acknowledged = acknowledged;
        check.tail()?;
        let _moment = self.moment()?;
        match view {
            Some(Ok(view)) => check.view = Some(view),
            Some(Err(error)) => {
                let unreadable = Some(error.to_string());
                check.report.view = Some(ViewReport { unreadable, ..ViewReport::default() });
            }
            None => {}
        }
        check.structure()?;
        check.tables()?;
        check.ends()?;
        check.commits(watch)?;
        check.finish()
    }
}

struct Check<'a> {
    store: &'a Store,
    report: Report,
    logs: Vec<Log>,
    /// Up to where the logs were acknowledged.
    acknowledged: Position,
    /// Up to where it is written down how they end.
    noted: Position,
    view: Option<View>,
    /// A delivery that is not in the partition of its agent.
    misplaced: Option<DeliveryId>,
}

/// What was read of the log of one partition.
#[derive(Default)]
struct Log {
    /// Made of what was read since the last damage.
    state: Option<Partition>,
    first: Option<Position>,
    /// The commit before the first.
    behind: Option<Position>,
    last: Position,
    /// The last commit, and the bytes of all, up to where the ends are written down.
    noted: (Position, u64),
    /// What is written down of that.
    end: (Position, u64),
    /// Where what has not ended begins, as the last commit says.
    base: Position,
}

impl<'a> Check<'a> {
    fn new(store: &'a Store) -> Result<Self, StoreError> {
        let failed = |error| store.failed(error);
        let connection = &store.connection;
        let partitions = connection.query_row("SELECT partitions FROM room", [], |row| row.get(0));
        let partitions: u16 = partitions.map_err(failed)?;
        let format = connection.pragma_query_value(None, "user_version", |row| row.get(0));
        let format = format.map_err(failed)?;
        let report = Report { format, partitions, ..Report::default() };
        let room = PartitionId::of_room(partitions);
        let logs = (0..=room.0).map(|_| Log::default()).collect();
        let (acknowledged, noted) = Default::default();
        Ok(Self { store, report, logs, acknowledged, noted, view: None, misplaced: None })
    }

    /// Has SQLite look at how the pages of the file hang together.
    fn structure(&mut self) -> Result<(), StoreError> {
        let complaints = || {
            let pragma = format!("PRAGMA quick_check({COMPLAINTS})");
            let mut query = self.store.connection.prepare(&pragma)?;
            let lines = query.query_map([], |row| row.get::<_, String>(0))?;
            lines.collect::<rusqlite::Result<Vec<_>>>()
        };
        match complaints() {
            Ok(lines) => {
                let lines = lines.iter().flat_map(|line| line.lines());
                for line in lines.filter(|line| *line != "ok") {
                    self.damage_of_file(format!("the database: {line}"));
                }
            }
            Err(error) => self.unreadable(error)?,
        }
        Ok(())
    }

    /// What SQLite forgets of a write-ahead log: a host that starts looks there too.
    fn tail(&mut self) -> Result<(), StoreError> {
        let Some(dir) = self.store.views.as_deref() else { return Ok(()) };
        // One that runs writes there.
        if is_in_use(dir)? {
            return Ok(());
        }
        let behind = tail::commits_behind_the_end(&self.store.connection);
        if behind.map_err(|error| self.store.failed(error))? > 1 && !is_in_use(dir)? {
            self.damage_of_file("commits lie behind the end of the write-ahead log".into());
        }
        Ok(())
    }

    /// Whether the tables are those that a new room has: no checksum is on what says so.
    fn tables(&mut self) -> Result<(), StoreError> {
        let schema = |connection: &Connection| {
            let mut query =
                connection.prepare("SELECT name, sql FROM sqlite_schema ORDER BY name")?;
            let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect::<rusqlite::Result<Vec<(String, Option<String>)>>>()
        };
        let expected = || {
            let new = Connection::open_in_memory()?;
            make_tables(&new, self.report.partitions)?;
            schema(&new)
        };
        let compared =
            expected().and_then(|expected| Ok(expected == schema(&self.store.connection)?));
        match compared {
            Ok(true) => {}
            Ok(false) => {
                self.damage_of_file("the database: its tables are not as they were made".into())
            }
            Err(error) => self.unreadable(error)?,
        }
        Ok(())
    }

    /// Reads what is written down of where the logs end, for hosts that start.
    fn ends(&mut self) -> Result<(), StoreError> {
        match stored_ends(&self.store.connection, self.report.partitions) {
            Ok(Some(ends)) => {
                for (end, log) in ends.iter().zip(&mut self.logs) {
                    log.end = (end.position, end.bytes);
                    self.noted = self.noted.max(end.position);
                }
            }
            Ok(None) => self.damage_of_file("the database: where its logs end is damaged".into()),
            Err(error) => self.unreadable(error)?,
        }
        Ok(())
    }

    fn commits(&mut self, watch: Watch<'_>) -> Result<(), StoreError> {
        let store = self.store;
        let total = store.bytes().map_err(|error| store.failed(error))?;
        let query = "SELECT id, checksum, commit_bytes FROM commits ORDER BY id";
        let mut query = store.connection.prepare(query).map_err(|error| store.failed(error))?;
        let mut rows = query.query([]).map_err(|error| store.failed(error))?;
        loop {
            match rows.next() {
                Ok(Some(row)) => self.commit(row),
                Ok(None) => return Ok(()),
                // What lies behind cannot be reached.
                Err(error) => return self.unreadable(error),
            }
            if self.report.commits.is_multiple_of(256) {
                store.stop.check()?;
                watch(Progress { task: Task::Verify, done: self.report.bytes.min(total), total });
            }
        }
    }

    fn commit(&mut self, row: &Row<'_>) {
        let (Ok(ValueRef::Integer(id)), sum, commit) =
            (row.get_ref(0), row.get_ref(1), row.get_ref(2))
        else {
            return self.damage_of_file("the database: a commit has no id".into());
        };
        let (partition, position) = place_of(id);
        self.report.commits += 1;
        let Some(log) = self.logs.get_mut(usize::from(partition.0)) else {
            return self.damage(partition, position, "the room has no such partition");
        };
        log.first.get_or_insert(position);
        log.last = position;
        if position <= self.noted {
            let length =
                commit.as_ref().map_or(0, |commit| commit.as_blob().map_or(0, <[u8]>::len));
            log.noted = (position, log.noted.1 + length as u64);
        }
        let (Ok(ValueRef::Integer(sum)), Ok(ValueRef::Blob(commit))) = (sum, commit) else {
            log.state = None;
            return self.damage(partition, position, "it is no commit");
        };
        self.report.bytes += commit.len() as u64;
        if i64::from(checksum(id, commit)) != sum {
            log.state = None;
            return self.damage(partition, position, "its checksum is wrong");
        }
        let commit = Bytes::copy_from_slice(commit);
        if let Err(error) = self.replay(partition, position, &commit) {
            self.damage(partition, position, &error.to_string());
        }
    }

    /// Takes a commit that is as it was written.
    fn replay(
        &mut self,
        partition: PartitionId,
        position: Position,
        commit: &Bytes,
    ) -> Result<(), Corrupt> {
        if partition == PartitionId::of_room(self.report.partitions) {
            // Each of its commits is the whole of it.
            return RoomSettings::decode(commit).map(drop);
        }
        let log = &mut self.logs[usize::from(partition.0)];
        let time = time_of(commit)?;
        log.base = Partition::base(commit)?;
        let (oldest, newest) = self.report.times.unwrap_or((time, time));
        self.report.times = Some((oldest.min(time), newest.max(time)));
        // Not whether it agrees with those before it: that is the next question.
        let ends = settled_in(commit)?;
        let previous = previous_of(commit)?;
        log.behind.get_or_insert(previous);
        let fresh = || {
            let mut state = Partition::new(partition, 0, 0);
            state.begin(previous);
            state
        };
        let replayed = log.state.get_or_insert_with(fresh).replay(position, commit);
        if replayed.is_err() {
            let mut anew = fresh();
            log.state = anew.replay(position, commit).is_ok().then_some(anew);
        }
        if let Some((_, offset)) = ends.first() {
            let delivery = Settled::read(commit, *offset)?.delivery;
            self.look_at(&delivery);
        }
        if let Some(view) = &mut self.view {
            view.compare(partition, position, &ends);
        }
        replayed
    }

    /// The room's number of partitions has no checksum, but says where each delivery is.
    fn look_at(&mut self, delivery: &Delivery) {
        let expected = PartitionId::of(&delivery.agent, self.report.partitions);
        if delivery.id.partition != expected {
            self.misplaced.get_or_insert(delivery.id);
        }
    }

    fn finish(mut self) -> Result<Report, StoreError> {
        self.store.stop.check()?;
        let last = self.logs.iter().map(|log| log.last).max().unwrap_or(Position(0));
        if last < self.acknowledged {
            self.damage_of_file(format!(
                "the logs end at {}, and what was acknowledged reaches to {}",
                last.0, self.acknowledged.0
            ));
        }
        for (number, log) in std::mem::take(&mut self.logs).into_iter().enumerate() {
            if let Some(view) = &self.view
                && let Some((_, seen)) = view.known.get(&PartitionId(number as u16))
                && *seen > log.last
            {
                let (seen, last) = (seen.0, log.last.0);
                self.damage_of_file(format!(
                    "partition {number}: the log ends at {last}, and the view has seen commit {seen}"
                ));
            }
            if log.noted != log.end {
                self.damage_of_file(format!(
                    "partition {number}: the log up to {} has {} bytes and its last commit at {}, not {} \
                     bytes and {}",
                    self.noted.0, log.noted.1, log.noted.0.0, log.end.1, log.end.0.0
                ));
            }
            if let Some(behind) = log.behind.filter(|behind| *behind > log.base) {
                self.damage_of_file(format!(
                    "partition {number}: the log begins behind commit {}, and what has not ended \
                     behind {}",
                    behind.0, log.base.0
                ));
            }
            for damage in &mut self.report.damages {
                if let Some((partition, position)) = damage.commit
                    && usize::from(partition.0) == number
                {
                    damage.is_needed = position > log.base;
                }
            }
            if let Some(state) = &log.state {
                state.iter().for_each(|delivery| self.look_at(delivery));
                add_totals(&mut self.report.totals, state.totals());
                add_standing(&mut self.report.standing, state.standing());
            }
            self.logs.push(log);
        }
        if let Some(id) = self.misplaced {
            let partitions = self.report.partitions;
            self.damage_of_file(format!(
                "the delivery {id} is not where a room with {partitions} partitions has it"
            ));
        }
        if let Some(mut view) = self.view.take() {
            view.count_surplus(&self.logs, &self.report.damages);
            self.store.stop.check()?;
            self.report.view = Some(view.report);
        }
        Ok(self.report)
    }

    fn damage(&mut self, partition: PartitionId, position: Position, detail: &str) {
        let commit = Some((partition, position));
        self.report.damages.push(Damage { commit, is_needed: true, detail: detail.to_owned() });
    }

    fn damage_of_file(&mut self, detail: String) {
        self.report.damages.push(Damage { commit: None, is_needed: true, detail });
    }

    /// SQLite could not go on.
    fn unreadable(&mut self, error: rusqlite::Error) -> Result<(), StoreError> {
        match self.store.failed(error) {
            StoreError::Open(OpenError::Database { source, .. }) => {
                self.damage_of_file(format!("the database: {source}"));
                Ok(())
            }
            error => Err(error),
        }
    }
}

fn add_totals(sum: &mut Totals, of: Totals) {
    sum.accepted += of.accepted;
    sum.completed += of.completed;
    sum.cancelled += of.cancelled;
    sum.expired += of.expired;
    sum.discarded += of.discarded;
    sum.published += of.published;
}

fn add_standing(sum: &mut Standing, of: Standing) {
    sum.waiting += of.waiting;
    sum.in_flight += of.in_flight;
    sum.dead += of.dead;
    sum.owed += of.owed;
}

/// The view, as it was at one moment.
struct View {
    connection: Connection,
    report: ViewReport,
    /// Behind where, and up to where, it knows each log.
    known: HashMap<PartitionId, (Position, Position)>,
}

impl View {
    /// `None` if there is none: the next host makes it.
    fn open(dir: &Path, store: &Store) -> Option<rusqlite::Result<Self>> {
        let path = dir.join(view::FILE);
        if !path.exists() {
            return None;
        }
        let open = || {
            let connection = open_to_read(&path, &store.stop)?;
            connection.execute_batch("BEGIN")?;
            let mut query =
                connection.prepare("SELECT partition, forgotten, position FROM seen")?;
            let known = query.query_map([], |row| {
                let position = |column| row.get(column).map(|it: i64| Position(it as u64));
                Ok((PartitionId(row.get(0)?), (position(1)?, position(2)?)))
            })?;
            let known = known.collect::<rusqlite::Result<_>>()?;
            drop(query);
            Ok((connection, known))
        };
        Some(open().map(|(connection, known)| Self {
            connection,
            report: ViewReport::default(),
            known,
        }))
    }

    /// Compares it with a commit that tells of these ends.
    fn compare(&mut self, partition: PartitionId, position: Position, ends: &[(u64, u32)]) {
        // What it has not seen, the host that runs or starts tells it. What was let go may still be there.
        let is_known =
            |(forgotten, seen): &(Position, Position)| *forgotten < position && position <= *seen;
        if !self.known.get(&partition).is_some_and(is_known) {
            return;
        }
        for (number, offset) in ends {
            self.report.ends += 1;
            let place = Place { position, offset: *offset };
            match self.find(partition, *number) {
                Ok(Some(found)) if found == place => {}
                Ok(Some(_)) => self.report.misplaced += 1,
                Ok(None) => self.report.missing += 1,
                Err(error) => self.report.unreadable = Some(error.to_string()),
            }
        }
    }

    fn find(&self, partition: PartitionId, number: u64) -> rusqlite::Result<Option<Place>> {
        let find = "SELECT position, byte_offset FROM settled WHERE id = ?";
        let place = self.connection.prepare_cached(find)?.query_row(
            [view::id_of(partition, number)],
            |row| {
                let position = Position(row.get::<_, i64>(0)? as u64);
                Ok(Place { position, offset: row.get(1)? })
            },
        );
        place.optional()
    }

    /// Counts what it says of the logs that they do not say.
    fn count_surplus(&mut self, logs: &[Log], damages: &[Damage]) {
        if self.report.unreadable.is_some() {
            return;
        }
        let damaged: HashSet<_> = damages.iter().filter_map(|damage| damage.commit).collect();
        let count = || -> rusqlite::Result<u64> {
            let mut query = self.connection.prepare("SELECT id, position FROM settled")?;
            let mut rows = query.query([])?;
            let mut count = 0_u64;
            while let Some(row) = rows.next()? {
                let partition = view::partition_of(row.get(0)?);
                let position = Position(row.get::<_, i64>(1)? as u64);
                // What was let go a moment ago, or cannot be read, tells nothing.
                let log = logs.get(usize::from(partition.0));
                let is_gone = log.and_then(|log| log.first).is_some_and(|first| position < first);
                count += u64::from(!is_gone && !damaged.contains(&(partition, position)));
            }
            Ok(count)
        };
        match count() {
            Ok(count) => {
                let known = self.report.ends - self.report.missing;
                self.report.surplus = count.saturating_sub(known);
            }
            Err(error) => self.report.unreadable = Some(error.to_string()),
        }
    }
}
