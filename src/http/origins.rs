//! The pages of other sites that may read `/v1/stream`, by their origin.

use axum::http::HeaderValue;
use serde::Serialize;

/// What a browser sends for a page without an origin of its own: one that was opened from a file, or is sandboxed.
const OPAQUE: &str = "null";

/// Origins as a browser writes them: `scheme://host[:port]`, or `null`.
///
/// There is no `*`: an address that holds the token is easily shown on a stream or left in a history, and must not be of
/// use to any page whatever.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Origins(Vec<String>);

impl Origins {
    /// Origins with commas or white space between.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|part| !part.is_empty());
        parts.map(one).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a page of this origin may read. Scheme and host come in lower case, and the scheme's own port is left out:
    /// so browsers write them.
    pub(super) fn has(&self, origin: &HeaderValue) -> bool {
        self.0.iter().any(|listed| origin == listed)
    }
}

fn one(text: &str) -> Result<String, String> {
    let text = text.to_ascii_lowercase();
    if text == OPAQUE {
        return Ok(text);
    }
    if text == "*" {
        return Err("\"*\" is not taken: name each origin (null is a page opened from a file)".to_owned());
    }
    let (scheme, site) = text.split_once("://").ok_or_else(|| refused(&text))?;
    let own_port = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => "",
    };
    let site = site.strip_suffix(own_port).unwrap_or(site);
    if is_scheme(scheme) && is_site(site) { Ok(format!("{scheme}://{site}")) } else { Err(refused(&text)) }
}

fn refused(text: &str) -> String {
    // A user before the host may come with a password.
    let shown = crate::secret::without_user_info(text);
    format!("{shown:?} is no origin such as https://overlay.example or http://localhost:3000, nor null")
}

fn is_scheme(scheme: &str) -> bool {
    scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

/// A host, an IPv6 address in brackets, and a port or none.
fn is_site(site: &str) -> bool {
    let (host, port) = match site.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (site, None),
    };
    let is_name = |name: &str| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
    };
    let is_address = |host: &str| {
        host.strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok())
    };
    (is_name(host) || is_address(host)) && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_taken_as_browsers_write_them() {
        let origins = Origins::parse(
            "https://overlay.example, http://LocalHost:3000\nnull https://a.example:443 http://[::1]:80,http://absolute",
        )
        .unwrap();
        for (origin, is_listed) in [
            ("https://overlay.example", true),
            ("http://localhost:3000", true),
            ("null", true),
            ("https://a.example", true),
            ("http://[::1]", true),
            ("http://absolute", true),
            ("http://overlay.example", false),
            ("https://overlay.example:8443", false),
            ("https://overlay.example.evil.example", false),
            ("https://x.overlay.example", false),
            ("http://localhost", false),
            ("*", false),
            ("", false),
        ] {
            assert_eq!(origins.has(&HeaderValue::from_str(origin).unwrap()), is_listed, "{origin}");
        }
        assert!(!Origins::default().has(&HeaderValue::from_static("null")));
    }

    #[test]
    fn what_is_no_origin_is_refused() {
        for text in [
            "*",
            "overlay.example",
            "https://",
            "https://overlay.example/",
            "https://overlay.example/page",
            "https://*.example",
            "https://overlay.example:x",
            "https://overlay.example:70000",
            "https://[::1",
            "://host",
            "https://bücher.example",
            "https://a.example https://b.example?",
        ] {
            assert!(Origins::parse(text).is_err(), "{text}");
        }
        let refused = Origins::parse("https://user:hunter2@overlay.example").unwrap_err();
        assert!(!refused.contains("hunter2"), "{refused}");
    }
}
