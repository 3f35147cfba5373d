//! Who may see what is not for everybody: whoever has the token; where none is set, this machine alone.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{ConnectInfo, Request, State as Extract};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;

use super::Server;
use super::problem::{Problem, ProblemCode};
use crate::secret::Secret;

/// Headers that a proxy adds: behind one, a loopback peer says nothing about who asks.
const FORWARDING: [&str; 6] =
    ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via"];

/// What a browser says of a request that a page, not a person, made.
const FETCH_SITE: &str = "sec-fetch-site";

/// Lets a request through, or says why not.
pub(super) async fn guard(
    Extract(server): Extract<Arc<Server>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    check(server.shown.config.admin_token.as_ref(), peer.ip(), request.headers())?;
    Ok(next.run(request).await)
}

fn check(token: Option<&Secret>, peer: IpAddr, headers: &HeaderMap) -> Result<(), Problem> {
    match token {
        Some(token) if bearer(headers).is_some_and(|given| token.matches(given)) => Ok(()),
        Some(_) => Err(Problem::new(
            ProblemCode::Unauthorized,
            "this needs the header Authorization: Bearer ADMIN_TOKEN",
        )),
        None if is_local(peer, headers) => Ok(()),
        None => Err(Problem::new(
            ProblemCode::LoopbackOnly,
            "this answers on the machine itself only; set ADMIN_TOKEN to use it from elsewhere",
        )),
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// From this machine, by this machine's name, and not from a page of somebody else's. A page of the web can make a
/// browser on this machine ask us: under its own name, which it pointed at us, or, without being shown the answer, under
/// ours.
fn is_local(peer: IpAddr, headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    peer.to_canonical().is_loopback()
        && host.is_some_and(|host| is_local_name(host) && !is_of_another_page(host, headers))
        && FORWARDING.iter().all(|name| !headers.contains_key(*name))
}

fn is_of_another_page(host: &str, headers: &HeaderMap) -> bool {
    let is_our_origin = |origin: &HeaderValue| {
        origin.to_str().ok().and_then(|origin| origin.split_once("://")).is_some_and(|(_, site)| site == host)
    };
    let is_our_site = |site: &HeaderValue| site == "same-origin" || site == "none";
    headers.get(header::ORIGIN).is_some_and(|origin| !is_our_origin(origin))
        || headers.get(FETCH_SITE).is_some_and(|site| !is_our_site(site))
}

fn is_local_name(host: &str) -> bool {
    // A host with an optional port; an IPv6 address stands in brackets.
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    fn outcome(token: Option<&str>, peer: &str, pairs: &[(&'static str, &str)]) -> Option<ProblemCode> {
        let token = token.map(Secret::new);
        check(token.as_ref(), peer.parse().unwrap(), &headers(pairs)).err().map(|problem| problem.code())
    }

    #[test]
    fn without_a_token_only_this_machine_under_its_own_name_is_let_in() {
        let refused = Some(ProblemCode::LoopbackOnly);
        for (peer, pairs, expected) in [
            ("127.0.0.1", &[("host", "localhost:8080")][..], None),
            ("::1", &[("host", "[::1]:8080")], None),
            ("::ffff:127.0.0.1", &[("host", "127.0.0.1")], None),
            ("10.0.0.1", &[("host", "localhost")], refused),
            ("127.0.0.1", &[("host", "evil.example")], refused),
            ("127.0.0.1", &[("host", "localhost.evil.example")], refused),
            ("127.0.0.1", &[], refused),
            ("127.0.0.1", &[("host", "localhost"), ("x-forwarded-for", "1.2.3.4")], refused),
            ("127.0.0.1", &[("host", "localhost"), ("forwarded", "for=x")], refused),
            ("127.0.0.1", &[("host", "localhost:8080"), ("origin", "http://localhost:8080")], None),
            ("127.0.0.1", &[("host", "localhost:8080"), ("origin", "http://evil.example")], refused),
            ("127.0.0.1", &[("host", "localhost:8080"), ("origin", "http://localhost:3000")], refused),
            ("127.0.0.1", &[("host", "localhost:8080"), ("origin", "null")], refused),
            ("127.0.0.1", &[("host", "localhost"), ("sec-fetch-site", "none")], None),
            ("127.0.0.1", &[("host", "localhost"), ("sec-fetch-site", "same-origin")], None),
            ("127.0.0.1", &[("host", "localhost"), ("sec-fetch-site", "same-site")], refused),
            ("127.0.0.1", &[("host", "localhost"), ("sec-fetch-site", "cross-site")], refused),
        ] {
            assert_eq!(outcome(None, peer, pairs), expected, "{peer} {pairs:?}");
        }
    }

    #[test]
    fn with_a_token_nothing_else_counts() {
        let refused = Some(ProblemCode::Unauthorized);
        for (pairs, expected) in [
            (&[("authorization", "Bearer right")][..], None),
            (&[("authorization", "bearer right")], None),
            (&[("authorization", "Bearer wrong")], refused),
            (&[("authorization", "Bearer righ")], refused),
            (&[("authorization", "Bearer right2")], refused),
            (&[("authorization", "Bearer rightright")], refused),
            (&[("authorization", "Bearer RIGHT")], refused),
            (&[("authorization", "Bearer ")], refused),
            (&[("authorization", "Bearer")], refused),
            (&[("authorization", "")], refused),
            (&[("authorization", "Basic right")], refused),
            (&[("authorization", "right")], refused),
            (&[("host", "localhost")], refused),
        ] {
            assert_eq!(outcome(Some("right"), "127.0.0.1", pairs), expected, "{pairs:?}");
        }
    }
}
