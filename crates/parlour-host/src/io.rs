//! The lowest layer of every connection: what was read ahead, how much was written, and the cut for
//! a peer that takes nothing.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Sleep, sleep};

use crate::http::phase::Phase;
use crate::metrics::Metrics;

/// Below this, bytes that were read are copied out of the buffer they came in.
///
/// A slice of a read buffer keeps the whole of it, and the connection then allocates 8 KiB anew for
/// what comes next: for a small message that costs more than the copy.
pub(crate) const SMALL: usize = 4096;

/// What was read, in memory of its own if it is small.
pub(crate) fn kept(bytes: Bytes) -> Bytes {
    if bytes.len() < SMALL { Bytes::copy_from_slice(&bytes) } else { bytes }
}

/// Something to read from and write to.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection's socket.
pub(crate) struct Socket {
    io: Box<dyn Io>,
    /// What was read ahead of whoever reads next.
    ahead: Bytes,
    read: u64,
    written: u64,
    /// How long a write may wait without a byte taken.
    patience: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
    /// While requests are read from it: where they stand.
    phase: Option<Arc<Phase>>,
    _place: Option<Place>,
}

/// One of `limits.connections`, until it is dropped.
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
    metrics: Arc<Metrics>,
}

impl Place {
    pub(crate) fn new(permit: OwnedSemaphorePermit, metrics: &Arc<Metrics>) -> Self {
        metrics.connections.inc();
        Self { _permit: permit, metrics: metrics.clone() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

impl Socket {
    pub(crate) fn new(io: Box<dyn Io>, patience: Duration) -> Self {
        let ahead = Bytes::new();
        let (read, written) = (0, 0);
        Self { io, ahead, read, written, patience, waiting: None, phase: None, _place: None }
    }

    /// Keeps `place` for as long as the socket is there.
    pub(crate) fn holds(&mut self, place: Place) {
        self._place = Some(place);
    }

    /// Gives back bytes that were read and are meant for the next reader.
    pub(crate) fn put_back(&mut self, bytes: Bytes) {
        debug_assert!(self.ahead.is_empty(), "read ahead twice");
        // Even an empty slice keeps the buffer alive that it was cut from.
        self.ahead = if bytes.is_empty() { Bytes::new() } else { bytes };
    }

    /// Closes the connection at once, while the rest of this stays.
    pub(crate) fn cut(&mut self) {
        self.io = Box::new(tokio::io::empty());
        self._place = None;
    }

    /// Tells `phase` of each byte that comes, or nobody.
    pub(crate) fn report_to(&mut self, phase: Option<Arc<Phase>>) {
        self.phase = phase;
    }

    /// Bytes that came from the peer.
    pub(crate) fn read(&self) -> u64 {
        self.read
    }

    /// Bytes that the peer has taken.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Keeps count of a write that the socket took, or ends the connection of a peer that has taken
    /// nothing for too long.
    fn record(
        &mut self,
        cx: &mut Context<'_>,
        wrote: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match wrote {
            Poll::Ready(Ok(n)) => {
                self.written += n as u64;
                self.waiting = None;
                wrote
            }
            Poll::Ready(Err(_)) => wrote,
            Poll::Pending => {
                let patience = self.patience;
                let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(patience)));
                match waiting.as_mut().poll(cx) {
                    Poll::Ready(()) => Poll::Ready(Err(stalled())),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }
}

/// The error of a socket whose peer takes nothing.
fn stalled() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, Stalled)
}

/// Whether `error` came of a peer that took nothing for `timeouts.stalled_write`.
pub(crate) fn is_stalled(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Stalled>())
}

#[derive(Debug, thiserror::Error)]
#[error("the peer took no byte for as long as timeouts.stalled_write")]
struct Stalled;

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = if self.ahead.is_empty() {
            Pin::new(&mut self.io).poll_read(cx, buf)
        } else {
            let n = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead.split_to(n));
            if self.ahead.is_empty() {
                self.ahead = Bytes::new();
            }
            Poll::Ready(Ok(()))
        };
        let came = buf.filled().len() - before;
        self.read += came as u64;
        if came > 0
            && let Some(phase) = &self.phase
        {
            phase.bytes_came();
        }
        read
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.io).poll_write(cx, buf);
        self.record(cx, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.record(cx, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_cut_and_one_that_takes_a_little_is_not() {
        let (mut peer, io) = duplex(64);
        let mut socket = Socket::new(Box::new(io), Duration::from_secs(10));
        let writing = tokio::spawn(async move { socket.write_all(&[0; 640]).await });
        for _ in 0..5 {
            tokio::time::advance(Duration::from_secs(9)).await;
            peer.read_exact(&mut [0; 64]).await.unwrap();
        }
        assert!(!writing.is_finished());
        let error = writing.await.unwrap().unwrap_err();
        assert!(is_stalled(&error), "{error}");
    }
}
