//! Who may do what.
//!
//! - Without an API key anybody who reaches the server may generate; with one, only those who
//!   bring it. `/health` is open.
//! - Patches are changed, and answers without them given, only to who brings the patch key. A
//!   server without a patch key does neither, on loopback too: every program and every user of
//!   the machine reaches that.
//! - The patch key opens everything.
//! - A browser must not be made to use the server by a page from elsewhere: requests that name
//!   another origin are refused, no CORS header is ever sent, and a server on loopback answers to
//!   IP addresses, `localhost` and the names that were allowed alone (DNS rebinding).

use super::error::ApiError;
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, StatusCode};
use sha2::{Digest as _, Sha256};
use std::net::{IpAddr, Ipv6Addr};
use subtle::{Choice, ConstantTimeEq};

/// A secret, of which only the hash is kept.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl Key {
    /// Of its text.
    pub fn new(text: &str) -> Self {
        Self(Sha256::digest(text).into())
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

/// Whether `text` is one of `keys`, in a time that does not tell which or how nearly.
fn opens(keys: &[Key], text: &str) -> bool {
    let given = Key::new(text);
    let hits = keys.iter().map(|k| k.0.ct_eq(&given.0));
    hits.fold(Choice::from(0), |any, hit| any | hit).into()
}

/// The keys of a server.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    /// Any of these is wanted for generating; none: anybody may.
    pub api: Vec<Key>,
    /// Any of these is wanted for changing patches; none: nobody may.
    pub patch: Vec<Key>,
}

impl Keys {
    /// May the sender of `headers` generate?
    pub(super) fn may_use(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.api.is_empty() {
            return Ok(());
        }
        let key = bearer(headers)?;
        match opens(&self.api, key) | opens(&self.patch, key) {
            true => Ok(()),
            false => Err(wrong()),
        }
    }

    /// May the sender of `headers` change patches?
    pub(super) fn may_manage(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.patch.is_empty() {
            return Err(ApiError::forbidden(
                "this server was started without --patch-key: patches are not changed over HTTP",
            )
            .code("no_patch_key"));
        }
        let key = bearer(headers)?;
        if opens(&self.patch, key) {
            return Ok(());
        }
        Err(match opens(&self.api, key) {
            true => ApiError::forbidden("the API key does not allow this: it wants the patch key")
                .code("patch_key_wanted"),
            false => wrong(),
        })
    }
}

fn bearer(headers: &HeaderMap) -> Result<&str, ApiError> {
    let value = headers.get(AUTHORIZATION).and_then(|v| v.to_str().ok());
    let parts = value.and_then(|v| v.split_once(' '));
    parts
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| key.trim())
        .ok_or_else(|| {
            let message = "wanted a key in the header `Authorization: Bearer KEY`, found none";
            ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key")
        })
}

fn wrong() -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, "this key is not known here").code("invalid_api_key")
}

/// Refuse what a page from elsewhere may have sent. `names`: those the server answers to beside
/// addresses and `localhost`; none: any.
pub(super) fn check_origin(headers: &HeaderMap, names: Option<&[String]>) -> Result<(), ApiError> {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
    let host = text(HOST).unwrap_or_default();
    if let Some(names) = names
        && !is_known(host, names)
    {
        let message = format!("this server does not answer to {host:?} (--allow-host does that)");
        return Err(ApiError::forbidden(message).code("host"));
    }
    if headers.contains_key(ORIGIN) {
        let origin = text(ORIGIN).unwrap_or_default();
        let authority = origin.split_once("://").map(|(_, a)| a);
        if !authority.is_some_and(|a| a.eq_ignore_ascii_case(host)) {
            let message = format!("requests from pages of {origin:?} are not answered");
            return Err(ApiError::forbidden(message).code("origin"));
        }
    }
    Ok(())
}

fn is_known(host: &str, names: &[String]) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => {
            let address = v6.split(']').next().unwrap_or_default();
            return address.parse::<Ipv6Addr>().is_ok();
        }
        None => host.split(':').next().unwrap_or_default(),
    };
    name.parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || names.iter().any(|n| n.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for &(name, value) in pairs {
            map.insert(name, value.parse().expect("a header"));
        }
        map
    }

    #[test]
    fn keys_open_what_they_are_for() {
        let keys = Keys {
            api: vec![Key::new("a"), Key::new("b")],
            patch: vec![Key::new("p")],
        };
        let with = |value: &str| headers(&[("authorization", value)]);
        let status = |r: Result<(), ApiError>| r.err().map(|e| e.status.as_u16());
        let uses = |value| status(keys.may_use(&with(value)));
        let manages = |value| status(keys.may_manage(&with(value)));
        assert_eq!(
            [uses("Bearer a"), uses("bearer b"), uses("Bearer p")],
            [None; 3]
        );
        assert_eq!(
            [uses("Bearer c"), uses("Basic a"), uses("a")],
            [Some(401); 3]
        );
        assert_eq!(manages("Bearer p"), None);
        assert_eq!(
            [manages("Bearer a"), manages("Bearer c")],
            [Some(403), Some(401)]
        );
        assert_eq!(status(keys.may_manage(&HeaderMap::new())), Some(401));
        let open = Keys::default();
        assert_eq!(status(open.may_use(&HeaderMap::new())), None);
        assert_eq!(status(open.may_manage(&with("Bearer p"))), Some(403));
    }

    #[test]
    fn pages_from_elsewhere_are_refused() {
        let names = ["model.lan".to_owned()];
        let ok = |host: &str, origin: Option<&str>| {
            let pairs = [("host", host), ("origin", origin.unwrap_or(""))];
            let n = if origin.is_some() { 2 } else { 1 };
            check_origin(&headers(&pairs[..n]), Some(&names)).is_ok()
        };
        for host in [
            "127.0.0.1:8080",
            "localhost",
            "[::1]:80",
            "MODEL.lan:1",
            "10.0.0.1",
        ] {
            assert!(ok(host, None), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "",
            "[evil]:1",
            "model.lan.evil",
        ] {
            assert!(!ok(host, None), "{host}");
        }
        assert!(ok("localhost:8080", Some("http://localhost:8080")));
        for origin in ["http://localhost:9", "https://evil.example", "null", ""] {
            assert!(!ok("localhost:8080", Some(origin)), "{origin}");
        }
        assert!(check_origin(&headers(&[("host", "any.example")]), None).is_ok());
    }
}
