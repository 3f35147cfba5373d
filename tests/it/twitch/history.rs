//! A history service for these tests: the recent-messages API over what was said on the chat server, or nonsense.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use inlet::tasks::Tasks;
use serde_json::json;
use tokio::net::TcpListener;

use super::irc::Irc;

/// How much one answer holds at most.
const LIMIT: usize = 800;

struct Service {
    irc: Arc<Irc>,
    asked: Mutex<Vec<String>>,
}

/// The service. Dropping it closes everything.
pub struct History {
    addr: SocketAddr,
    service: Arc<Service>,
    _tasks: Tasks,
}

impl History {
    pub async fn of(irc: &Arc<Irc>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = Arc::new(Service { irc: Arc::clone(irc), asked: Mutex::default() });
        let router = Router::new()
            .route("/base/api/v2/recent-messages/{channel}", get(recent_messages))
            .with_state(Arc::clone(&service));
        let mut tasks = Tasks::new();
        tasks.spawn("history", async move { axum::serve(listener, router).await.unwrap() });
        Self { addr, service, _tasks: tasks }
    }

    pub fn url(&self) -> String {
        format!("http://user:very-secret-password@{}/base/", self.addr)
    }

    /// The channels asked for, in order.
    pub fn asked(&self) -> Vec<String> {
        self.service.asked.lock().unwrap().clone()
    }
}

async fn recent_messages(
    State(service): State<Arc<Service>>,
    Path(channel): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    service.asked.lock().unwrap().push(channel.clone());
    let number = |name: &str| query[name].parse::<i64>().unwrap();
    let (limit, after, before) = (number("limit"), number("after"), number("before"));
    let messages = match channel.as_str() {
        hung if hung.starts_with("hung") => {
            tokio::time::sleep(Duration::from_mins(10)).await;
            Vec::new()
        }
        "broken" => return StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        "garbage" => return "<html>at your service</html>".into_response(),
        "huge" => vec!["x".repeat(20 << 20)],
        "absent" => {
            let body = json!({ "messages": [], "error": "not joined", "error_code": "channel_not_joined" });
            return axum::Json(body).into_response();
        }
        _ => {
            let said = service.irc.said();
            let mut lines: Vec<_> = said
                .iter()
                .filter(|said| said.channel == channel && said.at > after && said.at < before)
                .map(|said| {
                    // As such a service writes it: its own tags among the others, in any order.
                    let line = said.line.strip_prefix('@').unwrap();
                    format!("@rm-received-ts={};historical=1;{line}", said.at)
                })
                .collect();
            // The newest, the oldest first.
            lines.drain(..lines.len().saturating_sub(LIMIT.min(usize::try_from(limit).unwrap())));
            lines
        }
    };
    axum::Json(json!({ "messages": messages, "error": null, "error_code": null })).into_response()
}
