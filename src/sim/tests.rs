//! The simulator over real sockets.

use std::collections::BTreeSet;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::*;

mod faults;

const LOGIN: &str = "CAP REQ :twitch.tv/tags twitch.tv/commands\r\nNICK justinfan1\r\n";

struct Client {
    socket: BufReader<TcpStream>,
}

impl Client {
    async fn connect(simulator: &Simulator, says: &str) -> Self {
        let mut client =
            Self { socket: BufReader::new(TcpStream::connect(simulator.local_addr()).await.unwrap()) };
        client.say(says).await;
        client
    }

    async fn say(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).await.unwrap();
    }

    /// The next line; `None` when the server has closed.
    async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = tokio::time::timeout(Duration::from_secs(20), self.socket.read_line(&mut line));
        let read = read.await.expect("a line in time").unwrap_or(0);
        (read > 0).then(|| line.trim_end().to_owned())
    }

    /// Reads up to the first line that contains `text`, and returns it.
    async fn until(&mut self, text: &str) -> String {
        loop {
            let line = self.line().await.expect("a connection that stays");
            if line.contains(text) {
                return line;
            }
        }
    }
}

fn config(channels: &[&str], rate: u32, count: u64) -> SimConfig {
    SimConfig {
        channels: channels.iter().map(|&name| name.to_owned()).collect(),
        rate,
        count: Some(count),
        sent_kept: 1_000_000,
        ..SimConfig::new(|| 1_700_000_000_000)
    }
}

async fn start(config: SimConfig) -> Simulator {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    Simulator::start(config, listener).await.unwrap()
}

fn id(line: &str) -> String {
    let tags = line.strip_prefix('@').unwrap().split(' ').next().unwrap();
    tags.split(';').find_map(|tag| tag.strip_prefix("id=")).unwrap().to_owned()
}

#[tokio::test]
async fn a_connection_is_greeted_as_by_twitch() {
    let simulator = start(config(&["a"], 1, 0)).await;
    let mut client = Client::connect(&simulator, LOGIN).await;
    assert_eq!(client.line().await.unwrap(), ":tmi.twitch.tv CAP * ACK :twitch.tv/tags twitch.tv/commands");
    for number in ["001", "002", "003", "004", "375", "372", "376"] {
        assert!(client.line().await.unwrap().starts_with(&format!(":tmi.twitch.tv {number} justinfan1 :")));
    }
    client.say("PING\r\n").await;
    assert_eq!(client.line().await.unwrap(), "PONG");
    client.say("JOIN #A,#quiet\r\nPING :are you there\r\nWHAT now\r\n").await;
    for channel in ["a", "quiet"] {
        let room = people::room_id(channel);
        for wanted in [
            format!(":justinfan1!justinfan1@justinfan1.tmi.twitch.tv JOIN #{channel}"),
            format!(":justinfan1.tmi.twitch.tv 353 justinfan1 = #{channel} :justinfan1"),
            format!(":justinfan1.tmi.twitch.tv 366 justinfan1 #{channel} :End of /NAMES list"),
            format!(
                "@emote-only=0;followers-only=-1;r9k=0;room-id={room};slow=0;subs-only=0 \
                 :tmi.twitch.tv ROOMSTATE #{channel}"
            ),
        ] {
            assert_eq!(client.line().await.unwrap(), wanted);
        }
    }
    assert_eq!(client.line().await.unwrap(), ":tmi.twitch.tv PONG tmi.twitch.tv :are you there");
    assert_eq!(client.line().await.unwrap(), ":tmi.twitch.tv 421 justinfan1 WHAT :Unknown command");
    assert_eq!(simulator.stats().joined, 2);
    client.say("PART #quiet\r\n").await;
    assert_eq!(client.line().await.unwrap(), ":justinfan1!justinfan1@justinfan1.tmi.twitch.tv PART #quiet");
    simulator.shutdown().await;
    assert_eq!(client.line().await, None);
}

#[tokio::test]
async fn everybody_in_a_channel_gets_the_same_and_the_log_says_so() {
    let simulator = start(config(&["a", "b"], 0, 20_000)).await;
    simulator.control(Command::Pause).await;
    let mut clients = Vec::new();
    for caps in ["tags", "tags", "commands"] {
        let says = format!("CAP REQ :twitch.tv/{caps}\r\nNICK justinfan7\r\nJOIN #a\r\n");
        let mut client = Client::connect(&simulator, &says).await;
        client.until(" 366 ").await;
        clients.push(client);
    }
    clients[2].until("ROOMSTATE").await;
    simulator.control(Command::Resume).await;
    let mut heard = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..10_000 {
        for (client, heard) in clients.iter_mut().zip(&mut heard) {
            heard.push(client.line().await.unwrap());
        }
    }
    assert_eq!(heard[0], heard[1]);
    assert!(heard[2].iter().all(|line| line.starts_with(':')), "tags for one who did not ask");
    assert!(heard[0].iter().zip(&heard[2]).all(|(tagged, bare)| tagged.ends_with(bare.as_str())));
    let sent = simulator.sent().await;
    assert_eq!(sent.len(), 3 * 10_000 + 10_000);
    let to = |connection: Option<u64>| {
        let mine = sent.iter().filter(move |record| record.connection == connection);
        mine.map(|record| record.id.clone().unwrap()).collect::<Vec<_>>()
    };
    let ids: Vec<_> = heard[0].iter().map(|line| id(line)).collect();
    assert_eq!(to(Some(1)), ids);
    assert_eq!(to(Some(3)), ids);
    assert!(sent.iter().filter(|record| record.connection.is_none()).all(|record| record.channel == "b"));
    assert_eq!(ids.iter().chain(&to(None)).collect::<BTreeSet<_>>().len(), 20_000);
    assert_eq!(simulator.stats().generated, 20_000);
    clients[0].say("PING :still here\r\n").await;
    clients[0].until("PONG").await;
    simulator.shutdown().await;
}

#[tokio::test]
async fn faults_come_when_called() {
    let mut faulty = config(&["a"], 1, 0);
    faulty.ignore_joins = vec!["#Lost".to_owned()];
    let simulator = start(faulty).await;
    let mut one = Client::connect(&simulator, LOGIN).await;
    one.say("JOIN #lost,#a\r\n").await;
    assert!(one.until("JOIN").await.ends_with("JOIN #a"));
    one.until("ROOMSTATE").await;
    let mut two = Client::connect(&simulator, LOGIN).await;
    two.until(" 376 ").await;
    simulator.control(Command::Raw(b"half a li".to_vec())).await;
    simulator.control(Command::Raw(b"ne\r\n".to_vec())).await;
    assert_eq!(one.line().await.unwrap(), "half a line");
    simulator.control(Command::Reconnect(Target::All, None)).await;
    one.until(":tmi.twitch.tv RECONNECT").await;
    simulator.control(Command::Drop(Target::One(1))).await;
    assert_eq!(one.line().await, None);
    two.until("RECONNECT").await;
    simulator.control(Command::Drop(Target::All)).await;
    assert_eq!(two.line().await, None);
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_bad_login_is_refused_and_a_good_one_has_its_state() {
    let simulator =
        start(SimConfig { refuse_login: Some(LoginRefusal::Failed), ..config(&["a"], 1, 0) }).await;
    let mut client = Client::connect(&simulator, "PASS oauth:x\r\nNICK me\r\nJOIN #a\r\n").await;
    assert_eq!(client.line().await.unwrap(), ":tmi.twitch.tv NOTICE * :Login authentication failed");
    assert_eq!(client.line().await, None);
    simulator.shutdown().await;

    let simulator = start(config(&["a"], 1, 0)).await;
    let mut client = Client::connect(&simulator, "PASS x\r\nNICK me\r\n").await;
    assert_eq!(client.line().await.unwrap(), ":tmi.twitch.tv NOTICE * :Improperly formatted auth");
    let mut client =
        Client::connect(&simulator, "CAP REQ :twitch.tv/commands\r\nPASS oauth:x\r\nNICK me\r\n").await;
    assert_eq!(client.until("GLOBALUSERSTATE").await, ":tmi.twitch.tv GLOBALUSERSTATE");
    client.say(&"x".repeat(10_000)).await;
    assert_eq!(client.line().await, None);
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_client_that_is_silent_is_pinged_then_closed() {
    let quick = SimConfig { ping_every: Duration::from_millis(20), ..config(&["a"], 1, 0) };
    let simulator = start(quick).await;
    let mut client = Client::connect(&simulator, "").await;
    for _ in 0..3 {
        assert_eq!(client.line().await.unwrap(), "PING :tmi.twitch.tv");
    }
    assert_eq!(client.line().await, None);
    simulator.shutdown().await;
}

#[tokio::test]
async fn the_certificate_is_good_for_localhost() {
    let simulator = start(SimConfig { tls: true, ..config(&["a"], 1, 0) }).await;
    let mut roots = rustls::RootCertStore::empty();
    let pem = simulator.ca_pem().unwrap().as_bytes();
    let ca =
        <rustls::pki_types::CertificateDer<'_> as rustls::pki_types::pem::PemObject>::from_pem_slice(pem);
    roots.add(ca.unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client =
        rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let client = client.with_root_certificates(roots).with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    for name in ["localhost", "127.0.0.1"] {
        let socket = TcpStream::connect(simulator.local_addr()).await.unwrap();
        let mut stream = connector.connect(name.try_into().unwrap(), socket).await.unwrap();
        stream.write_all(b"PING :x\r\n").await.unwrap();
        let mut answer = [0; 38];
        stream.read_exact(&mut answer).await.unwrap();
        assert!(answer.starts_with(b":tmi.twitch.tv PONG tmi.twitch.tv :x\r\n"));
    }
    simulator.shutdown().await;
}

#[tokio::test]
async fn what_cannot_be_simulated_is_refused() {
    for (wrong, channels) in [("no channel", vec![]), ("bad name", vec!["a b".to_owned()])] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = SimConfig { channels, ..config(&[], 1, 0) };
        assert!(Simulator::start(config, listener).await.is_err(), "{wrong}");
    }
}

/// A client that has joined `a`.
async fn in_a(simulator: &Simulator) -> Client {
    let mut client = Client::connect(simulator, LOGIN).await;
    client.say("JOIN #a\r\n").await;
    client.until("ROOMSTATE").await;
    client
}

/// Waits for a condition instead of sleeping.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "still waiting: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_was_not_asked_for_is_not_sent() {
    let simulator = start(config(&["me"], 1, 0)).await;
    let says = "CAP LS 302\r\nCAP REQ :twitch.tv/what\r\nCAP REQ :twitch.tv/membership\r\nCAP LIST\r\nCAP END\r\n\
                PASS oauth:x\r\nNICK Me\r\n";
    let mut bare = Client::connect(&simulator, says).await;
    for wanted in [
        "CAP * LS :twitch.tv/tags twitch.tv/commands twitch.tv/membership",
        "CAP * NAK :twitch.tv/what",
        "CAP * ACK :twitch.tv/membership",
        "CAP * LIST :twitch.tv/membership",
    ] {
        assert_eq!(bare.line().await.unwrap(), format!(":tmi.twitch.tv {wanted}"));
    }
    bare.until(" 376 ").await;
    bare.say("JOIN #me\r\nPING 1\r\n").await;
    let mut answers = Vec::new();
    while !answers.last().is_some_and(|line: &String| line.contains("PONG")) {
        answers.push(bare.line().await.unwrap());
    }
    assert_eq!(answers.len(), 4, "JOIN, 353, 366 and the PONG: {answers:?}");

    let says = "CAP REQ :twitch.tv/tags twitch.tv/commands\r\nPASS oauth:y\r\nNICK you\r\nJOIN #me\r\n";
    let mut full = Client::connect(&simulator, says).await;
    assert!(full.until("GLOBALUSERSTATE").await.contains(";user-id="));
    assert!(full.until("USERSTATE #me").await.starts_with("@badge-info=;badges=;"));
    full.until("ROOMSTATE").await;
    assert_eq!(bare.line().await.unwrap(), ":you!you@you.tmi.twitch.tv JOIN #me");
    full.say("PART #me\r\n").await;
    assert_eq!(bare.line().await.unwrap(), ":you!you@you.tmi.twitch.tv PART #me");
    simulator.control(Command::Raw(b"end\r\n".to_vec())).await;
    assert!(full.until("PART").await.starts_with(":you!"));
    assert_eq!(full.line().await.unwrap(), "end", "nobody told this one who came");
    simulator.shutdown().await;
}

#[tokio::test]
async fn what_a_client_says_reaches_the_others() {
    let simulator = start(config(&["a"], 1, 0)).await;
    let mut reader = in_a(&simulator).await;
    let says = "CAP REQ :twitch.tv/tags twitch.tv/commands\r\nPASS oauth:y\r\nNICK you\r\nJOIN #a\r\n";
    let mut speaker = Client::connect(&simulator, says).await;
    speaker.until("ROOMSTATE").await;
    speaker.say("@client-nonce=1 PRIVMSG #a :hello  PRIVMSG #b :x\r\nPRIVMSG #a :/ban me\r\n").await;
    assert!(speaker.line().await.unwrap().ends_with(" :tmi.twitch.tv USERSTATE #a"), "and not the message");
    assert_eq!(
        speaker.line().await.unwrap(),
        "@msg-id=unrecognized_cmd :tmi.twitch.tv NOTICE #a :Unrecognized command: /ban"
    );
    let heard = reader.line().await.unwrap();
    assert!(heard.ends_with(" :you!you@you.tmi.twitch.tv PRIVMSG #a :hello  PRIVMSG #b :x"), "{heard}");
    for nth in 0..25 {
        speaker.say(&format!("PRIVMSG #a :{nth}\r\n")).await;
    }
    speaker.until("@msg-id=msg_ratelimit ").await;
    reader.say("PRIVMSG #a :justinfans are not heard\r\nPING :done\r\n").await;
    let mut last = String::new();
    for nth in 0..19 {
        last = reader.line().await.unwrap();
        assert!(last.ends_with(&format!(" PRIVMSG #a :{nth}")), "{last}");
    }
    reader.until("PONG").await;
    let sent = simulator.sent().await;
    assert_eq!(sent.len(), 20);
    assert!(sent.iter().all(|record| record.connection == Some(1) && record.kind == LineKind::Message));
    assert_eq!(sent.last().unwrap().id, Some(id(&last)));
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_browser_may_speak_websocket() {
    let simulator = start(config(&["a"], 0, 3_000)).await;
    let mut socket = TcpStream::connect(simulator.local_addr()).await.unwrap();
    let request = "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut socket = BufReader::new(socket);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        socket.read_line(&mut line).await.unwrap();
    }
    // Each line in a frame of its own, without its end, masked with zeros; then a PING.
    for line in ["CAP REQ :twitch.tv/tags", "NICK justinfan1", "JOIN #a"] {
        let header = [0x81, 0x80 | u8::try_from(line.len()).unwrap(), 0, 0, 0, 0];
        socket.write_all(&[&header, line.as_bytes()].concat()).await.unwrap();
    }
    socket.write_all(b"\x89\x82\0\0\0\0hi").await.unwrap();
    let (mut text, mut pongs) = (Vec::new(), 0);
    while text
        .split(|&byte| byte == b'\n')
        .filter(|line| line.windows(7).any(|part| part == b"PRIVMSG"))
        .count()
        < 3_000
    {
        let opcode = socket.read_u8().await.unwrap();
        let length = match socket.read_u8().await.unwrap() {
            126 => u64::from(socket.read_u16().await.unwrap()),
            127 => socket.read_u64().await.unwrap(),
            length => u64::from(length),
        };
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        socket.read_exact(&mut payload).await.unwrap();
        match opcode {
            0x81 => text.extend_from_slice(&payload),
            0x8a => {
                assert_eq!(payload, b"hi");
                pongs += 1;
            }
            other => panic!("frame {other:x}"),
        }
    }
    assert_eq!(pongs, 1);
    assert!(text.starts_with(b":tmi.twitch.tv CAP * ACK :twitch.tv/tags\r\n:tmi.twitch.tv 001 justinfan1 "));
    socket.write_all(b"\x88\x80\0\0\0\0").await.unwrap();
    let mut end = Vec::new();
    socket.read_to_end(&mut end).await.unwrap();
    assert_eq!(end, b"\x88\0");
    simulator.shutdown().await;

    let simulator = start(config(&["a"], 1, 0)).await;
    let mut client = Client::connect(&simulator, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(client.line().await.unwrap(), "HTTP/1.1 426 Upgrade Required");
    simulator.shutdown().await;
}
