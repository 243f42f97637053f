//! Reads HTTP/1.1 answers.

use std::borrow::Cow;
use std::io;

/// An answer, and how many bytes of the stream it took.
#[derive(Debug, PartialEq)]
pub(super) struct Response<'a> {
    pub(super) status: u16,
    pub(super) head: &'a [u8],
    pub(super) body: Cow<'a, [u8]>,
    pub(super) taken: usize,
}

/// How a body ends.
#[derive(Clone, Copy)]
enum Length {
    Bytes(usize),
    Chunked,
}

/// The answer that `bytes` begin with, once all of it is there.
pub(super) fn response(bytes: &[u8]) -> io::Result<Option<Response<'_>>> {
    let Some(status) = bytes.get(9..12) else { return Ok(None) };
    if !bytes.starts_with(b"HTTP/1.1 ") {
        return Err(broken("something that is not HTTP/1.1"));
    }
    let status = number(status, 10).ok_or_else(|| broken("a status that is no number"))?;
    // 101 and 204 have no body and need not say so.
    let mut length = matches!(status, 101 | 204).then_some(Length::Bytes(0));
    let mut end = 0;
    loop {
        let Some(line) = line(&bytes[end..]) else { return Ok(None) };
        end += line.len() + 2;
        if line.is_empty() {
            break;
        }
        if let Some(value) = header(line, b"content-length") {
            let bytes = number(value, 10).ok_or_else(|| broken("a length that is no number"))?;
            length = Some(Length::Bytes(bytes));
        } else if let Some(value) = header(line, b"transfer-encoding") {
            if !value.eq_ignore_ascii_case(b"chunked") {
                return Err(broken("an unknown transfer encoding"));
            }
            length = Some(Length::Chunked);
        }
    }
    let head = &bytes[..end];
    let (body, taken) = match length {
        Some(Length::Bytes(length)) => match bytes[end..].get(..length) {
            Some(body) => (Cow::Borrowed(body), end + length),
            None => return Ok(None),
        },
        Some(Length::Chunked) => match chunks(&bytes[end..])? {
            Some((body, length)) => (Cow::Owned(body), end + length),
            None => return Ok(None),
        },
        None => return Err(broken("an answer that does not say where it ends")),
    };
    Ok(Some(Response { status: status as u16, head, body, taken }))
}

/// The value of a header line, if it has that name (in lower case).
pub(super) fn header<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (start, value) = line.split_at_checked(name.len())?;
    let value = value.strip_prefix(b":")?;
    start.eq_ignore_ascii_case(name).then(|| value.trim_ascii())
}

fn chunks(bytes: &[u8]) -> io::Result<Option<(Vec<u8>, usize)>> {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let Some(size) = bytes.get(at..).and_then(line) else { return Ok(None) };
        at += size.len() + 2;
        let size = size.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii();
        let size = number(size, 16).ok_or_else(|| broken("a chunk without a size"))?;
        if size == 0 {
            break;
        }
        let Some(chunk) = bytes.get(at..).and_then(|rest| rest.get(..size)) else {
            return Ok(None);
        };
        body.extend_from_slice(chunk);
        at += size + 2;
    }
    // Trailers, up to an empty line.
    loop {
        let Some(line) = bytes.get(at..).and_then(line) else { return Ok(None) };
        at += line.len() + 2;
        if line.is_empty() {
            return Ok(Some((body, at)));
        }
    }
}

/// The line that `bytes` begin with, once its end is there.
fn line(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.iter().position(|&byte| byte == b'\n')?;
    bytes[..end].strip_suffix(b"\r")
}

fn number(digits: &[u8], radix: u32) -> Option<usize> {
    usize::from_str_radix(std::str::from_utf8(digits).ok()?, radix).ok()
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the host sent {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `bytes`, and checks that no shorter beginning of them is taken for an answer.
    fn whole(bytes: &[u8]) -> Response<'_> {
        for end in 0..bytes.len() {
            assert_eq!(response(&bytes[..end]).unwrap(), None, "{end}");
        }
        response(bytes).unwrap().unwrap()
    }

    #[test]
    fn a_body_ends_where_the_answer_says() {
        let answer = whole(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nx: y\r\n\r\nhello");
        assert_eq!((answer.status, &*answer.body), (200, &b"hello"[..]));

        let answer = whole(
            b"HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=1\r\n0123456789\r\n0\r\nt: 1\r\n\r\n",
        );
        assert_eq!((answer.status, &*answer.body), (404, &b"abc0123456789"[..]));

        assert_eq!(
            whole(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n").status,
            101
        );
    }

    #[test]
    fn what_follows_an_answer_is_left_for_the_next() {
        let answer =
            response(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\naHTTP/1.1 ").unwrap().unwrap();
        assert_eq!((&*answer.body, answer.taken), (&b"a"[..], 39));
    }

    #[test]
    fn an_answer_without_an_end_is_refused() {
        assert!(response(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
        assert!(response(b"HTTP/1.0 200 OK\r\n\r\n").is_err());
        assert!(response(b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n").is_err());
    }
}
