//! The faults, each over a real socket.

use std::io::ErrorKind;

use super::*;

#[tokio::test]
async fn joins_are_refused_ignored_and_limited_as_told() {
    let mut strict = config(&["a"], 1, 0);
    strict.join_limit = 5;
    strict.refuse_joins = vec![("#Bad".to_owned(), JoinRefusal::Banned)];
    let simulator = start(strict).await;
    simulator.control(Command::RefuseJoins(JoinRefusal::Suspended, vec!["gone".to_owned()])).await;
    simulator.control(Command::IgnoreJoins(vec!["lost".to_owned()])).await;
    let mut client = Client::connect(&simulator, LOGIN).await;
    client.until(" 376 ").await;
    client.say("JOIN #bad,#gone,#lost,#a\r\n").await;
    let banned = client.line().await.unwrap();
    assert_eq!(
        banned,
        "@msg-id=msg_banned :tmi.twitch.tv NOTICE #bad :You are permanently banned from talking in bad."
    );
    assert!(
        client
            .line()
            .await
            .unwrap()
            .starts_with("@msg-id=msg_channel_suspended :tmi.twitch.tv NOTICE #gone :")
    );
    assert!(client.line().await.unwrap().ends_with("JOIN #a"));
    simulator.control(Command::AllowJoins(vec!["bad".to_owned()])).await;
    client.say("JOIN #bad\r\nJOIN #six\r\nPING :1\r\n").await;
    client.until("JOIN #bad").await;
    client.until("ROOMSTATE #bad").await;
    assert!(client.line().await.unwrap().contains("PONG"), "the sixth vanishes");
    // Those without an account share one limit; one with an account has its own.
    let mut other = Client::connect(&simulator, "PASS oauth:x\r\nNICK me\r\nJOIN #a\r\n").await;
    other.until(" 366 ").await;
    let mut third = Client::connect(&simulator, "NICK justinfan9\r\nJOIN #a\r\nPING :2\r\n").await;
    assert!(third.until("justinfan9 :>").await.contains(" 376 "));
    assert!(third.line().await.unwrap().contains("PONG"));
    simulator.control(Command::JoinLimit(0)).await;
    third.say("JOIN #a\r\n").await;
    third.until(" 366 ").await;
    let stats = simulator.stats();
    assert_eq!(stats.joins, JoinStats { received: 9, vanished: 2, most_in_10s: 9 });
    assert_eq!(stats.accounts["anonymous"], JoinStats { received: 8, vanished: 2, most_in_10s: 8 });
    let peers: Vec<_> = stats.peers.iter().map(|peer| (peer.connection, peer.joins, peer.channels)).collect();
    assert_eq!(peers, [(1, 6, 2), (2, 1, 1), (3, 2, 1)]);
    assert_eq!(stats.peers[1].login.as_deref(), Some("me"));
    simulator.shutdown().await;
}

#[tokio::test]
async fn logins_are_refused_in_every_form_and_taken_again() {
    let simulator = start(config(&["a"], 1, 0)).await;
    for why in [LoginRefusal::Failed, LoginRefusal::Format, LoginRefusal::Nick, LoginRefusal::Unsuccessful] {
        simulator.control(Command::RefuseLogin(Some(why))).await;
        let mut client = Client::connect(&simulator, LOGIN).await;
        assert!(client.until("NOTICE").await.ends_with(why.text()));
        assert_eq!(client.line().await, None);
    }
    simulator.control(Command::RefuseLogin(None)).await;
    in_a(&simulator).await;
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_silent_connection_gets_nothing_and_the_log_says_so() {
    let simulator = start(SimConfig { ping_every: Duration::from_millis(5), ..config(&["a"], 0, 100) }).await;
    simulator.control(Command::Pause).await;
    let mut client = in_a(&simulator).await;
    let mut other = Client::connect(&simulator, "").await;
    other.until("PING").await;
    simulator.control(Command::Silence(Target::One(1))).await;
    assert_eq!(simulator.stats().peers[0].mode, Mode::Silent);
    client.say("PING :anybody\r\nJOIN #b\r\n").await;
    simulator.control(Command::Raw(b"hush\r\n".to_vec())).await;
    other.until("hush").await;
    simulator.control(Command::Resume).await;
    simulator.control(Command::BadLinesOnce).await;
    assert!(simulator.sent().await.iter().all(|record| record.connection.is_none()));
    assert_eq!(simulator.stats().generated, 0, "flat out, chat waits for somebody who reads");
    simulator.control(Command::Speak(Target::All)).await;
    // Nothing of what was said in between came, only what was made since.
    let first = loop {
        let line = client.line().await.unwrap();
        if !line.starts_with("PING") {
            break line;
        }
    };
    assert!(first.contains("PRIVMSG #a"), "{first}");
    for _ in 1..100 {
        client.until("PRIVMSG #a").await;
    }
    assert_eq!(simulator.stats().peers[0].channels, 1, "what it said in the silence was not done");
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_half_open_connection_neither_reads_nor_writes() {
    let simulator = start(config(&["a"], 1, 0)).await;
    let mut client = in_a(&simulator).await;
    simulator.control(Command::HalfOpen(Target::One(1))).await;
    simulator.control(Command::Raw(b"lost\r\n".to_vec())).await;
    simulator.control(Command::Speak(Target::All)).await;
    assert_eq!(simulator.stats().peers[0].mode, Mode::HalfOpen, "for good");
    // Nobody reads: it takes what the kernel holds, and no more.
    let chunk = vec![b'x'; 1 << 20];
    let mut pushed = 0;
    while tokio::time::timeout(Duration::from_millis(300), client.socket.write_all(&chunk)).await.is_ok() {
        pushed += 1;
        assert!(pushed < 100, "somebody reads");
    }
    let mut byte = [0];
    let read = tokio::time::timeout(Duration::from_millis(100), client.socket.read(&mut byte)).await;
    assert!(read.is_err(), "open, and silent");
    assert_eq!(simulator.stats().connections, 1);
    simulator.control(Command::Drop(Target::One(1))).await;
    let end = client.socket.read(&mut byte).await;
    assert!(matches!(end, Ok(0)) || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset));
    simulator.shutdown().await;
}

#[tokio::test]
async fn one_connection_is_told_to_reconnect_and_has_its_grace() {
    let simulator = start(config(&["a"], 1, 0)).await;
    let (mut one, mut two) = (in_a(&simulator).await, in_a(&simulator).await);
    simulator.control(Command::Reconnect(Target::One(1), Some(Duration::from_millis(300)))).await;
    assert_eq!(one.line().await.unwrap(), ":tmi.twitch.tv RECONNECT");
    one.say("PING :still\r\n").await;
    assert!(one.line().await.unwrap().contains("PONG"));
    assert_eq!(one.line().await, None);
    two.say("PING :mine stays\r\n").await;
    assert!(two.line().await.unwrap().contains("PONG"));
    simulator.shutdown().await;
}

#[tokio::test]
async fn bad_lines_and_copies_come_as_asked_and_are_recorded() {
    let faulty = SimConfig { bad_permille: 100, duplicate_every: 10, ..config(&["a"], 0, 2_000) };
    let simulator = start(faulty).await;
    let client = in_a(&simulator).await;
    let mut socket = client.socket;
    let (mut heard, mut line) = (Vec::new(), Vec::new());
    while heard.len() < 2_420 {
        line.clear();
        assert!(socket.read_until(b'\n', &mut line).await.unwrap() > 0);
        heard.push(line.clone());
    }
    let sent = simulator.sent().await;
    assert_eq!(sent.len(), heard.len());
    for (record, line) in sent.iter().zip(&heard) {
        match (&record.id, &record.line) {
            (Some(id), None) => {
                let id = format!("id={id};");
                assert!(line.windows(id.len()).any(|part| part == id.as_bytes()));
            }
            (None, Some(raw)) => assert_eq!([raw, &b"\r\n"[..]].concat(), *line),
            other => panic!("neither or both: {other:?}"),
        }
    }
    let of = |kind: LineKind| sent.iter().filter(|record| record.kind == kind && !record.copy).count();
    let kinds = [LineKind::Moderation, LineKind::Other, LineKind::Empty].map(of);
    assert!(kinds.iter().all(|&count| (11..=13).contains(&count)), "{kinds:?}");
    assert!(of(LineKind::Bad) > 50 && of(LineKind::Message) > 2_080);
    let copies: Vec<_> = (1..sent.len()).filter(|&nth| sent[nth].copy).collect();
    assert_eq!(copies.len(), 220);
    assert!(copies.iter().all(|&nth| heard[nth] == heard[nth - 1]));
    simulator.shutdown().await;
}

#[tokio::test]
async fn a_slowed_connection_gets_so_many_bytes_a_second() {
    let simulator = start(SimConfig { slow: 20_000, ..config(&["a"], 0, 100) }).await;
    let began = tokio::time::Instant::now();
    let mut client = in_a(&simulator).await;
    let mut bytes = 0;
    for _ in 0..50 {
        bytes += client.until("PRIVMSG").await.len();
    }
    let least = Duration::from_secs_f64(bytes as f64 / 20_000.0 * 0.8);
    assert!(began.elapsed() > least, "{bytes} bytes in {:?}", began.elapsed());
    simulator.control(Command::Slow(Target::All, 0)).await;
    for _ in 0..50 {
        client.until("PRIVMSG").await;
    }
    simulator.shutdown().await;
}

#[tokio::test]
async fn one_that_does_not_read_is_cut_and_the_others_go_on() {
    let lazy = SimConfig { cut_after: Some(Duration::from_secs(3)), ..config(&["a"], 0, 40_000) };
    let simulator = start(lazy).await;
    simulator.control(Command::Pause).await;
    let idle = in_a(&simulator).await;
    let mut reader = in_a(&simulator).await;
    simulator.control(Command::Resume).await;
    for _ in 0..40_000 {
        reader.until("PRIVMSG").await;
    }
    eventually("the idle one is gone", || simulator.stats().connections == 1).await;
    let sent = simulator.sent().await;
    let to = |id: u64| sent.iter().filter(|record| record.connection == Some(id)).count();
    assert_eq!(to(2), 40_000);
    assert!(to(1) > 0 && to(1) < 40_000);
    drop(idle);
    simulator.shutdown().await;
}

#[tokio::test]
async fn connections_are_reset_for_a_while() {
    let simulator = start(config(&["a"], 1, 0)).await;
    simulator.control(Command::RefuseConnections(Duration::from_mins(10))).await;
    // The reset may come before the connect is done, or after.
    if let Ok(mut socket) = TcpStream::connect(simulator.local_addr()).await {
        assert_eq!(socket.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    simulator.control(Command::RefuseConnections(Duration::ZERO)).await;
    in_a(&simulator).await;
    simulator.shutdown().await;
}
