//! What is answered to which message.

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{DNSClass, Name, RecordType},
};

use super::{super::*, query, texts, with_edns, zone_records};

/// The answer as the client reads it, over TCP.
fn ask(message: &Message) -> Message {
    ask_bytes(&message.to_vec().unwrap()).expect("an answer")
}

fn ask_bytes(message: &[u8]) -> Option<Message> {
    match answer(message, &zone_records()) {
        Answer::Reply(reply) => {
            let mut buffer = Vec::new();
            assert!(!reply.encode(None, &mut buffer));
            Some(Message::from_vec(&buffer).unwrap())
        }
        Answer::Forward(question) => panic!("forwarded: {question:?}"),
        Answer::None => None,
    }
}

fn ask_for(name: &str, kind: RecordType) -> Message {
    let asked = query(name, kind);
    let response = ask(&asked);
    assert_eq!(response.metadata.id, asked.metadata.id);
    assert_eq!(response.queries, asked.queries);
    assert!(response.metadata.authoritative && response.metadata.recursion_available, "{name}");
    response
}

fn is_forwarded(name: &str, kind: RecordType) -> bool {
    matches!(answer(&query(name, kind).to_vec().unwrap(), &zone_records()), Answer::Forward(_))
}

/// A negative answer with the SOA record of a zone.
fn assert_negative(name: &str, kind: RecordType, code: ResponseCode, apex: &str) {
    let response = ask_for(name, kind);
    assert_eq!(response.metadata.response_code, code, "{name} {kind}");
    assert!(response.answers.is_empty(), "{name} {kind}");
    let [soa] = &response.authorities[..] else { panic!("{name} {kind}: no SOA record") };
    assert_eq!(
        (soa.name.to_ascii().as_str(), soa.record_type(), soa.ttl),
        (apex, RecordType::SOA, 5),
        "{name}"
    );
    assert!(super::text(&soa.data).ends_with(" 5"), "the minimum: {}", soa.data);
}

#[test]
fn a_service_has_its_virtual_address() {
    for name in ["web.shop.svc.overlay.", "web.shop.svc."] {
        let response = ask_for(name, RecordType::A);
        assert_eq!(texts(&response.answers), ["30 10.251.0.9"], "{name}");
        assert_eq!(response.answers[0].name.to_ascii(), name);
        assert_eq!(texts(&ask_for(name, RecordType::ANY).answers), ["30 10.251.0.9"]);
    }
}

#[test]
fn names_match_in_any_case_and_the_question_is_echoed() {
    let response = ask_for("wEb.SHOP.Svc.oVerlay.", RecordType::A);
    assert_eq!(texts(&response.answers), ["30 10.251.0.9"]);
    // Comparison of names ignores the case, so the text is compared.
    assert_eq!(response.queries[0].name().to_ascii(), "wEb.SHOP.Svc.oVerlay.");
    assert_eq!(response.answers[0].name.to_ascii(), "wEb.SHOP.Svc.oVerlay.");
}

#[test]
fn a_headless_service_has_the_addresses_of_its_serving_endpoints() {
    let mut addresses = texts(&ask_for("db.data.svc.overlay.", RecordType::A).answers);
    addresses.sort();
    assert_eq!(addresses, ["5 10.244.1.3", "5 10.244.2.3"]);
    assert_eq!(texts(&ask_for("down.data.svc.overlay.", RecordType::A).answers), ["5 10.244.1.7"]);
    let first = |id| {
        let mut asked = query("db.data.svc.overlay.", RecordType::A);
        asked.metadata.id = id;
        texts(&ask(&asked).answers)[0].clone()
    };
    assert_ne!(first(1), first(2), "clients that take the first address spread");
}

#[test]
fn an_endpoint_has_its_address_in_any_state() {
    for (name, address) in [
        ("1.node-a.db.data.svc.overlay.", "5 10.244.1.3"),
        ("2.node-b.db.data.svc.overlay.", "5 10.244.2.4"),
        ("1.NODE-C.db.data.svc.overlay.", "5 10.244.3.4"),
        ("1.node-a.web.shop.svc.", "5 10.244.1.2"),
    ] {
        assert_eq!(texts(&ask_for(name, RecordType::A).answers), [address], "{name}");
    }
}

#[test]
fn a_name_without_the_record_is_no_error() {
    for (name, kind) in [
        ("web.shop.svc.overlay.", RecordType::AAAA),
        ("web.shop.svc.overlay.", RecordType::MX),
        ("late.shop.svc.overlay.", RecordType::A),
        ("empty.data.svc.overlay.", RecordType::A),
        ("db.data.svc.overlay.", RecordType::AAAA),
        ("1.node-a.db.data.svc.overlay.", RecordType::AAAA),
        // Names between others exist (RFC 8020).
        ("shop.svc.overlay.", RecordType::A),
        ("node-a.db.data.svc.overlay.", RecordType::A),
        ("_tcp.web.shop.svc.overlay.", RecordType::SRV),
        ("_http._tcp.web.shop.svc.overlay.", RecordType::A),
        ("_http._tcp.late.shop.svc.overlay.", RecordType::SRV),
        ("_http._tcp.empty.data.svc.overlay.", RecordType::SRV),
        ("svc.overlay.", RecordType::A),
    ] {
        assert_negative(name, kind, ResponseCode::NoError, "svc.overlay.");
    }
    assert_negative("web.shop.svc.", RecordType::AAAA, ResponseCode::NoError, "svc.");
    assert_negative("overlay.", RecordType::A, ResponseCode::NoError, "overlay.");
    assert_negative("9.0.251.10.in-addr.arpa.", RecordType::A, ResponseCode::NoError, "251.10.in-addr.arpa.");
    assert_eq!(ask_for("svc.overlay.", RecordType::SOA).answers.len(), 1);
}

#[test]
fn a_name_that_does_not_exist_is_an_error() {
    for name in [
        "api.shop.svc.overlay.",
        "web.data.svc.overlay.",
        "other.svc.overlay.",
        "node-z.web.shop.svc.overlay.",
        "2.node-a.web.shop.svc.overlay.",
        "_ftp._tcp.web.shop.svc.overlay.",
        "_http._udp.web.shop.svc.overlay.",
        "_http._sctp.web.shop.svc.overlay.",
        "_sctp.web.shop.svc.overlay.",
        "a.b.c.web.shop.svc.overlay.",
        "_web.shop.svc.overlay.",
    ] {
        for kind in [RecordType::A, RecordType::AAAA, RecordType::SRV] {
            assert_negative(name, kind, ResponseCode::NXDomain, "svc.overlay.");
        }
    }
    assert_negative("other.shop.svc.", RecordType::A, ResponseCode::NXDomain, "svc.");
    assert_negative("www.example.com.overlay.", RecordType::A, ResponseCode::NXDomain, "overlay.");
    assert_negative(
        "8.0.251.10.in-addr.arpa.",
        RecordType::PTR,
        ResponseCode::NXDomain,
        "251.10.in-addr.arpa.",
    );
}

#[test]
fn srv_records_name_the_ports_and_come_with_addresses() {
    let response = ask_for("_HTTP._tcp.web.shop.svc.overlay.", RecordType::SRV);
    assert_eq!(texts(&response.answers), ["30 0 0 80 web.shop.svc.overlay."]);
    assert_eq!(texts(&response.additionals), ["30 10.251.0.9"]);
    let response = ask_for("_http._tcp.db.data.svc.", RecordType::SRV);
    let targets = ["5 0 3 8080 1.node-a.db.data.svc.overlay.", "5 0 1 9090 1.node-b.db.data.svc.overlay."];
    assert_eq!(texts(&response.answers), targets);
    assert_eq!(texts(&response.additionals), ["5 10.244.1.3", "5 10.244.2.3"]);
    assert_eq!(response.additionals[0].name.to_ascii(), "1.node-a.db.data.svc.overlay.");
    let response = ask_for("_dns._udp.db.data.svc.overlay.", RecordType::SRV);
    assert!(texts(&response.answers)[0].contains(" 53 "));
}

#[test]
fn addresses_have_their_names() {
    let names = |name| texts(&ask_for(name, RecordType::PTR).answers);
    assert_eq!(names("9.0.251.10.in-addr.arpa."), ["5 web.shop.svc.overlay."]);
    assert_eq!(names("3.1.244.10.IN-ADDR.ARPA."), ["5 1.node-a.db.data.svc.overlay."]);
    // An endpoint of a service with a virtual address, and an address of others.
    for outside in ["2.1.244.10.in-addr.arpa.", "1.2.0.192.in-addr.arpa."] {
        assert!(is_forwarded(outside, RecordType::PTR), "{outside}");
    }
}

#[test]
fn other_names_are_for_upstream_servers() {
    for name in ["www.example.com.", ".", "web.", "web.shop.", "svc.example.com.", "overlay.com."] {
        assert!(is_forwarded(name, RecordType::A), "{name}");
    }
    let mut not_recursive = query("www.example.com.", RecordType::A);
    not_recursive.metadata.recursion_desired = false;
    assert_eq!(ask(&not_recursive).metadata.response_code, ResponseCode::Refused);
    let mut own = query("web.shop.svc.overlay.", RecordType::A);
    own.metadata.recursion_desired = false;
    assert_eq!(ask(&own).answers.len(), 1);
}

#[test]
fn what_is_no_query_is_not_answered() {
    let good = query("web.shop.svc.overlay.", RecordType::A).to_vec().unwrap();
    for length in 0..12 {
        assert!(ask_bytes(&good[..length]).is_none());
    }
    let mut response = good.clone();
    response[2] |= 0x80;
    assert!(ask_bytes(&response).is_none());
    // A response is never answered, whatever else is wrong with it.
    response[2] |= 0x28;
    assert!(ask_bytes(&response[..12]).is_none());
}

#[test]
fn queries_that_are_not_understood_get_the_right_error() {
    let good = query("web.shop.svc.overlay.", RecordType::A).to_vec().unwrap();
    let code = |message: &[u8]| {
        let response = ask_bytes(message).expect("an answer");
        assert_eq!(response.metadata.id, 0x1234);
        assert!(response.answers.is_empty());
        response.metadata.response_code
    };
    let changed = |at: usize, value: u8| {
        let mut message = good.clone();
        message[at] = value;
        message
    };
    for opcode in [1, 2, 3, 4, 5, 6, 15] {
        assert_eq!(code(&changed(2, opcode << 3)), ResponseCode::NotImp, "{opcode}");
    }
    assert_eq!(code(&changed(5, 0)), ResponseCode::FormErr);
    assert_eq!(code(&changed(5, 2)), ResponseCode::FormErr);
    assert_eq!(code(&[&changed(5, 2)[..], &good[12..]].concat()), ResponseCode::FormErr);
    for length in 12..good.len() {
        assert_eq!(code(&good[..length]), ResponseCode::FormErr, "{length}");
    }
    // A count without a record, a label of a reserved kind, a name that refers to itself.
    for (at, value) in [(7, 1), (9, 1), (11, 1), (12, 0x40), (12, 0xc0)] {
        assert_eq!(code(&changed(at, value)), ResponseCode::FormErr, "{at}");
    }
    for (class, expected) in [(DNSClass::CH, ResponseCode::Refused), (DNSClass::NONE, ResponseCode::Refused)]
    {
        let mut message = query("web.shop.svc.overlay.", RecordType::A);
        message.queries[0].query_class = class;
        assert_eq!(code(&message.to_vec().unwrap()), expected);
    }
    let mut any = query("web.shop.svc.overlay.", RecordType::A);
    any.queries[0].query_class = DNSClass::ANY;
    assert_eq!(ask(&any).answers.len(), 1);
    for kind in [RecordType::AXFR, RecordType::IXFR] {
        assert_eq!(code(&query("svc.overlay.", kind).to_vec().unwrap()), ResponseCode::Refused);
    }
}

#[test]
fn edns_is_answered_with_edns() {
    let response = ask(&query("web.shop.svc.overlay.", RecordType::A));
    assert!(response.edns.is_none());
    let mut asked = with_edns(query("web.shop.svc.overlay.", RecordType::A), 4096);
    asked.edns.as_mut().unwrap().set_dnssec_ok(true);
    let edns = ask(&asked).edns.unwrap();
    assert_eq!((edns.version(), edns.max_payload(), edns.flags().dnssec_ok), (0, 1232, true));
    asked.edns.as_mut().unwrap().set_version(1);
    let response = ask(&asked);
    // 16 has two names: BADSIG in TSIG records.
    assert_eq!((u16::from(response.metadata.response_code), response.answers.len()), (16, 0));
    assert_eq!(response.edns.unwrap().version(), 0);
    // Two OPT records are malformed.
    let mut bytes = with_edns(query("web.shop.svc.overlay.", RecordType::A), 4096).to_vec().unwrap();
    bytes.extend_from_slice(&[0, 0, 41, 4, 0, 0, 0, 0, 0, 0, 0]);
    bytes[11] = 2;
    assert_eq!(ask_bytes(&bytes).unwrap().metadata.response_code, ResponseCode::FormErr);
}

#[test]
fn the_longest_names_are_no_problem() {
    let label = "a".repeat(63);
    let name = format!("{label}.{label}.{label}.{}.svc.overlay.", "b".repeat(49));
    assert_eq!(Name::from_ascii(&name).unwrap().len(), 255 - 1);
    assert_negative(&name, RecordType::A, ResponseCode::NXDomain, "svc.overlay.");
}
