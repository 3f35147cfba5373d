//! A file that is not what was written: what can be read of it goes out, and a later version's is left alone.

use super::{chat, drained, left_behind, read_chat, settings, those_in};
use crate::harness::inlet::{Inlet, run};
use crate::harness::nats::Nats;
use crate::harness::stream::assert_holds_exactly;

#[tokio::test]
async fn a_torn_outbox_is_set_aside_and_what_can_be_read_of_it_goes_out() {
    let mut nats = Nats::start().await;
    let simulator = chat(1_000, 3_000).await;
    let (folder, left) = left_behind(&mut nats, &simulator, &[]).await;
    let path = folder.path().join("data/outbox.redb");
    let mut bytes = std::fs::read(&path).unwrap();
    // Within the text of one event, in one row.
    let place = memchr::memmem::find(&bytes, b"\"payload\":{\"text\"").unwrap();
    bytes[place] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    nats.restart().await;
    let (irc, url) = (simulator.url(), nats.url());
    let inlet = Inlet::serve_in(folder, &settings(&irc, &url, &[])).await;
    let metrics = inlet.metrics().await;
    let recovered = metrics.get("inlet_outbox_recovered_total");
    // The file, and the row.
    assert_eq!(metrics.get("inlet_outbox_torn_total"), 2, "{}", inlet.log());
    // Rows hold what was acknowledged of them meanwhile, too: there may be more than were left, though one row is gone.
    assert!(recovered > left / 2 && recovered < 3_000, "{recovered}, and {left} were left");
    assert_eq!(set_aside(&inlet), [bytes.len()]);
    let log = inlet.log();
    assert!(log.contains("it was set aside"), "{log}");
    inlet.ready().await;
    simulator.has_finished(3_000).await;
    drained(&inlet, 1).await;
    let found = read_chat(&nats.url(), "INLET").await;
    assert_holds_exactly(&found, &those_in(&found, simulator.sent()));
}

/// How long the files are that were set aside.
fn set_aside(inlet: &Inlet) -> Vec<usize> {
    let entries = std::fs::read_dir(inlet.data_dir()).unwrap().map(Result::unwrap);
    let aside = entries.filter(|entry| entry.file_name().to_str().unwrap().starts_with("outbox.redb.torn-"));
    aside.map(|entry| usize::try_from(entry.metadata().unwrap().len()).unwrap()).collect()
}

#[tokio::test]
async fn a_foreign_file_in_its_place_is_set_aside_and_the_service_starts() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("data")).unwrap();
    std::fs::write(folder.path().join("data/outbox.redb"), b"none of ours").unwrap();
    let inlet = Inlet::serve_in(folder, &[]).await;
    inlet.ready().await;
    assert_eq!(inlet.metrics().await.get("inlet_outbox_torn_total"), 1);
    assert_eq!(set_aside(&inlet), [12]);
}

#[tokio::test]
async fn an_outbox_of_a_later_format_ends_the_start_with_78_and_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("outbox.redb");
    {
        let numbers: redb::TableDefinition<'_, &str, u64> = redb::TableDefinition::new("numbers");
        let database = redb::Database::create(&path).unwrap();
        let writing = database.begin_write().unwrap();
        writing.open_table(numbers).unwrap().insert("format", 2).unwrap();
        writing.commit().unwrap();
    }
    let before = std::fs::read(&path).unwrap();
    let output = run(&["serve"], &[("PORT", "0"), ("DATA_DIR", folder.path().to_str().unwrap())]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(said.contains("the outbox has format 2"), "{said}");
    assert!(std::fs::read(&path).unwrap() == before, "it was written to");
}
