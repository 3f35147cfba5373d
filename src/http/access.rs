//! Who may see what is not for everybody: whoever has the token; where none is set, this machine alone. The stream has
//! a token of its own, which may stand in the address as well, since a browser's `EventSource` sends no header; and pages
//! of other sites that are listed may read it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{ConnectInfo, Query, Request, State as Extract};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::problem::{Problem, ProblemCode};
use super::{HttpConfig, Server};
use crate::audit::Actor;
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
        Some(_) => actor.ok_or_else(|| unauthorized("the header Authorization: Bearer ADMIN_TOKEN")),
        None if is_local(peer, headers) => Ok(Actor::Loopback),
        None => Err(loopback_only("set ADMIN_TOKEN to use it from elsewhere")),
    }
}

/// Lets a reader of the stream through, or says why not; either way in words that the browser of a listed page hands on.
pub(super) async fn guard_stream(
    Extract(server): Extract<Arc<Server>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let config = &server.shown.config;
    let headers = request.headers();
    let origin = headers.get(header::ORIGIN).filter(|origin| config.stream_origins.has(origin)).cloned();
    let checked = if request.method() == Method::OPTIONS {
        // A browser asks before it sends a token: there is none to look at yet.
        if origin.is_some() { Ok(()) } else { Err(origin_not_allowed()) }
    } else {
        check_stream(config, peer.ip(), headers, request.uri())
    };
    let mut response = match checked {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    };
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = origin {
        response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    }
    response
}

/// What a browser hears that asks before it asks.
pub(super) async fn preflight() -> impl IntoResponse {
    let head = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, "authorization, last-event-id, x-request-id"),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
    ];
    (StatusCode::NO_CONTENT, head)
}

fn check_stream(config: &HttpConfig, peer: IpAddr, headers: &HeaderMap, uri: &Uri) -> Result<(), Problem> {
    let is = |token: Option<&Secret>, given: Option<&str>| {
        token.zip(given).is_some_and(|(token, given)| token.matches(given))
    };
    let (admin, reader) = (config.admin_token.as_ref(), config.stream_token.as_ref());
    let (given, in_address) = (bearer(headers), access_token(uri));
    let is_operator = given.is_some_and(|given| operator(config, given).is_some());
    if is_operator || is(reader, given) || is(reader, in_address.as_deref()) {
        // Without a place in the list a page could not read the answer: it shall not hold a place here either.
        return if is_of_listed_page(config, headers) { Ok(()) } else { Err(origin_not_allowed()) };
    }
    match (admin, reader) {
        (None, _) if is_local(peer, headers) => Ok(()),
        (None, None) => Err(loopback_only("set STREAM_TOKEN or ADMIN_TOKEN to use it from elsewhere")),
        (Some(_), None) => Err(unauthorized("the header Authorization: Bearer ADMIN_TOKEN")),
        (_, Some(_)) => {
            Err(unauthorized("STREAM_TOKEN, in the header Authorization: Bearer or as ?access_token="))
        }
    }
}

/// No page's request, one of our own page's, or of one that is listed.
fn is_of_listed_page(config: &HttpConfig, headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    headers.get(header::ORIGIN).is_none_or(|origin| {
        config.stream_origins.has(origin) || host.is_some_and(|host| is_our_origin(host, origin))
    })
}

fn access_token(uri: &Uri) -> Option<String> {
    #[derive(Deserialize)]
    struct Given {
        access_token: Option<String>,
    }
    Query::<Given>::try_from_uri(uri).ok()?.0.access_token
}

fn origin_not_allowed() -> Problem {
    Problem::new(
        ProblemCode::OriginNotAllowed,
        "pages of this origin may not read the stream; STREAM_ORIGINS lists those that may",
    )
}

fn unauthorized(what: &str) -> Problem {
    Problem::new(ProblemCode::Unauthorized, format!("this needs {what}"))
}

fn loopback_only(hint: &str) -> Problem {
    Problem::new(ProblemCode::LoopbackOnly, format!("this answers on the machine itself only; {hint}"))
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

fn is_our_origin(host: &str, origin: &HeaderValue) -> bool {
    origin.to_str().ok().and_then(|origin| origin.split_once("://")).is_some_and(|(_, site)| site == host)
}

fn is_of_another_page(host: &str, headers: &HeaderMap) -> bool {
    let is_our_site = |site: &HeaderValue| site == "same-origin" || site == "none";
    headers.get(header::ORIGIN).is_some_and(|origin| !is_our_origin(host, origin))
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
    use crate::http::Origins;

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
            stream_token: None,
            stream_origins: Origins::default(),
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

    const ADMIN: (Option<&str>, Option<&str>) = (Some("admin"), None);
    const OF_NEXT_YEAR: (&str, &str) = ("authorization", "Bearer admin of next year");
    const READER: (Option<&str>, Option<&str>) = (None, Some("reader+/="));
    const BOTH: (Option<&str>, Option<&str>) = (Some("admin"), Some("reader+/="));
    const NONE: (Option<&str>, Option<&str>) = (None, None);

    fn of_stream(
        (admin, reader): (Option<&str>, Option<&str>),
        peer: &str,
        query: &str,
        pairs: &[(&'static str, &str)],
    ) -> Option<ProblemCode> {
        let config = HttpConfig {
            stream_token: reader.map(Secret::new),
            stream_origins: Origins::parse("https://overlay.example null").unwrap(),
            ..config(admin, Some("admin of next year"))
        };
        let uri = format!("/v1/stream{query}").parse().unwrap();
        check_stream(&config, peer.parse().unwrap(), &headers(pairs), &uri)
            .err()
            .map(|problem| problem.code())
    }

    #[test]
    fn the_stream_is_opened_by_its_own_token_too_and_by_that_alone_in_the_address() {
        let refused = Some(ProblemCode::Unauthorized);
        let local = Some(ProblemCode::LoopbackOnly);
        let of_admin = ("authorization", "Bearer admin");
        let of_reader = ("authorization", "Bearer reader+/=");
        let in_address = "?access_token=reader%2B%2F%3D";
        let at = ("host", "localhost");
        for (tokens, peer, query, pairs, expected) in [
            (BOTH, "10.0.0.1", "", &[of_admin][..], None),
            (BOTH, "10.0.0.1", "", &[OF_NEXT_YEAR], None),
            (BOTH, "10.0.0.1", "?access_token=admin%20of%20next%20year", &[], refused),
            (BOTH, "10.0.0.1", "", &[of_reader], None),
            (BOTH, "10.0.0.1", in_address, &[], None),
            (BOTH, "10.0.0.1", "?channel=a&access_token=reader%2B%2F%3D", &[], None),
            (BOTH, "10.0.0.1", "?access_token=admin", &[], refused),
            (BOTH, "10.0.0.1", "?access_token=reader%2B%2F", &[], refused),
            (BOTH, "10.0.0.1", "?access_token=reader%2B%2F%3D&access_token=x", &[], refused),
            (BOTH, "10.0.0.1", "?access_token=", &[], refused),
            (BOTH, "127.0.0.1", "", &[at], refused),
            (READER, "10.0.0.1", in_address, &[], None),
            (READER, "10.0.0.1", "", &[at], refused),
            (READER, "127.0.0.1", "", &[at], None),
            (READER, "127.0.0.1", "", &[at, ("origin", "https://overlay.example")], refused),
            (ADMIN, "10.0.0.1", "", &[of_admin], None),
            (ADMIN, "10.0.0.1", "?access_token=admin", &[], refused),
            (ADMIN, "127.0.0.1", "", &[at], refused),
            (NONE, "127.0.0.1", "", &[at], None),
            (NONE, "127.0.0.1", "?access_token=x", &[at], None),
            (NONE, "10.0.0.1", in_address, &[of_reader], local),
            // A list alone opens nothing.
            (NONE, "127.0.0.1", "", &[at, ("origin", "https://overlay.example")], local),
        ] {
            assert_eq!(
                of_stream(tokens, peer, query, pairs),
                expected,
                "{tokens:?} {peer} {query} {pairs:?}"
            );
        }
    }

    #[test]
    fn a_token_in_the_hands_of_a_page_that_is_not_listed_opens_nothing() {
        let refused = Some(ProblemCode::OriginNotAllowed);
        for (origin, expected) in [
            ("https://overlay.example", None),
            ("null", None),
            ("https://inlet.example", None),
            ("https://evil.example", refused),
            ("http://overlay.example", refused),
            ("https://overlay.example.evil.example", refused),
            ("", refused),
        ] {
            let pairs =
                [("host", "inlet.example"), ("origin", origin), ("authorization", "Bearer reader+/=")];
            assert_eq!(of_stream(READER, "10.0.0.1", "", &pairs), expected, "{origin}");
            let admin = [("host", "inlet.example"), ("origin", origin), ("authorization", "Bearer admin")];
            assert_eq!(of_stream(ADMIN, "10.0.0.1", "", &admin), expected, "{origin}");
        }
    }
}
