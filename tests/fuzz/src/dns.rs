//! What must be true of the DNS server, whatever clients and upstream servers send.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use hickory_proto::op::{Message, MessageType, ResponseCode};
use overlay_agent::{
    service::{
        Catalog,
        dns::{
            Answer, Records, Zone, answer,
            cache::{Cache, Response},
            wire,
        },
    },
    store::{Kind, Record, Version},
};

/// Largest datagram of the server, where the input asks for UDP.
const UDP_PAYLOAD: u16 = 1232;
/// Largest response without EDNS (RFC 1035 section 2.3.4).
const PLAIN_UDP: usize = 512;
/// Bytes of the cache.
const CACHE: usize = 4096;
/// Least memory that the cache counts for an entry.
const ENTRY: usize = 200;

fn parse<K: Kind>(records: &[(&str, &str)]) -> Vec<Record<K>> {
    records.iter().map(|(key, value)| Record::parse(key, value.as_bytes(), Version::default())).collect()
}

/// A service with a virtual address, a headless one with three endpoints, and one without an address.
fn records() -> &'static Records {
    static RECORDS: OnceLock<Records> = OnceLock::new();
    RECORDS.get_or_init(|| {
        let plain = r#"{"v":1,"ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;
        let headless = r#"{"v":1,"headless":true,"ports":[{"name":"dns","port":53,"protocol":"udp"}]}"#;
        let catalog = Catalog::new(
            &parse(&[("shop/web", plain), ("data/db", headless), ("shop/late", plain)]),
            &parse(&[("10.251.0.9", "shop/web")]),
            &parse(&[
                ("data/db/a/1", r#"{"overlay_ip":"10.244.1.3","weight":3}"#),
                ("data/db/b/1", r#"{"overlay_ip":"10.244.2.3","ports":{"dns":5353}}"#),
                ("data/db/b/2", r#"{"overlay_ip":"10.244.2.4","state":"draining"}"#),
            ]),
            &Catalog::default(),
        );
        let zone = Zone::new("overlay")
            .expect("a domain")
            .with_reverse(vec!["10.251.0.0/16".parse().expect("a network")]);
        Records::new(Arc::new(zone), Arc::new(catalog))
    })
}

/// Checks one input: a byte, odd for UDP, and a message.
pub(crate) fn check_answer(input: &[u8]) {
    let Some((transport, query)) = input.split_first() else { return };
    let limit = (transport % 2 == 1).then_some(UDP_PAYLOAD);
    // The header has 12 bytes; the highest bit of the third says that it is a response.
    let is_query = query.len() >= 12 && query[2] & 0x80 == 0;
    let mut response = Vec::new();
    match answer(query, records()) {
        Answer::None => return assert!(!is_query, "a query without an answer"),
        Answer::Reply(reply) => {
            assert!(is_query, "an answer to what is no query");
            reply.encode(limit, &mut response);
        }
        Answer::Forward(question) => {
            assert!(is_query, "a question for upstream servers from what is no query");
            let forwarded = question.query(7, true);
            let forwarded = Message::from_vec(&forwarded).expect("upstream servers can read it");
            assert_eq!((forwarded.id, forwarded.queries.len()), (7, 1));
            assert_eq!(forwarded.message_type, MessageType::Query);
            question.failure(ResponseCode::ServFail, &mut response);
        }
    }
    assert_eq!(response[..2], query[..2], "the identifier");
    let longest = match limit {
        None => usize::from(u16::MAX),
        // Without additional records, the query has no EDNS.
        Some(_) if query[10..12] == [0, 0] => PLAIN_UDP,
        Some(own) => usize::from(own),
    };
    assert!(response.len() <= longest, "{} bytes", response.len());
    let decoded = Message::from_vec(&response).expect("clients can read the response");
    assert_eq!(decoded.message_type, MessageType::Response);
    assert!(decoded.queries.len() <= 1);
}

/// Checks one input: a message that is taken for the response of an upstream server.
pub(crate) fn check_response(input: &[u8]) {
    let Some(question) = wire::question(input) else { return };
    assert!(question.start == 12 && question.end <= input.len() && question.len() >= 5, "{question:?}");
    let Some(response) = Response::parse(input, question.end) else { return };
    assert_eq!(response.code(), input[3] & 0x0f);
    let whole = response.aged(0);
    assert!(whole.len() <= input.len() && whole[..10] == input[..10], "more than was received");
    let before = wire::records(&whole, question.end).expect("what is kept is complete");
    let end = before.last().map_or(question.end, |record| record.end);
    assert_eq!(end, whole.len(), "something follows the last record");
    // Its OPT record is between two servers (RFC 6891 section 6.2.6).
    assert!(
        before.iter().all(|record| record.section != 2 || record.kind != wire::OPT),
        "an OPT record is kept"
    );
    let ttl = |bytes: &[u8], record: &wire::RecordAt| {
        wire::u32_at(bytes, record.ttl_at).expect("a record has a time to live")
    };
    for seconds in [1, 60, u32::MAX] {
        let aged = response.aged(seconds);
        assert_eq!(wire::records(&aged, question.end).as_ref(), Some(&before), "other records");
        for record in &before {
            let fresh = ttl(&whole, record);
            assert!(fresh <= i32::MAX as u32, "RFC 2181 section 8");
            assert_eq!(ttl(&aged, record), fresh.saturating_sub(seconds));
        }
    }
    let again = Response::parse(&whole, question.end);
    assert_eq!(again.map(|again| again.aged(0)), Some(whole), "what is kept is a response");
}

/// Checks one input: steps of four bytes. The first chooses between keeping and asking; then the key, the time to live, and the seconds
/// that pass before the step.
pub(crate) fn check_cache(input: &[u8]) {
    let mut cache = Cache::new(CACHE);
    let mut known: BTreeMap<u8, (Arc<Response>, u32, Instant)> = BTreeMap::new();
    let mut now = Instant::now();
    for step in input.chunks_exact(4) {
        let (action, key, ttl, pause) = (step[0], step[1] % 32, u32::from(step[2]), step[3]);
        now += Duration::from_secs(pause.into());
        if action % 2 == 0 {
            let bytes = message(key, ttl, usize::from(action));
            let end = wire::question(&bytes).expect("a question").end;
            let response = Arc::new(Response::parse(&bytes, end).expect("a response"));
            cache.insert(Box::new([key]), Arc::clone(&response), now);
            if ttl > 0 {
                known.insert(key, (response, ttl, now));
                assert!(cache.get(&[key], now).is_some(), "what was kept just now is gone");
            }
        }
        let Some((response, age)) = cache.get(&[key], now) else { continue };
        let (kept, ttl, since) = known.get(&key).expect("nothing was kept for this key");
        assert!(Arc::ptr_eq(&response, kept), "an earlier response");
        assert!(age < *ttl && u64::from(age) == (now - *since).as_secs(), "{age} s of {ttl} s");
    }
    let found = (0..32).filter(|key| cache.get(&[*key], now).is_some()).count();
    assert!(found * ENTRY <= CACHE, "{found} entries are too many");
}

fn name(text: &str) -> Vec<u8> {
    let labels =
        text.split_terminator('.').flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat());
    labels.chain([0]).collect()
}

/// A response with one record of any type, whose data have `length` bytes.
fn message(key: u8, ttl: u32, length: usize) -> Vec<u8> {
    let head = [0, key, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
    let question = [&name("www.example.com")[..], &[0, 16, 0, 1]].concat();
    let record = [&[0xc0, 12, 0, 16, 0, 1][..], &ttl.to_be_bytes(), &(length as u16).to_be_bytes()].concat();
    [&head[..], &question, &record, &vec![key; length]].concat()
}

/// Seeds of [`check_answer`].
pub(crate) fn queries() -> Vec<Vec<u8>> {
    let names = [
        "web.shop.svc.overlay",
        "DB.data.svc",
        "_dns._udp.db.data.svc.overlay",
        "1.a.db.data.svc.overlay",
        "9.0.251.10.in-addr.arpa",
        "none.shop.svc.overlay",
        "www.example.com",
        "",
    ];
    // A, NS, SOA, PTR, AAAA, SRV, OPT, ANY, with and without an OPT record.
    let kinds = [1, 2, 6, 12, 28, 33, 41, 255];
    let opt = [0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 0];
    let query = |text: &&str, kind: u8, edns: u8| {
        let head = [edns, 0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, edns];
        let opt = if edns == 1 { &opt[..] } else { &[] };
        [&head[..], &name(text), &[0, kind, 0, 1], opt].concat()
    };
    let of_name = |text: &&str| [query(text, 1, 0), query(text, 33, 1)];
    names.iter().flat_map(of_name).chain(kinds.iter().map(|kind| query(&names[1], *kind, 1))).collect()
}

/// Seeds of [`check_response`].
pub(crate) fn responses() -> Vec<Vec<u8>> {
    let plain = (0..8).map(|number| message(number, u32::from(number) * 1000, usize::from(number) * 9));
    let with_opt = message(1, 60, 4).into_iter().enumerate();
    let with_opt = with_opt.map(|(at, byte)| if at == 11 { 1 } else { byte });
    plain.chain([with_opt.chain([0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 0]).collect()]).collect()
}

/// Seeds of [`check_cache`].
pub(crate) fn steps() -> Vec<Vec<u8>> {
    let step =
        |seed: u8, step: u8| [(step / 2).wrapping_mul(seed), step.wrapping_mul(seed), 10 * seed, step % seed];
    let steps = |seed: u8| (0..64_u8).flat_map(|number| step(seed, number)).collect();
    (1..=8).map(steps).collect()
}
