//! A chat server of these tests' own: it notes when each login and JOIN arrives and on which connection, says what it
//! is told to, and remembers all of it for a history service. It answers every JOIN.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use inlet::clock::system_milliseconds;
use inlet::tasks::Tasks;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Lines on their way to one connection.
const LINES: usize = 16 * 1024;

/// A message.
#[derive(Debug, Clone)]
pub struct Said {
    pub channel: String,
    pub id: String,
    pub at: i64,
    pub line: String,
}

#[derive(Default)]
struct State {
    last_id: u64,
    /// Connections that stand: their lines and their channels.
    standing: BTreeMap<u64, (mpsc::Sender<String>, BTreeSet<String>)>,
    joins: Vec<(Instant, u64, String)>,
    logins: Vec<Instant>,
    said: Vec<Said>,
    is_away: bool,
    /// Closes each connection right after its login.
    is_hasty: bool,
}

/// The server. Dropping it closes everything.
pub struct Irc {
    addr: SocketAddr,
    state: Arc<Mutex<State>>,
    _tasks: Tasks,
}

impl Irc {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let mut tasks = Tasks::new();
        tasks.spawn("irc", accept(listener, Arc::clone(&state)));
        Self { addr, state, _tasks: tasks }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn url(&self) -> String {
        format!("irc://{}", self.addr)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Every JOIN: when, on which connection, for what.
    pub fn joins(&self) -> Vec<(Instant, u64, String)> {
        self.state().joins.clone()
    }

    pub fn logins(&self) -> Vec<Instant> {
        self.state().logins.clone()
    }

    /// The channels of each connection that stands.
    pub fn standing(&self) -> BTreeMap<u64, BTreeSet<String>> {
        self.state().standing.iter().map(|(id, (_, channels))| (*id, channels.clone())).collect()
    }

    /// How many channels somebody is in.
    pub fn joined(&self) -> usize {
        self.standing().into_values().flatten().collect::<BTreeSet<_>>().len()
    }

    /// Says something in a channel, as now, to all that are in it.
    pub fn say(&self, channel: &str) -> String {
        let mut state = self.state();
        let at = system_milliseconds();
        let id = format!("{channel}-{}", state.said.len());
        let line = format!(
            "@badges=;display-name=Somebody;id={id};room-id=7;tmi-sent-ts={at};user-id=4711 \
             :somebody!somebody@somebody.tmi.twitch.tv PRIVMSG #{channel} :hello {id}"
        );
        for (lines, channels) in state.standing.values() {
            if channels.contains(channel) {
                lines.try_send(format!("{line}\r\n")).unwrap();
            }
        }
        state.said.push(Said { channel: channel.to_owned(), id: id.clone(), at, line });
        id
    }

    /// A line, as it is, to all connections.
    pub fn tell(&self, line: &str) {
        for (lines, _) in self.state().standing.values() {
            lines.try_send(format!("{line}\r\n")).unwrap();
        }
    }

    /// All that was said.
    pub fn said(&self) -> Vec<Said> {
        self.state().said.clone()
    }

    /// Asks every connection to reconnect; returns which.
    pub fn ask_to_reconnect(&self) -> Vec<u64> {
        let state = self.state();
        for (lines, _) in state.standing.values() {
            lines.try_send(":tmi.twitch.tv RECONNECT\r\n".to_owned()).unwrap();
        }
        state.standing.keys().copied().collect()
    }

    /// Closes connections.
    pub fn cut(&self, which: impl Fn(u64) -> bool) {
        self.state().standing.retain(|id, _| !which(*id));
    }

    /// From now on closes each connection right after its login.
    pub fn set_hasty(&self) {
        self.state().is_hasty = true;
    }

    /// Closes all connections, and new ones at once, until it is back.
    pub fn set_away(&self, is_away: bool) {
        let mut state = self.state();
        state.is_away = is_away;
        if is_away {
            state.standing.clear();
        }
    }
}

async fn accept(listener: TcpListener, state: Arc<Mutex<State>>) {
    let mut connections = Tasks::new();
    while let Ok((socket, _)) = listener.accept().await {
        connections.forget_finished();
        let (lines, queue) = mpsc::channel(LINES);
        let id = {
            let mut state = state.lock().unwrap();
            if state.is_away {
                continue;
            }
            state.last_id += 1;
            let id = state.last_id;
            state.standing.insert(id, (lines, BTreeSet::new()));
            id
        };
        let state = Arc::clone(&state);
        connections.spawn("irc connection", async move {
            talk(socket, id, queue, &state).await;
            state.lock().unwrap().standing.remove(&id);
        });
    }
}

async fn talk(socket: TcpStream, id: u64, mut queue: mpsc::Receiver<String>, state: &Mutex<State>) {
    socket.set_nodelay(true).unwrap();
    let (from, mut to) = socket.into_split();
    let mut lines = BufReader::new(from).lines();
    let mut nick = String::new();
    loop {
        tokio::select! {
            line = lines.next_line() => {
                let Ok(Some(line)) = line else { return };
                answer(&line, id, &mut nick, state);
            }
            line = queue.recv() => {
                // Without a sender it was cut.
                let Some(line) = line else { return };
                if to.write_all(line.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn answer(line: &str, id: u64, nick: &mut String, state: &Mutex<State>) {
    let mut state = state.lock().unwrap();
    let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
    let answer = match command {
        "NICK" => {
            rest.clone_into(nick);
            state.logins.push(Instant::now());
            format!(":tmi.twitch.tv 001 {nick} :Welcome, GLHF!\r\n")
        }
        "JOIN" => {
            let channel = rest.trim_start_matches('#').to_owned();
            state.joins.push((Instant::now(), id, channel.clone()));
            if let Some((_, channels)) = state.standing.get_mut(&id) {
                channels.insert(channel.clone());
            }
            format!(":{nick}!{nick}@{nick}.tmi.twitch.tv JOIN #{channel}\r\n")
        }
        "PING" => format!(":tmi.twitch.tv PONG tmi.twitch.tv :{}\r\n", rest.trim_start_matches(':')),
        _ => return,
    };
    if let Some((lines, _)) = state.standing.get(&id) {
        lines.try_send(answer).unwrap();
    }
    if state.is_hasty && command == "NICK" {
        state.standing.remove(&id);
    }
}
