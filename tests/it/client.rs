//! Commands that go through a running service: what they make of each answer, also of those of somebody else.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::Output;

use crate::harness::free_port;
use crate::harness::inlet::{Inlet, run};

const LINES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/chat.irc");

/// Somebody who answers every request so, and what they were asked; `None`: nothing at all.
fn somebody(answer: Option<&'static str>) -> (String, std::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (asked, inbox) = std::sync::mpsc::sync_channel(100);
    // Ends with the test's process.
    std::thread::spawn(move || {
        let mut silent = Vec::new();
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            let Some(answer) = answer else {
                silent.push(socket);
                continue;
            };
            let mut buffer = [0; 4096];
            let read = socket.read(&mut buffer).unwrap_or(0);
            drop(asked.try_send(String::from_utf8_lossy(&buffer[..read]).into_owned()));
            drop(socket.write_all(answer.as_bytes()));
        }
    });
    (url, inbox)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `tail`, and `replay` beside a service that holds the folder.
fn both(inlet: &Inlet, environment: &[(&str, &str)]) -> [Output; 2] {
    let data = inlet.data_dir();
    let environment = [environment, &[("DATA_DIR", data.to_str().unwrap()), ("LOG_LEVEL", "error")]].concat();
    [run(&["tail", "--count", "1"], &environment), run(&["replay", "--json", LINES], &environment)]
}

#[tokio::test]
async fn whoever_answers_and_is_no_inlet_is_told_from_one_that_is_away() {
    let inlet = Inlet::serve(&[]).await;
    let closed = format!("http://127.0.0.1:{}", free_port());
    let page =
        "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 5\r\nconnection: close\r\n\r\n<html";
    let missing = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let gateway = "HTTP/1.1 502 Bad Gateway\r\ncontent-length: 3\r\nconnection: close\r\n\r\nbad";
    for (url, code, told) in [
        (closed, 69, "no service answers at http://127.0.0.1:"),
        (somebody(Some(page)).0, 78, "is no Inlet; look at INLET_URL"),
        (somebody(Some(missing)).0, 78, "(404 Not Found) is no Inlet"),
        (somebody(Some(gateway)).0, 69, "(502 Bad Gateway) is no Inlet"),
        (somebody(Some("SSH-2.0-OpenSSH\r\n")).0, 69, "no service answers at"),
        (somebody(None).0, 69, "no service answers at"),
    ] {
        for output in both(&inlet, &[("INLET_URL", &url)]) {
            let said = said(&output);
            assert_eq!(output.status.code(), Some(code), "{url}: {said}");
            assert!(said.contains(told), "{told}: {said}");
        }
    }
}

#[tokio::test]
async fn whoever_is_no_inlet_is_shown_neither_the_token_nor_the_lines() {
    let inlet = Inlet::serve(&[]).await;
    let (url, asked) = somebody(Some("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"));
    both(&inlet, &[("INLET_URL", &url), ("ADMIN_TOKEN", "hunter2")]);
    let asked: Vec<_> = asked.try_iter().collect();
    assert_eq!(asked.len(), 2);
    for request in asked {
        assert!(request.starts_with("GET /livez") && !request.contains("hunter2"), "{request}");
    }
}

#[tokio::test]
async fn a_token_is_wanted_wrong_or_right() {
    let inlet = Inlet::serve(&[("ADMIN_TOKEN", "open-sesame")]).await;
    let url = inlet.url("");
    for (token, hint) in
        [("", "set ADMIN_TOKEN as the service has it"), ("hunter2", "has another ADMIN_TOKEN")]
    {
        for output in both(&inlet, &[("INLET_URL", &url), ("ADMIN_TOKEN", token)]) {
            let said = said(&output);
            assert_eq!(output.status.code(), Some(78), "{said}");
            assert!(said.contains("401") && said.contains(hint) && !said.contains("hunter2"), "{said}");
        }
    }
    let data = inlet.data_dir();
    let right =
        [("INLET_URL", url.as_str()), ("ADMIN_TOKEN", "open-sesame"), ("DATA_DIR", data.to_str().unwrap())];
    assert_eq!(run(&["replay", LINES], &right).status.code(), Some(0));
    // A slash at the end of the address does not matter.
    let slash = [("INLET_URL", &*format!("{url}/")), right[1], right[2]];
    let tail = run(&["tail", "--after", "0", "--count", "7", "--json"], &slash);
    assert_eq!(tail.status.code(), Some(0), "{}", said(&tail));
    assert_eq!(String::from_utf8_lossy(&tail.stdout).lines().count(), 7);
}

#[tokio::test]
async fn who_is_refused_while_still_sending_hears_why() {
    let inlet = Inlet::serve(&[("ADMIN_TOKEN", "open-sesame")]).await;
    let lines = inlet.data_dir().join("long.irc");
    std::fs::write(&lines, "a line of no use, but there are many of it\r\n".repeat(200_000)).unwrap();
    let url = inlet.url("");
    let wrong = [("INLET_URL", &*url), ("ADMIN_TOKEN", "hunter2")];
    for _ in 0..5 {
        let data = inlet.data_dir();
        let data = [("DATA_DIR", data.to_str().unwrap()), ("LOG_LEVEL", "error")];
        let output = run(&["replay", lines.to_str().unwrap()], &[&wrong[..], &data].concat());
        assert!(said(&output).contains("401"), "{}", said(&output));
    }
    // Somebody who sends no more and does not end, either.
    let mut socket = std::net::TcpStream::connect(("127.0.0.1", inlet.port)).unwrap();
    socket.write_all(b"POST /admin/replay HTTP/1.1\r\nhost: inlet\r\ncontent-length: 9\r\n\r\nPING").unwrap();
    let mut answer = String::new();
    socket.set_read_timeout(Some(std::time::Duration::from_mins(1))).unwrap();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
}

#[test]
fn an_address_that_is_none_is_a_bad_setting() {
    for url in
        ["localhost:8080", "ftp://host", "http://", "http://host:port", "http://u:hush@host?token=hush"]
    {
        let output = run(&["tail"], &[("INLET_URL", url)]);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(78), "{url}: {said}");
        assert!(said.contains("INLET_URL") && !said.contains("hush"), "{said}");
    }
}
