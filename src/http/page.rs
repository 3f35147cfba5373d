//! `/`: a page to look at. It is a shell, the same for everybody; what it shows it asks for as any client does, with the
//! token that it is given.

use axum::extract::State as Extract;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

use super::State;

const SOURCE: &str = include_str!("page.html");

/// The page, and what its browser may do: run the page's own script, nothing else, and ask nobody but this service.
pub(super) struct Page {
    html: String,
    policy: String,
}

impl Page {
    /// Where a token is required, the page asks for it before it is refused.
    pub(super) fn new(needs_token: bool) -> Self {
        let html = SOURCE.replace("{{token}}", if needs_token { "required" } else { "none" });
        let policy = format!(
            "default-src 'none'; connect-src 'self'; script-src {}; style-src {}; base-uri 'none'; form-action 'none'; \
             frame-ancestors 'none'",
            hash_of("script", &html),
            hash_of("style", &html)
        );
        Self { html, policy }
    }
}

/// The hash of the one inline block of this element, as a policy names it. The page has no other: of one without a hash
/// the browser would run nothing.
fn hash_of(element: &str, html: &str) -> String {
    let (opened, closed) = (format!("<{element}>"), format!("</{element}>"));
    let block = html.split_once(&opened).and_then(|(_, rest)| rest.split_once(&closed));
    let digest = Sha256::digest(block.map_or("", |(block, _)| block));
    format!("'sha256-{}'", STANDARD.encode(digest))
}

pub(super) async fn page(Extract(server): State) -> Response {
    let head = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, &server.page.policy),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (head, server.page.html.clone()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_short_and_holds_everything_it_needs() {
        assert!(SOURCE.lines().count() < 300);
        for (text, times) in
            [("<script", 1), ("<style", 1), ("{{", 1), ("://", 0), ("innerHTML", 0), ("style=", 0)]
        {
            assert_eq!(SOURCE.matches(text).count(), times, "{text}");
        }
        let policy = Page::new(true).policy;
        assert_eq!(policy.matches("'sha256-").count(), 2, "{policy}");
        assert!(!policy.contains(&STANDARD.encode(Sha256::digest(""))), "an empty block: {policy}");
        assert_eq!(policy, Page::new(false).policy);
    }
}
