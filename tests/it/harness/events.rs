//! A reader of `/v1/stream` that shares nothing with the service.

use futures_util::StreamExt as _;
use serde_json::Value;

use super::inlet::Inlet;

/// Events of `/v1/stream`: id and data.
pub struct Events {
    body: std::pin::Pin<Box<dyn futures_util::Stream<Item = reqwest::Result<bytes::Bytes>>>>,
    bytes: Vec<u8>,
}

impl Events {
    /// Opens them; `last_id` is what `Last-Event-ID` says.
    pub async fn open(inlet: &Inlet, query: &str, last_id: Option<&str>) -> Self {
        let mut request = reqwest::Client::builder()
            .no_proxy()
            .build()
            .unwrap()
            .get(inlet.url(&format!("/v1/stream{query}")));
        if let Some(id) = last_id {
            request = request.header("last-event-id", id);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { body: Box::pin(response.bytes_stream()), bytes: Vec::new() }
    }

    /// The next event's block, comments left out; `None` at the end.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.bytes.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = self.bytes.drain(..end + 2).take(end).collect();
                if !block.starts_with(b":") {
                    return Some(String::from_utf8(block).unwrap());
                }
                continue;
            }
            let piece = tokio::time::timeout(super::PATIENCE, self.body.next()).await.unwrap()?;
            self.bytes.extend_from_slice(&piece.ok()?);
        }
    }

    /// The place that the head of the answer names.
    pub async fn place(&mut self) -> String {
        let piece = tokio::time::timeout(super::PATIENCE, self.body.next()).await.unwrap().unwrap().unwrap();
        let head = String::from_utf8(piece.to_vec()).unwrap();
        head.strip_prefix(": inlet\nid: ").and_then(|rest| rest.strip_suffix("\n\n")).unwrap().to_owned()
    }

    /// The next envelope and its position.
    pub async fn envelope(&mut self) -> (u64, Value) {
        let block = self.next().await.unwrap();
        let (id, data) = block.split_once('\n').unwrap();
        (
            id.strip_prefix("id: ").unwrap().parse().unwrap(),
            serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap(),
        )
    }
}
