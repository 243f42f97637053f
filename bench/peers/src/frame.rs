//! A WebSocket server's framing, as far as a forwarder of whole messages needs it.

use std::io;
use std::ops::Range;

/// The opcode of a binary message.
pub const BINARY: u8 = 2;

/// A frame that a client sent: what it is, and where its payload and its mask are.
#[derive(Debug, PartialEq)]
#[expect(clippy::exhaustive_structs, reason = "the parts of a frame")]
pub struct ClientFrame {
    /// The opcode.
    pub opcode: u8,
    /// What the payload is masked with.
    pub mask: [u8; 4],
    /// Where it is.
    pub payload: Range<usize>,
}

/// The frame that `bytes` begin with, once all of it is there.
pub fn next(bytes: &[u8]) -> io::Result<Option<ClientFrame>> {
    let &[first, second, ref rest @ ..] = bytes else { return Ok(None) };
    if first & 0xf0 != 0x80 || second & 0x80 == 0 {
        return Err(broken("a fragment, an extension or no mask"));
    }
    let (mask_at, length) = match second & 0x7f {
        126 => match rest.first_chunk::<2>() {
            Some(length) => (4, u64::from(u16::from_be_bytes(*length))),
            None => return Ok(None),
        },
        127 => match rest.first_chunk::<8>() {
            Some(length) => (10, u64::from_be_bytes(*length)),
            None => return Ok(None),
        },
        length => (2, u64::from(length)),
    };
    let Some(&mask) = bytes.get(mask_at..).and_then(<[u8]>::first_chunk::<4>) else {
        return Ok(None);
    };
    let start = mask_at + mask.len();
    let end = usize::try_from(length).ok().and_then(|length| start.checked_add(length));
    let end = end.ok_or_else(|| broken("a frame of impossible length"))?;
    Ok((bytes.len() >= end).then_some(ClientFrame {
        opcode: first & 0x0f,
        mask,
        payload: start..end,
    }))
}

/// Takes the mask off, or puts it on.
pub fn mask(payload: &mut [u8], mask: [u8; 4]) {
    let (wide, narrow) = payload.as_chunks_mut::<8>();
    let twice = u64::from_ne_bytes([
        mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3],
    ]);
    for chunk in wide {
        *chunk = (u64::from_ne_bytes(*chunk) ^ twice).to_ne_bytes();
    }
    narrow.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
    narrow.iter_mut().skip(4).zip(mask).for_each(|(byte, mask)| *byte ^= mask);
}

/// Starts a message of `length` bytes, which are to follow.
pub fn header(length: usize, out: &mut Vec<u8>) {
    out.push(0x80 | BINARY);
    match length {
        0..126 => out.push(length as u8),
        126..0x1_0000 => {
            out.push(126);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            out.push(127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a client sent {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_masked_frame_of_any_length_is_read_when_it_is_whole() {
        for length in [0_usize, 3, 7, 12, 125, 126, 65_535, 65_536] {
            let payload: Vec<u8> = (0..length).map(|place| place as u8).collect();
            let mut bytes = Vec::new();
            header(length, &mut bytes);
            bytes[1] |= 0x80;
            let key = [1, 2, 3, 250];
            bytes.extend_from_slice(&key);
            let start = bytes.len();
            bytes.extend_from_slice(&payload);
            for (place, byte) in bytes[start..].iter_mut().enumerate() {
                *byte ^= key[place % 4];
            }

            assert_eq!(next(&bytes[..bytes.len() - 1]).unwrap(), None, "{length}");
            let frame = next(&bytes).unwrap().unwrap();
            assert_eq!((frame.opcode, frame.mask), (BINARY, key));
            mask(&mut bytes[frame.payload.clone()], frame.mask);
            assert_eq!(bytes[frame.payload], payload);
        }
    }

    #[test]
    fn what_a_client_may_not_send_is_refused() {
        for bytes in [[0x82, 0x01], [0x02, 0x81], [0xc2, 0x81]] {
            assert!(next(&bytes).is_err(), "{bytes:02x?}");
        }
        let endless = [&[0x82, 0xff][..], &[0xff; 8], &[0; 4]].concat();
        assert!(next(&endless).is_err());
    }
}
