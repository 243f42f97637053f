//! What `call` and `publish` send: a text, a file, or what comes on stdin.

use std::io::{self, IsTerminal};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parlour_core::{ByteString, Payload};
use serde_json::{Map, Value};
use tokio::io::AsyncReadExt;

use crate::args::Body;
use crate::exit::{Code, Failure};

/// The payload that the arguments describe.
///
/// Cancel safe in the sense that nothing is sent; what was read from stdin is lost.
pub(crate) async fn read(args: &Body) -> Result<Payload, Failure> {
    let bytes = match args.body.as_deref() {
        Some("-") => stdin().await?,
        None if !io::stdin().is_terminal() => stdin().await?,
        None => Vec::new(),
        Some(text) => match text.strip_prefix('@') {
            Some(path) => tokio::fs::read(path).await.map_err(|error| {
                Failure::new(Code::Usage, format!("cannot read {path}: {error}"))
                    .hint("@ begins the name of a file; to send such a text, pipe it to `-`")
            })?,
            None => text.as_bytes().to_vec(),
        },
    };
    let mut payload = Payload {
        content_type: content_type(args.content_type.as_deref(), &bytes),
        data_type: args.data_type.as_deref().unwrap_or_default().into(),
        bytes: bytes.into(),
        ..Payload::default()
    };
    for (name, value) in &args.meta {
        payload
            .metadata
            .insert(name.as_str(), value.as_str())
            .map_err(|error| Failure::new(Code::Usage, error.to_string()))?;
    }
    Ok(payload)
}

/// What was asked for, or else what the bytes look like.
pub(crate) fn content_type(asked: Option<&str>, bytes: &[u8]) -> ByteString {
    match asked {
        Some(asked) => asked.into(),
        None if std::str::from_utf8(bytes).is_ok() => {
            ByteString::from_static("text/plain; charset=utf-8")
        }
        None => ByteString::from_static("application/octet-stream"),
    }
}

async fn stdin() -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = tokio::io::stdin().read_to_end(&mut bytes).await;
    read.map_err(|error| Failure::new(Code::Usage, format!("cannot read stdin: {error}")))?;
    Ok(bytes)
}

/// What a payload is, as JSON: `data` if it is text, else `data_base64`.
pub(crate) fn describe(payload: &Payload) -> Map<String, Value> {
    let mut fields = Map::new();
    let metadata: Map<String, Value> =
        payload.metadata.iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    fields.insert("data_type".into(), payload.data_type.to_string().into());
    fields.insert("content_type".into(), payload.content_type.to_string().into());
    fields.insert("metadata".into(), metadata.into());
    match std::str::from_utf8(&payload.bytes) {
        Ok(text) => fields.insert("data".into(), text.into()),
        Err(_) => fields.insert("data_base64".into(), STANDARD.encode(&payload.bytes).into()),
    };
    fields
}
