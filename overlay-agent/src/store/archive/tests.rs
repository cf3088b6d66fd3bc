//! The archive: what is written is read again, whatever is damaged is refused, and only what is true is written.

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use proptest::prelude::*;

use super::{
    file::{FileError, read, write},
    *,
};
use crate::{
    lease::Lease,
    service::record::{Endpoints, Services},
    store::{Event, Store, etcd::EtcdOptions, record::Lifetime},
    whole_file,
};

/// Nothing listens there.
const AWAY: &str = "http://127.0.0.1:1";
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const OURS: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn identity() -> Identity {
    Identity { prefix: "/coreos.com/network/".to_owned(), endpoints: vec![AWAY.to_owned()] }
}

fn own() -> OwnLease {
    OwnLease {
        subnet: "10.244.1.0/24".parse().unwrap(),
        key: "10.244.1.0-24".to_owned(),
        public_ip: OURS,
        lifetime: Some(7),
        created_at: Some(100),
        expires: Some((now() + HOUR).into()),
    }
}

fn raw(key: &str, value: &[u8], modified: i64, lifetime: Lifetime) -> (Arc<str>, Raw) {
    let version = Version { created: Some(modified), modified, lifetime };
    (key.into(), Raw { value: value.into(), version })
}

fn lease(number: u8, lifetime: Lifetime) -> (Arc<str>, Raw) {
    let value = crate::lease::value(Ipv4Addr::new(192, 168, 77, number));
    raw(&format!("10.244.{number}.0-24"), value.as_bytes(), i64::from(number), lifetime)
}

/// Changes, as they are applied.
fn written((key, raw): (Arc<str>, Raw)) -> (Arc<str>, Option<Raw>) {
    (key, Some(raw))
}

fn gone((key, _): &(Arc<str>, Raw)) -> (Arc<str>, Option<Raw>) {
    (Arc::clone(key), None)
}

/// The content of a host with a lease, which has followed leases and services.
fn content() -> Content {
    let archive = Archive::new(identity());
    archive.list::<Lease>(
        200,
        &Known::from([
            lease(1, Lifetime::Limited(7)),
            lease(2, Lifetime::Limited(8)),
            lease(3, Lifetime::Unlimited),
        ]),
        |_| false,
    );
    archive.list::<Services>(
        201,
        &Known::from([raw("shop/web", b"{\"v\":1}", 150, Lifetime::Unlimited)]),
        |_| false,
    );
    archive.set_config(Some(r#"{"Network":"10.244.0.0/16"}"#.to_owned()));
    archive.set_own(Some(own()));
    archive.complete(now()).unwrap()
}

fn read_content(path: &Path) -> Result<Content, FileError> {
    read(path).map(|archived| archived.unwrap().content)
}

fn any_content() -> impl Strategy<Value = Content> {
    let lifetime = prop_oneof![Just(Lifetime::Unlimited), any::<i64>().prop_map(Lifetime::Limited)];
    let value = prop::collection::vec(any::<u8>(), 0..60);
    let key = prop_oneof!["[a-z/.0-9]{1,20}", "\\PC{1,10}"];
    let record = (key, value, any::<i64>(), any::<Option<i64>>(), lifetime);
    let records = prop::collection::vec(record, 0..8);
    let part = (any::<i64>(), any::<u64>(), records);
    let prefixes = prop::sample::subsequence(vec!["subnets/", "services/", "vips/", "endpoints/"], 0..=4);
    (prefixes, prop::collection::vec(part, 4), any::<Option<String>>(), any::<bool>()).prop_map(
        |(prefixes, parts, config, has_own)| {
            let part = |(prefix, (revision, seen, records)): (&str, (i64, u64, Vec<_>))| {
                let record = |(key, value, modified, created, lifetime): (
                    String,
                    Vec<u8>,
                    i64,
                    Option<i64>,
                    Lifetime,
                )| {
                    (
                        key.into(),
                        Raw { value: value.into(), version: Version { created, modified, lifetime } },
                    )
                };
                let records = Arc::new(records.into_iter().map(record).collect());
                (prefix.to_owned(), Part { revision, seen: Time(seen), records })
            };
            Content {
                config,
                own: has_own.then(own),
                parts: prefixes.into_iter().zip(parts).map(part).collect(),
            }
        },
    )
}

/// What can happen to a file.
#[derive(Clone, Debug)]
enum Damage {
    Flip {
        at: prop::sample::Index,
        bits: u8,
    },
    Cut {
        at: prop::sample::Index,
    },
    Append(Vec<u8>),
    Insert {
        at: prop::sample::Index,
        bytes: Vec<u8>,
    },
    /// A line is there twice, as after a block that was written twice.
    Repeat {
        line: prop::sample::Index,
    },
    Zero {
        from: prop::sample::Index,
        length: usize,
    },
}

fn any_damage() -> impl Strategy<Value = Damage> {
    let bytes = || prop::collection::vec(any::<u8>(), 1..20);
    let index = any::<prop::sample::Index>;
    prop_oneof![
        (index(), 1u8..).prop_map(|(at, bits)| Damage::Flip { at, bits }),
        index().prop_map(|at| Damage::Cut { at }),
        bytes().prop_map(Damage::Append),
        (index(), bytes()).prop_map(|(at, bytes)| Damage::Insert { at, bytes }),
        index().prop_map(|line| Damage::Repeat { line }),
        (index(), 1usize..600).prop_map(|(from, length)| Damage::Zero { from, length }),
    ]
}

fn damage(text: &mut Vec<u8>, damage: Damage) {
    match damage {
        Damage::Flip { at, bits } => {
            let at = at.index(text.len());
            text[at] ^= bits;
        }
        Damage::Cut { at } => text.truncate(at.index(text.len())),
        Damage::Append(bytes) => text.extend(bytes),
        Damage::Insert { at, bytes } => {
            let at = at.index(text.len());
            text.splice(at..at, bytes);
        }
        Damage::Repeat { line } => {
            let mut lines: Vec<_> = text.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
            let line = line.index(lines.len());
            lines.insert(line, lines[line].clone());
            *text = lines.concat();
        }
        Damage::Zero { from, length } => {
            let from = from.index(text.len());
            text.iter_mut().skip(from).take(length).for_each(|byte| *byte = 0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read_again(content in any_content()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.snapshot");
        write(&path, &identity(), now(), &content).unwrap();
        let archived = read(&path).unwrap().unwrap();
        prop_assert_eq!((archived.content, archived.written, archived.identity), (content, now(), identity()));
    }

    #[test]
    fn a_damaged_file_is_refused(content in any_content(), how in any_damage()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.snapshot");
        write(&path, &identity(), now(), &content).unwrap();
        let whole = fs::read(&path).unwrap();
        let mut text = whole.clone();
        damage(&mut text, how);
        fs::write(&path, &text).unwrap();
        match read(&path) {
            Ok(archived) => {
                prop_assert_eq!(text, whole);
                prop_assert_eq!(archived.unwrap().content, content);
            }
            Err(error) => prop_assert!(!matches!(error, FileError::Io(_)), "{}", error),
        }
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.snapshot");
        fs::write(&path, bytes).unwrap();
        prop_assert!(read(&path).is_err());
    }
}

#[test]
fn a_newer_format_is_named_and_a_missing_file_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snapshot");
    assert!(read(&path).unwrap().is_none());
    fs::write(&path, "{\"format\":2,\"anything\":[]}\n").unwrap();
    let error = read(&path).unwrap_err().to_string();
    assert!(error.contains("newer version") && error.contains("format 2"), "{error}");
    fs::create_dir(directory.path().join("b")).unwrap();
    assert!(matches!(read(&directory.path().join("b")), Err(FileError::Io(_))));
}

/// Set in the process that writes until it is killed.
const WRITER: &str = "OVERLAY_AGENT_TEST_ARCHIVE_WRITER";

/// The test runs itself as the writer.
#[test]
fn a_writer_that_is_killed_at_any_time_leaves_a_whole_file() {
    if let Some(path) = std::env::var_os(WRITER).map(PathBuf::from) {
        for number in 0.. {
            let mut content = content();
            let part = content.parts.get_mut(Lease::PREFIX).unwrap();
            part.revision = number;
            // Long enough to be killed half-way.
            let records = (0..20_000).map(|index| {
                let raw =
                    Raw { value: Arc::from(number.to_string().as_bytes()), version: Version::default() };
                (format!("{index:06}").into(), raw)
            });
            part.records = Arc::new(records.collect());
            write(&path, &identity(), now(), &content).unwrap();
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snapshot");
    let (mut last, mut half) = (-1, 0);
    for round in 0..12 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "store::archive::tests::a_writer_that_is_killed_at_any_time_leaves_a_whole_file",
            ])
            .env(WRITER, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while round == 0 && !path.exists() {
            assert!(Instant::now() < deadline, "the writer wrote nothing");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(120 + round * 17));
        writer.kill().unwrap();
        assert_eq!(writer.wait().unwrap().signal(), Some(9), "the writer ended by itself");
        let content = read_content(&path).unwrap();
        let Part { revision, records, .. } = &content.parts[Lease::PREFIX];
        let number = revision.to_string();
        assert!(records.len() == 20_000 && records.values().all(|raw| &*raw.value == number.as_bytes()));
        last = last.max(*revision);
        half += usize::from(whole_file::temporary(&path).exists());
    }
    assert!(last >= 0 && half > 0, "no writer was killed between its first byte and the rename");
}

fn check(content: Content, identity: Identity, public_ip: Ipv4Addr, at: SystemTime) -> Result<Saved, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snapshot");
    write(&path, &self::identity(), now(), &content).unwrap();
    Saved::read(&path, identity, public_ip, DAY, at).map(Option::unwrap).map_err(|error| error.to_string())
}

#[test]
fn only_a_file_of_this_host_and_network_with_a_living_lease_is_used() {
    let saved = check(content(), identity(), OURS, now() + HOUR / 2).unwrap();
    assert_eq!((saved.subnet(), saved.revision(), saved.records()), (own().subnet, 201, 4));
    // One endpoint in common is enough: members of etcd come and go.
    let more = Identity { endpoints: vec!["http://10.0.0.9:2379".to_owned(), AWAY.to_owned()], ..identity() };
    assert!(check(content(), more, OURS, now()).is_ok());
    let other_prefix = Identity { prefix: "/other/".to_owned(), ..identity() };
    let other_etcd = Identity { endpoints: vec!["http://10.0.0.9:2379".to_owned()], ..identity() };
    let other_ip = Ipv4Addr::new(192, 168, 77, 2);
    let no_lease = Content { own: None, ..content() };
    let no_config = Content { config: None, ..content() };
    for (content, identity, ip, at, words) in [
        (content(), other_prefix, OURS, now(), "another network: of /coreos.com/network/"),
        (content(), other_etcd, OURS, now(), "in etcd at http://127.0.0.1:1"),
        (content(), identity(), other_ip, now(), "192.168.77.1, and this host has 192.168.77.2"),
        (
            content(),
            identity(),
            OURS,
            now() + HOUR,
            "its lease of 10.244.1.0/24 ended at 2027-01-15T09:00:00Z",
        ),
        (content(), identity(), OURS, now() - HOUR, "still to come"),
        (no_lease, identity(), OURS, now(), "no lease"),
        (no_config, identity(), OURS, now(), "no network config"),
    ] {
        let error = check(content, identity, ip, at).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    let reservation = OwnLease { lifetime: None, expires: None, ..own() };
    let reserved = Content { own: Some(reservation), ..content() };
    assert!(check(reserved, identity(), OURS, now() + 100 * DAY).is_ok(), "a reservation has no end");
}

#[test]
fn leases_that_must_have_ended_are_left_out() {
    let reservation = OwnLease { lifetime: None, expires: None, ..own() };
    let content = Content { own: Some(reservation), ..content() };
    let known = |at| {
        let saved = check(content.clone(), identity(), OURS, at).unwrap();
        let recalled = saved.into_archive().follow::<Lease>().unwrap();
        recalled.records.keys().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(known(now() + DAY - HOUR).len(), 3);
    assert_eq!(known(now() + DAY), ["10.244.3.0-24"], "only the record without a lifetime");
}

#[test]
fn nothing_is_written_before_everything_is_known_that_is_followed() {
    let archive = Archive::new(identity());
    assert!(archive.follow::<Lease>().is_none() && archive.follow::<Endpoints>().is_none());
    archive.list::<Lease>(5, &Known::from([lease(2, Lifetime::Unlimited)]), |_| false);
    archive.set_config(None);
    archive.set_own(Some(own()));
    assert!(archive.complete(now()).is_none(), "the endpoints are missing");
    archive.list::<Endpoints>(6, &Known::new(), |_| false);
    assert!(archive.complete(now()).is_some());
    archive.set_own(None);
    assert_eq!(archive.complete(now()).unwrap().own, None, "a lost lease must not be used");
}

#[test]
fn changes_and_remembered_records_are_followed() {
    let archive = Archive::new(identity());
    archive.set_config(None);
    archive.set_own(None);
    let (two, three) = (lease(2, Lifetime::Unlimited), lease(3, Lifetime::Unlimited));
    archive.list::<Lease>(5, &Known::from([two.clone(), three.clone()]), |_| false);
    archive.apply::<Lease>(6, [written(lease(4, Lifetime::Unlimited)), gone(&two)]);
    let keys = || {
        let content = archive.complete(now()).unwrap();
        content.parts[Lease::PREFIX].records.keys().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(keys(), ["10.244.3.0-24", "10.244.4.0-24"]);
    // etcd lost its data, and the old records count for a while.
    archive.list::<Lease>(1, &Known::from([two.clone()]), |key| key == "10.244.3.0-24");
    assert_eq!(keys(), ["10.244.2.0-24", "10.244.3.0-24"]);
    archive.apply::<Lease>(1, [gone(&three)]);
    assert_eq!(keys(), [two.0.to_string()]);
}

#[test]
fn records_count_as_seen_until_they_are_lost() {
    let archive = Archive::new(identity());
    archive.set_config(None);
    archive.set_own(None);
    archive.list::<Lease>(5, &Known::new(), |_| false);
    let seen = |at| SystemTime::from(archive.complete(at).unwrap().parts[Lease::PREFIX].seen);
    let later = SystemTime::now() + 5 * HOUR;
    assert_eq!(Time::from(seen(later)), Time::from(later));
    archive.lose::<Lease>();
    assert!(seen(later + HOUR) < later, "when they were lost");
}

async fn next<K: Kind>(events: &mut tokio::sync::mpsc::Receiver<Event<K>>) -> Event<K> {
    tokio::time::timeout(Duration::from_secs(20), events.recv()).await.unwrap().unwrap()
}

fn unreached(prefix: &str) -> Store {
    let options =
        EtcdOptions { endpoints: vec![AWAY.to_owned()], prefix: prefix.to_owned(), ..EtcdOptions::default() };
    Store::etcd_unreached(options).unwrap()
}

#[tokio::test]
async fn without_etcd_a_host_has_the_records_of_the_file_and_writes_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ovl0.snapshot");
    let store = unreached("/coreos.com/network");
    let Store { backend: crate::store::Backend::Etcd(etcd), .. } = &store else { panic!("not etcd") };
    let times = content();
    write(&path, &etcd.identity(), now(), &times).unwrap();
    let before = fs::read(&path).unwrap();
    let other = unreached("/other").saved(&path, OURS, now());
    assert!(other.unwrap_err().to_string().contains("another network"));
    let saved = store.saved(&path, OURS, now()).unwrap().unwrap();
    let store = store.archived(Some(saved));
    let keeper = store.keep_archive(path.clone()).unwrap();
    let (mut leases, mut services, mut endpoints) =
        (store.follow::<Lease>(), store.follow::<Services>(), store.follow::<Endpoints>());
    let Event::Recalled { records, seen } = next(&mut leases).await else { panic!("not recalled") };
    assert_eq!((records.len(), seen), (3, now()));
    let Event::Recalled { records, .. } = next(&mut services).await else { panic!("not recalled") };
    assert_eq!(&*records[0].key, "shop/web");
    for lost in [
        matches!(next(&mut leases).await, Event::Lost(_)),
        matches!(next(&mut services).await, Event::Lost(_)),
    ] {
        assert!(lost);
    }
    assert!(matches!(next(&mut endpoints).await, Event::Lost(_)), "a kind that the file does not have");
    keeper.stop().await;
    assert_eq!(fs::read(&path).unwrap(), before, "the file looks younger than its records are");
}

#[tokio::test]
async fn the_file_is_written_after_a_change_and_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state/ovl0.snapshot");
    let archive = Arc::new(Archive::new(identity()));
    archive.list::<Lease>(5, &Known::from([lease(2, Lifetime::Unlimited)]), |_| false);
    archive.set_config(None);
    archive.set_own(Some(own()));
    // All of it was there before the task.
    let mut keeper = keep(Arc::clone(&archive), path.clone());
    let deadline = Instant::now() + Duration::from_secs(20);
    while !path.exists() {
        assert!(Instant::now() < deadline, "no file after a change");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(read_content(&path).unwrap().parts[Lease::PREFIX].revision, 5);
    archive.apply::<Lease>(6, [written(lease(3, Lifetime::Unlimited))]);
    keeper.stop().await;
    assert_eq!(read_content(&path).unwrap().parts[Lease::PREFIX].records.len(), 2);

    // A directory that cannot be written is a problem with a remedy.
    let path = path.join("not a directory");
    keeper = keep(Arc::clone(&archive), path);
    archive.set_own(None);
    let problem = tokio::time::timeout(Duration::from_secs(20), keeper.problem.wait_for(Option::is_some));
    let problem = problem.await.unwrap().unwrap().clone().unwrap();
    assert!(problem.contains("--state-dir") && problem.contains("--no-snapshot"), "{problem}");
}

/// Memory of this process in MiB.
fn memory() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096 / (1 << 20)
}

/// A measurement with a wide limit: `cargo test --release -p overlay-agent a_large_network_is_written -- --nocapture`.
#[test]
fn a_large_network_is_written_and_read_in_little_time() {
    let service = br#"{"v":1,"ports":[{"name":"http","port":80,"protocol":"tcp","target_port":8080}]}"#;
    let endpoint = br#"{"overlay_ip":"10.244.1.2","state":"ready","ports":{"http":8080}}"#;
    let archive = Archive::new(identity());
    let before = memory();
    let services = (0..10_000).map(|number| {
        raw(&format!("ns-{}/service-{number}", number % 100), service, number, Lifetime::Unlimited)
    });
    archive.list::<Services>(1, &services.collect(), |_| false);
    let endpoints = (0..100_000).map(|number| {
        let key = format!("ns-{}/service-{}/node-{}/{number}", number % 100, number % 10_000, number % 500);
        raw(&key, endpoint, number, Lifetime::Limited(number % 500))
    });
    archive.list::<Endpoints>(1, &endpoints.collect(), |_| false);
    archive.set_config(None);
    archive.set_own(None);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snapshot");
    let started = Instant::now();
    let (kept, content) = (memory().saturating_sub(before), archive.complete(now()).unwrap());
    let copied = started.elapsed();
    write(&path, &identity(), now(), &content).unwrap();
    let written = started.elapsed();
    // Such a change meanwhile copies the records of its kind, once.
    archive.apply::<Endpoints>(2, [("ns-0/service-0/node-0/0".into(), None)]);
    let changed = started.elapsed();
    let read = read_content(&path).unwrap();
    println!(
        "kept in {kept} MiB, copied in {copied:?}, {} bytes written in {:?}, a change meanwhile {:?}, read in {:?}",
        fs::metadata(&path).unwrap().len(),
        written - copied,
        changed - written,
        started.elapsed() - changed
    );
    assert!(read == content && started.elapsed() < Duration::from_secs(30));
}
