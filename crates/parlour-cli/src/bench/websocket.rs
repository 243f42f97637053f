//! A WebSocket client's framing, for peers that send whole messages.

use std::io;

use super::input::Input;

pub(super) const TEXT: u8 = 1;
pub(super) const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// Starts a message of `length` bytes, which are to follow as they are.
///
/// The mask is zeros: it is there, the host unmasks as ever, and the driver has nothing to do.
pub(super) fn header(opcode: u8, length: usize, out: &mut Vec<u8>) {
    out.push(0x80 | opcode);
    match length {
        0..126 => out.push(0x80 | length as u8),
        126..0x1_0000 => {
            out.push(0x80 | 126);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            out.push(0x80 | 127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(&[0; 4]);
}

/// Appends a whole message.
pub(super) fn message(opcode: u8, payload: &[u8], out: &mut Vec<u8>) {
    header(opcode, payload.len(), out);
    out.extend_from_slice(payload);
}

/// Gives each message of data that is whole in `input` to `take`. Pings are answered into `output`.
pub(super) fn messages(
    input: &mut Input,
    output: &mut Vec<u8>,
    mut take: impl FnMut(&[u8], &mut Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    while let Some((opcode, head, length)) = next(input.waiting())? {
        let payload = &input.waiting()[head..head + length];
        match opcode {
            TEXT | BINARY => take(payload, output)?,
            PING => message(PONG, payload, output),
            PONG => {}
            CLOSE => {
                let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                let reason = String::from_utf8_lossy(payload.get(2..).unwrap_or_default());
                return Err(io::Error::other(format!("the host closed with {code}: {reason}")));
            }
            other => return Err(broken(&format!("a WebSocket frame of kind {other}"))),
        }
        input.take(head + length);
    }
    Ok(())
}

/// The opcode, the length of the frame's head and that of its payload, once all of it is there.
fn next(bytes: &[u8]) -> io::Result<Option<(u8, usize, usize)>> {
    let &[first, second, ref rest @ ..] = bytes else { return Ok(None) };
    if first & 0xf0 != 0x80 || second & 0x80 != 0 {
        return Err(broken("a fragment, an extension or a mask that was not asked for"));
    }
    let (head, length) = match second {
        126 => match rest.first_chunk::<2>() {
            Some(length) => (4, u16::from_be_bytes(*length).into()),
            None => return Ok(None),
        },
        127 => match rest.first_chunk::<8>() {
            Some(length) => (10, u64::from_be_bytes(*length)),
            None => return Ok(None),
        },
        length => (2, u64::from(length)),
    };
    let length = usize::try_from(length).map_err(|_| broken(&format!("{length} bytes")))?;
    // Subtracted, not added: a length near the largest number must not wrap.
    Ok((bytes.len() - head >= length).then_some((first & 0x0f, head, length)))
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the host sent {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_every_length_are_read_when_they_are_whole() {
        for length in [0_usize, 125, 126, 65_535, 65_536] {
            let payload = vec![b'x'; length];
            let mut bytes = vec![0x80 | BINARY];
            match length {
                0..126 => bytes.push(length as u8),
                126..0x1_0000 => bytes.extend([126, (length >> 8) as u8, length as u8]),
                _ => bytes.extend([&[127][..], &(length as u64).to_be_bytes()].concat()),
            }
            bytes.extend_from_slice(&payload);

            assert_eq!(next(&bytes[..bytes.len() - 1]).unwrap(), None, "{length}");
            let head = bytes.len() - length;
            assert_eq!(next(&bytes).unwrap(), Some((BINARY, head, length)));
        }
    }

    #[test]
    fn a_ping_is_answered_and_a_close_says_why() {
        let mut input = Input::new(64);
        input.fill(&[0x89, 2, b'h', b'i', 0x88, 4, 0x03, 0xe9, b'o', b'k'][..]).unwrap();
        let mut output = Vec::new();
        let error = messages(&mut input, &mut output, |_, _| Ok(())).unwrap_err();
        assert_eq!(output, [0x8a, 0x82, 0, 0, 0, 0, b'h', b'i']);
        assert_eq!(error.to_string(), "the host closed with 1001: ok");
    }
}
