//! Who may see what is not for everybody: whoever has the token; where none is set, this machine alone.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{ConnectInfo, Request, State as Extract};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;

use super::problem::{Problem, ProblemCode};
use super::{HttpConfig, Server};
use crate::audit::Actor;

/// Headers that a proxy adds: behind one, a loopback peer says nothing about who asks.
const FORWARDING: [&str; 6] =
    ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via"];

/// What a browser says of a request that a page, not a person, made.
const FETCH_SITE: &str = "sec-fetch-site";

/// Lets a request through, or says why not.
pub(super) async fn guard(
    Extract(server): Extract<Arc<Server>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    mut request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let actor = check(&server.shown.config, peer.ip(), request.headers())?;
    request.extensions_mut().insert(actor);
    Ok(next.run(request).await)
}

/// Whose token it is. All are compared, whichever it is.
fn operator(config: &HttpConfig, given: &str) -> Option<Actor> {
    let tokens =
        [(&config.admin_token, Actor::AdminToken), (&config.next_admin_token, Actor::NextAdminToken)];
    let matching = tokens
        .map(|(token, actor)| token.as_ref().is_some_and(|token| token.matches(given)).then_some(actor));
    matching.into_iter().flatten().next()
}

/// Who asks.
fn check(config: &HttpConfig, peer: IpAddr, headers: &HeaderMap) -> Result<Actor, Problem> {
    let actor = bearer(headers).and_then(|given| operator(config, given));
    match config.admin_token {
        Some(_) => actor.ok_or_else(|| {
            Problem::new(ProblemCode::Unauthorized, "this needs the header Authorization: Bearer ADMIN_TOKEN")
        }),
        None if is_local(peer, headers) => Ok(Actor::Loopback),
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
    use crate::secret::Secret;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    fn config(admin_token: Option<&str>, next_admin_token: Option<&str>) -> HttpConfig {
        HttpConfig {
            port: 0,
            address: IpAddr::from([127, 0, 0, 1]),
            admin_token: admin_token.map(Secret::new),
            next_admin_token: next_admin_token.map(Secret::new),
            stream_max_clients: 1,
        }
    }

    fn outcome(token: Option<&str>, peer: &str, pairs: &[(&'static str, &str)]) -> Option<ProblemCode> {
        let checked = check(&config(token, None), peer.parse().unwrap(), &headers(pairs));
        checked.err().map(|problem| problem.code())
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
    fn either_token_opens_and_it_is_known_which() {
        let config = config(Some("this year's"), Some("next year's"));
        for (given, expected) in [
            ("this year's", Some(Actor::AdminToken)),
            ("next year's", Some(Actor::NextAdminToken)),
            ("last year's", None),
            ("next year'", None),
            ("", None),
        ] {
            assert_eq!(operator(&config, given), expected, "{given:?}");
        }
        let same = self::config(Some("same"), Some("same"));
        assert_eq!(operator(&same, "same"), Some(Actor::AdminToken));
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
