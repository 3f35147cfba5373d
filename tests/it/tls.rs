//! TLS and every way to say who one is, against real servers: one stack, one provider.

use std::path::Path;

use data_encoding::BASE64URL_NOPAD;
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, SanType};
use serde_json::{Value, json};

use crate::harness::inlet::{Inlet, Simulator};
use crate::harness::nats::Nats;

#[tokio::test]
async fn chat_over_tls_with_a_certificate_of_our_own() {
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    let flags =
        ["--channels", "alpha", "--rate", "200", "--count", "200", "--tls", "--tls-ca", ca.to_str().unwrap()];
    let simulator = Simulator::start(&flags).await;
    let url = format!("ircs://localhost:{}", simulator.port);
    let ca = ca.to_str().unwrap().to_owned();
    let inlet =
        Inlet::serve(&[("TWITCH_CHANNELS", "alpha"), ("TWITCH_IRC_URL", &url), ("TLS_CA_FILE", &ca)]).await;
    inlet.ready().await;
    let sent = simulator.has_finished(200).await;
    inlet.settled(sent.len() as u64).await.assert_account_closes();

    // Without that certificate the connection is refused, and said.
    let stranger = Inlet::serve(&[("TWITCH_CHANNELS", "alpha"), ("TWITCH_IRC_URL", &url)]).await;
    crate::harness::eventually("refused", || async {
        let (_, page) = stranger.json("/_debug/twitch").await;
        (page["lastError"]["code"] == "connect_failed").then_some(())
    })
    .await;
}

struct Certificates {
    ca: String,
    folder: tempfile::TempDir,
}

/// A CA, a server's certificate for this machine, and a client's.
fn certificates() -> Certificates {
    let folder = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Test CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("ca.pem", &issuer.pem());
    for name in ["server", "client"] {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::IpAddress("127.0.0.1".parse().unwrap()));
        write(&format!("{name}.pem"), &params.signed_by(&key, &issuer).unwrap().pem());
        write(&format!("{name}.key"), &key.serialize_pem());
    }
    Certificates { ca: folder.path().join("ca.pem").to_str().unwrap().to_owned(), folder }
}

impl Certificates {
    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn server_config(&self, more: &str) -> String {
        format!(
            "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {:?}, {more} }}",
            self.path("server.pem"),
            self.path("server.key"),
            self.ca
        )
    }
}

/// Publishes a little chat with these settings; it must all arrive.
async fn publishes(settings: &[(&str, &str)]) {
    let simulator = Simulator::start(&["--channels", "alpha", "--rate", "500", "--count", "100"]).await;
    let irc = simulator.url();
    let mut all = vec![("TWITCH_CHANNELS", "alpha"), ("TWITCH_IRC_URL", irc.as_str())];
    all.extend(settings);
    let inlet = Inlet::serve(&all).await;
    inlet.ready().await;
    let sent = simulator.has_finished(100).await;
    let metrics = inlet.settled(sent.len() as u64).await;
    assert_eq!(metrics.sum("inlet_events_published_total"), 100);
    // What opens the door is shown nowhere.
    let shown = format!("{}{}", inlet.log(), inlet.json("/_debug/config").await.1);
    for secret in ["s3cret", "p@ss", "SUA"] {
        assert!(!shown.contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn nats_over_tls_with_a_private_ca_and_a_client_certificate() {
    let certificates = certificates();
    let nats = Nats::with_config(&certificates.server_config("verify: true")).await;
    let url = format!("tls://localhost:{}", nats.port);
    let (certificate, key) = (certificates.path("client.pem"), certificates.path("client.key"));
    publishes(&[
        ("NATS_URL", &url),
        ("TLS_CA_FILE", &certificates.ca),
        ("NATS_TLS_CERT_FILE", &certificate),
        ("NATS_TLS_KEY_FILE", &key),
    ])
    .await;
}

#[tokio::test]
async fn nats_by_user_and_password_and_by_token() {
    let nats = Nats::with_config("authorization { user: inlet, password: \"p@ss/1\" }").await;
    let url = format!("nats://inlet:p%40ss%2F1@127.0.0.1:{}", nats.port);
    publishes(&[("NATS_URL", &url)]).await;
    let nats = Nats::with_config("authorization { token: \"s3cret\" }").await;
    let url = format!("nats://s3cret@127.0.0.1:{}", nats.port);
    publishes(&[("NATS_URL", &url)]).await;
}

#[tokio::test]
async fn nats_by_nkey() {
    let user = KeyPair::new_user();
    let nats =
        Nats::with_config(&format!("authorization {{ users: [{{ nkey: {} }}] }}", user.public_key())).await;
    let folder = tempfile::tempdir().unwrap();
    let seed = write(folder.path(), "user.nk", &user.seed().unwrap());
    publishes(&[("NATS_URL", &nats.url()), ("NATS_NKEY_FILE", &seed)]).await;
}

/// A JWT as NATS reads it.
fn jwt(signer: &KeyPair, subject: &KeyPair, nats: &Value) -> String {
    let part = |value: &Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let header = part(&json!({ "typ": "JWT", "alg": "ed25519-nkey" }));
    let claims = part(&json!({
        "jti": "TEST", "iat": 1_700_000_000, "iss": signer.public_key(), "name": "test", "sub": subject.public_key(), "nats": nats,
    }));
    let signed = format!("{header}.{claims}");
    let signature = BASE64URL_NOPAD.encode(&signer.sign(signed.as_bytes()).unwrap());
    format!("{signed}.{signature}")
}

#[tokio::test]
async fn nats_by_credentials() {
    let (operator, account, user) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_user());
    let operator_jwt = jwt(&operator, &operator, &json!({ "type": "operator", "version": 2 }));
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
        "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let account_jwt = jwt(&operator, &account, &json!({ "type": "account", "version": 2, "limits": limits }));
    let user_jwt = jwt(
        &account,
        &user,
        &json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {} }),
    );
    // JetStream wants a system account beside it.
    let system = KeyPair::new_account();
    let system_jwt = jwt(
        &operator,
        &system,
        &json!({ "type": "account", "version": 2, "limits": {
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
    } }),
    );
    let config = format!(
        "operator: {operator_jwt}\nsystem_account: {1}\nresolver: MEMORY\n\
         resolver_preload {{ {0}: {account_jwt}, {1}: {system_jwt} }}",
        account.public_key(),
        system.public_key(),
    );
    let nats = Nats::with_config(&config).await;
    let credentials = format!(
        "-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        user.seed().unwrap()
    );
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "user.creds", &credentials);
    publishes(&[("NATS_URL", &nats.url()), ("NATS_CREDS_FILE", &file)]).await;
}

#[tokio::test]
async fn a_wrong_password_is_said_and_the_service_waits() {
    let nats = Nats::with_config("authorization { user: inlet, password: right }").await;
    let url = format!("nats://inlet:wrong-pw@127.0.0.1:{}", nats.port);
    let inlet = Inlet::serve(&[("NATS_URL", &url)]).await;
    crate::harness::eventually("the bus is away", || async {
        let (_, health) = inlet.json("/healthz").await;
        let why = health["parts"]["bus"]["why"].as_str()?.to_owned();
        why.to_lowercase().contains("authorization").then_some(())
    })
    .await;
    assert!(inlet.waiting_for().await.iter().any(|part| part == "bus"));
    assert!(!inlet.log().contains("wrong-pw"));
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}
