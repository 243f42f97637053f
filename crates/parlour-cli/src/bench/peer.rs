//! What each end of a connection says: the seam between the loop and the protocols.

use std::io;

use super::input::Input;
use super::tally::Tally;

/// One end of a connection that has been opened.
pub(super) trait Peer {
    /// Says what it has to say of its own accord: a caller makes all its calls.
    fn begin(&mut self, _tally: &mut Tally, _output: &mut Vec<u8>) {}

    /// May say more, after a round in which every connection was heard. Asked of the leader, and of
    /// those that were woken.
    fn prompt(&mut self, _tally: &mut Tally, _output: &mut Vec<u8>) {}

    /// Takes what is whole in `input`, and says what follows from it. An error is the end of the run.
    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()>;
}

impl Peer for Box<dyn Peer> {
    fn begin(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        (**self).begin(tally, output);
    }

    fn prompt(&mut self, tally: &mut Tally, output: &mut Vec<u8>) {
        (**self).prompt(tally, output);
    }

    fn hear(&mut self, input: &mut Input, tally: &mut Tally, out: &mut Vec<u8>) -> io::Result<()> {
        (**self).hear(input, tally, out)
    }
}

/// Finds a text where it was the last time, or wherever it is.
#[derive(Debug)]
pub(super) struct Finder {
    text: Vec<u8>,
    last: usize,
}

impl Finder {
    pub(super) fn new(text: impl Into<Vec<u8>>) -> Self {
        Self { text: text.into(), last: 0 }
    }

    /// What stands behind the text.
    pub(super) fn after<'a>(&mut self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        if !bytes.get(self.last..).is_some_and(|bytes| bytes.starts_with(&self.text)) {
            self.last = bytes.windows(self.text.len()).position(|part| part == self.text)?;
        }
        bytes.get(self.last + self.text.len()..)
    }

    /// What stands behind the text, up to the next quotation mark.
    pub(super) fn quoted<'a>(&mut self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let rest = self.after(bytes)?;
        rest.iter().position(|&byte| byte == b'"').map(|end| &rest[..end])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_where_it_was_and_elsewhere() {
        let mut finder = Finder::new("\"id\":\"");
        assert_eq!(finder.quoted(b"{\"id\":\"7\"}"), Some(&b"7"[..]));
        assert_eq!(finder.quoted(b"{\"id\":\"81\"}"), Some(&b"81"[..]));
        assert_eq!(finder.quoted(b"{\"a\":1,\"id\":\"9\"}"), Some(&b"9"[..]));
        assert_eq!(finder.quoted(b"{}"), None);
    }
}
