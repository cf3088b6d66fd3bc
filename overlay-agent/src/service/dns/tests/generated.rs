//! Random and mutated messages: no panic, no answer to what is no query, and answers that fit their question.

use std::net::Ipv4Addr;

use hickory_proto::{op::Message, rr::RecordType};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{super::*, query, with_edns, zone_records};
use crate::service::dns::{cache::Response, wire};

/// A debug build takes about 20 s for them.
const MESSAGES: u32 = 1_000_000;

fn seeds() -> Vec<Vec<u8>> {
    let names = [
        "web.shop.svc.overlay.",
        "DB.data.svc.",
        "_http._tcp.db.data.svc.overlay.",
        "1.node-a.db.data.svc.overlay.",
        "9.0.251.10.in-addr.arpa.",
        "www.example.com.",
        ".",
    ];
    let kinds =
        [RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::PTR, RecordType::ANY, RecordType::OPT];
    let mut seeds = Vec::new();
    for name in names {
        for kind in kinds {
            seeds.push(query(name, kind).to_vec().unwrap());
            seeds.push(with_edns(query(name, kind), 1232).to_vec().unwrap());
        }
    }
    seeds
}

fn message(random: &mut StdRng, seeds: &[Vec<u8>]) -> Vec<u8> {
    if random.random_ratio(1, 8) {
        let length = random.random_range(0..100);
        return (0..length).map(|_| random.random()).collect();
    }
    let mut message = seeds[random.random_range(0..seeds.len())].clone();
    for _ in 0..random.random_range(0..4) {
        let at = random.random_range(0..message.len());
        match random.random_range(0..6) {
            0 => message[at] = random.random(),
            1 => message[at] ^= 1 << random.random_range(0..8),
            2 => message.truncate(at.max(1)),
            3 => message.insert(at, random.random()),
            4 => message[at] = [0, 1, 0xc0, 0xff, 0x3f, 0x40][random.random_range(0..6)],
            _ => message.extend_from_within(at..),
        }
    }
    message
}

#[test]
fn no_message_causes_a_panic_and_only_queries_are_answered() {
    let records = zone_records();
    let seeds = seeds();
    let mut random = StdRng::seed_from_u64(1);
    let (mut buffer, mut answered, mut forwarded) = (Vec::new(), 0, 0);
    for round in 0..MESSAGES {
        let message = message(&mut random, &seeds);
        let is_no_query = message.len() < 12 || message[2] & 0x80 != 0;
        let limit = if random.random() { Some(1232) } else { None };
        match answer(&message, &records) {
            Answer::None => {
                assert!(is_no_query, "not answered: {message:?}");
                continue;
            }
            Answer::Reply(reply) => {
                let is_truncated = reply.encode(limit, &mut buffer);
                assert!(!is_truncated, "{message:?}");
                answered += 1;
            }
            Answer::Forward(question) => {
                let mut response = question.query(7, true);
                response[2] |= 0x80;
                let response = Response::parse(&response, wire::HEADER + question.bytes.len()).unwrap();
                question.respond(&response.aged(0), limit, &mut buffer);
                forwarded += 1;
            }
        }
        assert!(!is_no_query, "answered: {message:?}");
        assert_eq!(buffer[..2], message[..2], "the identifier");
        assert_eq!(buffer[2] & 0x80, 0x80, "a response");
        assert!(buffer.len() <= limit.map_or(usize::from(u16::MAX), usize::from));
        // Decoding costs more than answering.
        if round % 16 == 0 {
            Message::from_vec(&buffer).unwrap_or_else(|error| panic!("{error}: {message:?}"));
        }
    }
    assert!(answered > MESSAGES / 4 && forwarded > MESSAGES / 50, "{answered} {forwarded}");
}

#[test]
fn no_upstream_response_causes_a_panic() {
    let mut random = StdRng::seed_from_u64(2);
    let mut seed = query("www.example.com.", RecordType::A);
    for number in 0..3 {
        let address = hickory_proto::rr::RData::A(Ipv4Addr::from(number).into());
        let name = seed.queries[0].name().clone();
        seed.add_answer(hickory_proto::rr::Record::from_rdata(name.clone(), 60, address.clone()));
        seed.add_additional(hickory_proto::rr::Record::from_rdata(name, 60, address));
    }
    let seeds = [with_edns(seed.clone(), 1232).to_vec().unwrap(), seed.to_vec().unwrap()];
    let mut parsed = 0;
    for _ in 0..MESSAGES / 4 {
        let message = message(&mut random, &seeds);
        let Some(end) = wire::question(&message).map(|question| question.end) else { continue };
        if let Some(response) = Response::parse(&message, end) {
            assert!(response.aged(random.random()).len() <= message.len());
            parsed += 1;
        }
    }
    assert!(parsed > MESSAGES / 40, "{parsed}");
}
