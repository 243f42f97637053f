//! Reading a request's body, within its size and its time.

use std::time::Duration;

use axum::extract::Request;
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use http::StatusCode;
use http_body::Body;
use http_body_util::BodyExt;
use parlour_core::{Fault, FaultKind};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use super::answer::{Refusal, invalid};
use crate::config::{ByteCount, limits, timeouts};
use crate::exchange::Exchange;
use crate::io::kept;
use crate::json;

/// Reads a body that is one JSON object.
pub(crate) async fn object<T: DeserializeOwned>(
    request: Request,
    exchange: &Exchange,
) -> Result<T, Refusal> {
    let settings = &exchange.config().limits;
    let limit = (limits::json_body_bytes, settings.json_body_bytes);
    let body = read(request.into_body(), limit, exchange).await?;
    // The fields of a struct may come as an array, too.
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(invalid("invalid type: an array, an object is expected")
            .hint("send one JSON object")
            .into());
    }
    let object = json::parse(&body, settings.json_depth);
    Ok(object.map_err(|error| error.fault(exchange.metrics()))?)
}

/// Reads the whole of `body`, at most `limit` bytes; `key` names that limit.
pub(crate) async fn read<B>(
    mut body: B,
    (key, limit): (&'static str, ByteCount),
    exchange: &Exchange,
) -> Result<Bytes, Refusal>
where
    B: Body<Data = Bytes, Error: std::fmt::Display> + Unpin,
{
    let too_large = |length: &str| {
        let detail = format!("the body has {length} bytes, {limit} are allowed");
        let fault = Fault::new(FaultKind::TooLarge, detail).hint("send less, or raise the limit");
        Refusal::from(exchange.metrics().limit_met(key, Some(limit.0), fault))
    };
    if let Some(length) = body.size_hint().exact()
        && length > limit.0 as u64
    {
        discard(body).await;
        return Err(too_large(&length.to_string()));
    }
    let config = exchange.config();
    let stall = config.timeouts.body_stall;
    let rate = config.limits.body_bytes_per_second.0 as f64;
    let mut first: Option<Bytes> = None;
    let mut rest = BytesMut::new();
    // Most bodies came whole, with the head of their request, and need no clock.
    let mut early = body.frame().now_or_never();
    let mut began = None;
    loop {
        let frame = match early.take() {
            Some(frame) => Ok(frame),
            None => timeout(stall, body.frame()).await,
        };
        let frame = match frame {
            Err(_) => return Err(slow("the body stalled", timeouts::body_stall, exchange)),
            Ok(None) => break,
            Ok(Some(Err(error))) => {
                return Err(Refusal::invalid(
                    StatusCode::BAD_REQUEST,
                    format!("the body broke off: {error}"),
                ));
            }
            Ok(Some(Ok(frame))) => frame,
        };
        // Trailers say nothing here.
        let Ok(data) = frame.into_data() else { continue };
        let length = first.as_ref().map_or(0, Bytes::len) + rest.len() + data.len();
        if length > limit.0 {
            discard(body).await;
            return Err(too_large(&format!("more than {}", limit.0)));
        }
        if first.is_none() && body.is_end_stream() {
            return Ok(kept(data));
        }
        let elapsed = began.get_or_insert_with(Instant::now).elapsed();
        if elapsed > stall && (length as f64) < rate * elapsed.as_secs_f64() {
            let key = limits::body_bytes_per_second;
            return Err(slow("the body comes too slowly", key, exchange));
        }
        match &first {
            None => first = Some(kept(data)),
            Some(head) => {
                if rest.is_empty() {
                    rest.extend_from_slice(head);
                    first = Some(Bytes::new());
                }
                rest.extend_from_slice(&data);
            }
        }
    }
    Ok(if rest.is_empty() { first.unwrap_or_default() } else { rest.freeze() })
}

/// Takes a little more of a body that is refused: a client that is still writing when the connection
/// closes would see a broken pipe instead of the answer.
async fn discard(mut body: impl Body<Data = Bytes> + Unpin) {
    let (mut left, time) = (8 * 1024 * 1024_usize, Duration::from_secs(2));
    let taking = async {
        while let Some(Ok(frame)) = body.frame().await {
            left = frame.data_ref().map_or(left, |data| left.saturating_sub(data.len()));
            if left == 0 {
                return;
            }
        }
    };
    let _ = timeout(time, taking).await;
}

fn slow(detail: &str, key: &'static str, exchange: &Exchange) -> Refusal {
    let fault = Fault::new(FaultKind::Invalid, detail);
    let fault = exchange.metrics().limit_met(key, None, fault);
    Refusal::from(fault).status(StatusCode::REQUEST_TIMEOUT).hint("send it faster, or in one piece")
}
