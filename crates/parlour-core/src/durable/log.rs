//! Which commits of its log the state of a partition is made from.

use std::collections::VecDeque;

use super::Position;

/// A commit, counted from the first that this owner knows: it has no position before the store has
/// given it one.
pub(super) type Number = u64;

/// Where a record is in the log: in which commit, behind how many bytes of it, and of how many bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Spot {
    pub(super) commit: Number,
    pub(super) offset: u32,
    pub(super) weight: u32,
}

/// The commits from the oldest that is needed on.
#[derive(Debug, Default)]
pub(super) struct Log {
    first: Number,
    commits: VecDeque<Written>,
    /// Bytes of all of them.
    bytes: usize,
}

#[derive(Debug)]
struct Written {
    position: Position,
    bytes: usize,
    /// How many deliveries, keys and watermarks it holds the last full record of.
    live: usize,
}

impl Log {
    /// Begins a commit, and names it.
    pub(super) fn begin(&mut self) -> Number {
        self.commits.push_back(Written { position: Position::default(), bytes: 0, live: 0 });
        self.newest()
    }

    /// The newest commit, of which there is one.
    pub(super) fn newest(&self) -> Number {
        self.first + self.commits.len() as u64 - 1
    }

    /// The newest commit has so many bytes.
    pub(super) fn end(&mut self, bytes: usize) {
        self.bytes += bytes;
        if let Some(newest) = self.commits.back_mut() {
            newest.bytes = bytes;
        }
    }

    /// The newest commit is where the store says.
    pub(super) fn place(&mut self, position: Position) {
        if let Some(newest) = self.commits.back_mut() {
            newest.position = position;
        }
    }

    /// Something of the state stands in this commit.
    pub(super) fn hold(&mut self, commit: Number) {
        if let Some(commit) = self.get_mut(commit) {
            commit.live += 1;
        }
    }

    /// It does so no more.
    pub(super) fn release(&mut self, commit: Number) {
        if let Some(commit) = self.get_mut(commit) {
            commit.live -= 1;
        }
    }

    /// Where a commit is that something stands in.
    pub(super) fn position(&self, commit: Number) -> Position {
        self.index(commit)
            .and_then(|index| self.commits.get(index))
            .map_or_else(Position::default, |commit| commit.position)
    }

    /// The oldest commit that is needed, if it is not the newest too.
    pub(super) fn oldest(&self) -> Option<(Number, Position)> {
        let oldest = self.commits.front().filter(|_| self.commits.len() > 1)?;
        Some((self.first, oldest.position))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.commits.is_empty()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Lets go of the oldest commits that nothing stands in any more, but never of the newest: it tells
    /// where the others begin. Returns the last that it let go.
    pub(super) fn let_go(&mut self) -> Option<Position> {
        let mut gone = None;
        while self.commits.len() > 1
            && let Some(oldest) = self.commits.pop_front_if(|oldest| oldest.live == 0)
        {
            self.first += 1;
            self.bytes -= oldest.bytes;
            gone = Some(oldest.position);
        }
        gone
    }

    /// Position, bytes and what stands in each.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (Position, usize, usize)> {
        self.commits.iter().map(|it| (it.position, it.bytes, it.live))
    }

    fn index(&self, commit: Number) -> Option<usize> {
        usize::try_from(commit.checked_sub(self.first)?).ok()
    }

    fn get_mut(&mut self, commit: Number) -> Option<&mut Written> {
        let index = self.index(commit)?;
        self.commits.get_mut(index)
    }
}
