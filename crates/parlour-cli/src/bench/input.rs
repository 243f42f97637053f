//! Bytes that were read and not yet understood.

use std::io::{self, Read};

/// More than any answer that the driver asks for; a peer that sends more is broken.
const MAX: usize = 64 << 20;

/// A read buffer that keeps what is not yet whole.
#[derive(Debug)]
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new(capacity: usize) -> Self {
        Self { bytes: vec![0; capacity], start: 0, end: 0 }
    }

    /// What is there and not yet taken.
    pub(super) fn waiting(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Drops the first `length` bytes of what waits.
    pub(super) fn take(&mut self, length: usize) {
        self.start += length;
    }

    /// Reads once. Returns whether more may be there to read; the peer's end is an error.
    pub(super) fn fill(&mut self, mut from: impl Read) -> io::Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.bytes.len() {
            self.make_room()?;
        }
        let room = &mut self.bytes[self.end..];
        match from.read(room)? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the host closed a connection")),
            length => {
                let is_full = length == room.len();
                self.end += length;
                Ok(is_full)
            }
        }
    }

    fn make_room(&mut self) -> io::Result<()> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        } else if self.bytes.len() < MAX {
            self.bytes.resize(self.bytes.len() * 2, 0);
        } else {
            return Err(io::Error::other(format!("the host sent more than {MAX} bytes at once")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_whole_is_kept_however_it_comes() {
        let mut input = Input::new(4);
        let mut source: &[u8] = b"abcdefghij";
        assert!(input.fill(&mut source).unwrap());
        input.take(1);
        assert!(input.fill(&mut source).unwrap());
        assert_eq!(input.waiting(), b"bcde");
        assert!(input.fill(&mut source).unwrap());
        assert_eq!(input.waiting(), b"bcdefghi");
        input.take(8);
        assert!(!input.fill(&mut source).unwrap());
        assert_eq!(input.waiting(), b"j");
        assert_eq!(input.fill(&mut source).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
