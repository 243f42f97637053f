//! Asks the host over HTTP, for the verbs that need no channel.

use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use parlour_core::{Fault, FaultKind};
use serde_json::Value;
use tokio::net::TcpStream;

use crate::args::Client;
use crate::exit::{Code, Failure};
use crate::room;

/// No document of a host takes longer than this, connecting included.
const PATIENCE: Duration = Duration::from_secs(10);
const MAX_BYTES: usize = 64 << 20;

/// A host to read from.
#[derive(Debug)]
pub(crate) struct Rest {
    url: String,
    authority: String,
    /// What stands before every path; empty as a rule.
    base: String,
    token: Option<String>,
}

/// What is asked of it.
struct Ask<'a> {
    method: Method,
    path: &'a str,
    headers: HeaderMap,
    body: Bytes,
    patience: Duration,
}

impl<'a> Ask<'a> {
    fn new(method: Method, path: &'a str) -> Self {
        let (headers, body) = (HeaderMap::new(), Bytes::new());
        Self { method, path, headers, body, patience: PATIENCE }
    }
}

impl Rest {
    pub(crate) fn new(client: &Client) -> Result<Self, Failure> {
        let wrong = || {
            Failure::new(Code::Usage, format!("`{}` is not the address of a host", client.url))
                .hint("an address looks like http://127.0.0.1:9000")
        };
        let uri: Uri = client.url.parse().map_err(|_| wrong())?;
        if !matches!(uri.scheme_str(), Some("http" | "ws")) {
            return Err(wrong());
        }
        let authority = uri.authority().ok_or_else(wrong)?;
        let port = authority.port_u16().unwrap_or(80);
        let authority = format!("{}:{port}", authority.host());
        let base = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { url: client.url.clone(), authority, base, token: room::token(client)? })
    }

    /// The JSON document at this path.
    pub(crate) async fn read(&self, path: &str) -> Result<Value, Failure> {
        self.document(Ask::new(Method::GET, path)).await
    }

    /// The same, which the host may take so much longer to answer with.
    pub(crate) async fn wait(&self, path: &str, longer: Duration) -> Result<Value, Failure> {
        let ask = Ask::new(Method::GET, path);
        self.document(Ask { patience: PATIENCE + longer, ..ask }).await
    }

    /// Has the host do what this path stands for, and returns the JSON document it answers with.
    pub(crate) async fn post(&self, path: &str) -> Result<Value, Failure> {
        self.document(Ask::new(Method::POST, path)).await
    }

    /// The same with a JSON body, which the host may take so much longer to answer.
    pub(crate) async fn post_and_wait(
        &self,
        path: &str,
        body: &Value,
        longer: Duration,
    ) -> Result<Value, Failure> {
        let ask = Ask { body: body.to_string().into(), ..Ask::new(Method::POST, path) };
        self.document(Ask { patience: PATIENCE + longer, ..ask }).await
    }

    /// Has the host change what is at this path.
    pub(crate) async fn patch(&self, path: &str, patch: &Value) -> Result<Value, Failure> {
        let body = patch.to_string().into();
        self.document(Ask { body, ..Ask::new(Method::PATCH, path) }).await
    }

    /// Has the host make what is at this path, or replace it.
    pub(crate) async fn put(&self, path: &str, document: &Value) -> Result<Value, Failure> {
        let body = document.to_string().into();
        self.document(Ask { body, ..Ask::new(Method::PUT, path) }).await
    }

    /// Has the host delete what is at this path.
    pub(crate) async fn delete(&self, path: &str) -> Result<Value, Failure> {
        self.document(Ask::new(Method::DELETE, path)).await
    }

    /// Has the host do what this path stands for with a body and more headers.
    pub(crate) async fn send(
        &self,
        path: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Value, Failure> {
        self.document(Ask { headers, body, ..Ask::new(Method::POST, path) }).await
    }

    /// What is at this path, as it is.
    pub(crate) async fn bytes(&self, path: &str) -> Result<Bytes, Failure> {
        self.success(Ask::new(Method::GET, path)).await
    }

    /// Whether this path answers with a success.
    pub(crate) async fn is_ok(&self, path: &str) -> Result<bool, Failure> {
        Ok(self.request(Ask::new(Method::GET, path)).await?.0.is_success())
    }

    async fn document(&self, ask: Ask<'_>) -> Result<Value, Failure> {
        let body = self.success(ask).await?;
        serde_json::from_slice(&body).map_err(|_| self.is_no_host())
    }

    async fn success(&self, ask: Ask<'_>) -> Result<Bytes, Failure> {
        let (status, body) = self.request(ask).await?;
        if status.is_success() { Ok(body) } else { Err(refusal(status, &body)) }
    }

    async fn request(&self, ask: Ask<'_>) -> Result<(StatusCode, Bytes), Failure> {
        let patience = ask.patience;
        match tokio::time::timeout(patience, self.exchange(ask)).await {
            Ok(answer) => answer,
            Err(_) => {
                let seconds = patience.as_secs();
                let detail = format!("{} did not answer within {seconds} s", self.url);
                Err(Failure::new(Code::Timeout, detail))
            }
        }
    }

    async fn exchange(&self, ask: Ask<'_>) -> Result<(StatusCode, Bytes), Failure> {
        let Ask { method, path, headers, body, .. } = ask;
        let stream = TcpStream::connect(&self.authority).await.map_err(|error| {
            Failure::new(Code::CannotConnect, format!("cannot connect to {}: {error}", self.url))
                .hint("start a host with `parlour serve`, or name one with --url or PARLOUR_URL")
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream))
                .await
                .map_err(|_| self.is_no_host())?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(HOST, &self.authority);
        if let Some(token) = &self.token {
            let mut value = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|error| Failure::new(Code::Usage, error.to_string()))?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let mut request = request.body(Full::new(body)).map_err(|_| self.is_no_host())?;
        request.headers_mut().extend(headers);
        let answer = sender.send_request(request).await.map_err(|_| self.is_no_host())?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_BYTES).collect().await;
        Ok((status, body.map_err(|_| self.is_no_host())?.to_bytes()))
    }

    fn is_no_host(&self) -> Failure {
        Failure::new(Code::Failed, format!("{} does not answer as a host does", self.url))
            .hint("another program may have that port; name the host with --url or PARLOUR_URL")
    }
}

/// A header of a request, from a text that a user gave.
pub(crate) fn header(
    headers: &mut HeaderMap,
    name: &str,
    value: impl AsRef<[u8]>,
) -> Result<(), Failure> {
    let wrong = |detail: String| Failure::new(Code::Usage, detail);
    let parsed = HeaderName::try_from(name)
        .map_err(|_| wrong(format!("`{}` cannot be sent as a header", name.escape_debug())))?;
    let value = HeaderValue::from_bytes(value.as_ref()).map_err(|_| {
        wrong(format!("the value of {name} has characters that no header can have"))
    })?;
    headers.insert(parsed, value);
    Ok(())
}

/// The failure that a problem document tells of.
fn refusal(status: StatusCode, body: &[u8]) -> Failure {
    let problem: Value = serde_json::from_slice(body).unwrap_or_default();
    let kind = problem.get("kind").and_then(Value::as_str).and_then(FaultKind::from_name);
    let detail = match text(&problem, "detail") {
        detail if detail.is_empty() => format!("the host answered {status}"),
        detail => detail,
    };
    let fault = Fault::new(kind.unwrap_or(FaultKind::Internal), detail);
    let hint = text(&problem, "hint");
    Failure::from(if hint.is_empty() { fault } else { fault.hint(hint) })
}

/// The list under this key.
pub(crate) fn items<'a>(document: &'a Value, key: &str) -> &'a [Value] {
    document.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The text under this key; a number is one too.
pub(crate) fn text(document: &Value, key: &str) -> String {
    match document.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        _ => String::new(),
    }
}

/// The texts under this key, on one line.
pub(crate) fn texts(document: &Value, key: &str) -> String {
    items(document, key).iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
}

/// The number under this key.
pub(crate) fn number(document: &Value, key: &str) -> u64 {
    document.get(key).and_then(Value::as_u64).unwrap_or_default()
}

/// A count as a cell of a table.
pub(crate) fn count(count: usize) -> String {
    count.to_string()
}
