//! An independent reader of the stream: `async-nats` alone, nothing of ours.

use std::collections::{BTreeMap, HashSet};

use async_nats::jetstream;
use async_nats::jetstream::consumer::pull;
use futures_util::StreamExt as _;
use serde_json::Value;

/// A message as it lies in the stream.
#[derive(Debug, Clone)]
pub struct InStream {
    pub subject: String,
    pub msg_id: String,
    pub headers: BTreeMap<String, String>,
    pub body: Value,
}

/// Reads a whole stream.
pub async fn read(url: &str, stream: &str) -> Vec<InStream> {
    let client = async_nats::connect(url).await.unwrap();
    let context = jetstream::new(client);
    let mut stream = context.get_stream(stream).await.unwrap();
    let expected = usize::try_from(stream.info().await.unwrap().state.messages).unwrap();
    let config = pull::OrderedConfig { max_batch: 500, ..Default::default() };
    let mut messages = stream.create_consumer(config).await.unwrap().messages().await.unwrap();
    let mut found = Vec::with_capacity(expected);
    while found.len() < expected {
        let message = messages.next().await.unwrap().unwrap();
        let headers: BTreeMap<_, _> = message
            .headers
            .iter()
            .flat_map(|headers| headers.iter())
            .map(|(name, values)| (name.to_string(), values[0].to_string()))
            .collect();
        found.push(InStream {
            subject: message.subject.to_string(),
            msg_id: headers.get("Nats-Msg-Id").cloned().unwrap_or_default(),
            // Null: somebody else wrote it.
            body: serde_json::from_slice(&message.payload).unwrap_or_default(),
            headers,
        });
    }
    found
}

/// What the simulator sent is in the stream, each message once, each channel in order, and nothing else.
pub fn assert_holds_exactly(found: &[InStream], sent: &[(String, String)]) {
    let ids: HashSet<_> = found.iter().map(|message| &message.msg_id).collect();
    assert_eq!(ids.len(), found.len(), "every Nats-Msg-Id once");
    let mut of_channel: BTreeMap<&str, (Vec<&str>, Vec<&str>)> = BTreeMap::new();
    for message in found {
        let channel = message.body["source"]["channel"].as_str().unwrap();
        of_channel.entry(channel).or_default().0.push(message.body["payload"]["messageId"].as_str().unwrap());
    }
    for (channel, id) in sent {
        of_channel.entry(channel).or_default().1.push(id);
    }
    for (channel, (found, sent)) in of_channel {
        let missing: Vec<_> = sent.iter().filter(|id| !found.contains(id)).take(5).collect();
        assert_eq!(found.len(), sent.len(), "channel {channel}; missing e.g. {missing:?}");
        assert_eq!(found, sent, "the order of channel {channel}");
    }
}
