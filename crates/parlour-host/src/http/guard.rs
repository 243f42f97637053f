//! Who may come in: the Host and Origin of every request, and the bearer token.
//!
//! A page in a browser can reach a host on the developer's own machine: by naming it (then `Origin`
//! is not on the list), or by a name that was pointed at 127.0.0.1 after the page came (then `Host`
//! is not). Both lists hold on loopback too.

use std::net::IpAddr;
use std::sync::Arc;

use bytestring::ByteString;
use http::{HeaderMap, Request, StatusCode, Uri, header};
use parlour_core::{Fault, FaultKind, Principal};
use subtle::ConstantTimeEq;

use super::answer::{Refusal, invalid};
use crate::Config;
use crate::config::{limits, server};
use crate::metrics::Metrics;

/// The rules, made once from the configuration.
#[derive(Debug)]
pub(crate) struct Guard {
    hosts: Vec<String>,
    origins: Vec<String>,
    max_headers: usize,
    /// Whether the host listens on all addresses of its machine, so that any address may name it.
    any_address: bool,
    token: Option<Box<str>>,
    metrics: Arc<Metrics>,
}

impl Guard {
    /// `token` is the content of the token file, if there is one.
    pub(crate) fn new(config: &Config, token: Option<&str>, metrics: Arc<Metrics>) -> Self {
        let listen = host_of(&config.server.listen).to_ascii_lowercase();
        let mut hosts: Vec<_> =
            config.server.allowed_hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        let any_address = matches!(listen.as_str(), "0.0.0.0" | "[::]");
        hosts.push(listen);
        Self {
            hosts,
            any_address,
            max_headers: config.limits.headers,
            origins: config.server.allowed_origins.iter().map(|o| o.to_ascii_lowercase()).collect(),
            token: token.map(Into::into),
            metrics,
        }
    }

    /// Says who sends `request`, or why it is not let in.
    pub(crate) fn admit<B>(&self, request: &Request<B>) -> Result<Principal, Refusal> {
        if request.headers().len() > self.max_headers {
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            let fault = invalid("the request has too many header fields")
                .hint("send fewer, or raise the limit");
            let fault = self.metrics.limit_met(limits::headers, Some(self.max_headers), fault);
            return Err(Refusal::from(fault).status(status));
        }
        self.check_host(request.uri(), request.headers())?;
        self.check_origin(request.headers())?;
        let is_open = matches!(request.uri().path(), "/livez" | "/readyz" | "/healthz");
        match &self.token {
            None => Ok(Principal::ANONYMOUS),
            Some(_) if is_open => Ok(Principal::ANONYMOUS),
            Some(token) => check_token(token, request.headers()),
        }
    }

    fn check_host(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Refusal> {
        let mut named = headers.get_all(header::HOST).iter();
        let host = match (uri.authority(), named.next()) {
            (Some(authority), Some(host)) if host != authority.as_str() => {
                let detail = "the request names one host in its target and another in Host";
                return Err(Refusal::invalid(StatusCode::BAD_REQUEST, detail));
            }
            (Some(authority), _) => authority.as_str(),
            (None, Some(host)) => host.to_str().unwrap_or("?"),
            (None, None) => {
                return Err(Refusal::invalid(StatusCode::BAD_REQUEST, "the request names no Host"));
            }
        };
        if named.next().is_some() {
            return Err(Refusal::invalid(StatusCode::BAD_REQUEST, "the request names two Hosts"));
        }
        if self.allows_host(host_of(host)) {
            return Ok(());
        }
        let detail = format!("requests may not name the host `{}`", host.escape_debug());
        let fault = Fault::new(FaultKind::Forbidden, detail)
            .hint("use the address the host listens on, or add the name to the setting");
        Err(self.metrics.limit_met(server::allowed_hosts, None, fault).into())
    }

    fn allows_host(&self, host: &str) -> bool {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let address = bare.unwrap_or(host).parse::<IpAddr>().map(|a| a.to_canonical());
        // An address, unlike a name, cannot be pointed elsewhere behind a page's back.
        host.eq_ignore_ascii_case("localhost")
            || address.is_ok_and(|address| self.any_address || address.is_loopback())
            || self.hosts.iter().any(|known| known.eq_ignore_ascii_case(host))
    }

    fn check_origin(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        for origin in headers.get_all(header::ORIGIN) {
            let origin = origin.to_str().unwrap_or("?");
            if !self.origins.contains(&origin.to_ascii_lowercase()) {
                let detail =
                    format!("pages of `{}` may not talk to this host", origin.escape_debug());
                let fault = Fault::new(FaultKind::Forbidden, detail)
                    .hint("add the origin to the setting if its pages are yours");
                return Err(self.metrics.limit_met(server::allowed_origins, None, fault).into());
            }
        }
        Ok(())
    }
}

fn check_token(token: &str, headers: &HeaderMap) -> Result<Principal, Refusal> {
    let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
    });
    // The time of the comparison says nothing about where two tokens differ.
    if shown.is_some_and(|shown| bool::from(shown.as_bytes().ct_eq(token.as_bytes()))) {
        return Ok(Principal::named(ByteString::from_static("token")));
    }
    let detail = match shown {
        None => "the request shows no token",
        Some(_) => "the host does not know this token",
    };
    Err(Fault::new(FaultKind::Unauthenticated, detail)
        .hint("send `Authorization: Bearer TOKEN`, with the token the host was started with"))
    .map_err(|fault| Refusal::from(fault).challenge())
}

/// The host of `host:port`, with the brackets of an IPv6 address.
fn host_of(authority: &str) -> &str {
    match authority.rfind(':') {
        Some(colon)
            if !authority[colon..].contains(']')
                && authority[colon + 1..].bytes().all(|b| b.is_ascii_digit()) =>
        {
            &authority[..colon]
        }
        _ => authority,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_and_listed_hosts_may_be_named() {
        let mut config = Config::default();
        config.set("server.allowed_hosts", "room.example, Other.example").unwrap();
        let guard = Guard::new(&config, None, Arc::new(Metrics::new(&config)));
        for good in [
            "localhost",
            "LOCALHOST:9000",
            "127.0.0.1:9000",
            "127.9.9.9",
            "[::1]:9000",
            "[::1]",
            "room.example",
            "other.EXAMPLE:80",
        ] {
            assert!(guard.allows_host(host_of(good)), "{good}");
        }
        for bad in [
            "evil.com",
            "localhost.evil.com",
            "127.0.0.1.evil.com:9000",
            "evil.com:9000",
            "",
            "8.8.8.8",
            "[::2]",
            "localhost:x",
            "::1:9000x",
            "room.example.evil.com",
            "0.0.0.0",
        ] {
            assert!(!guard.allows_host(host_of(bad)), "{bad}");
        }
    }
}
