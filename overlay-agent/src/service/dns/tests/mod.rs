//! Tests of the DNS server: `answers` of the decisions, `generated` of malformed messages, `sockets` of the server with clients and
//! upstream servers on loopback.

mod answers;
mod generated;
mod sockets;
mod upstream;

use std::sync::Arc;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query},
    rr::{Name, RData, RecordType},
};

use super::{Records, Zone};
use crate::service::{Catalog, catalog::tests::records};

/// Services with a virtual address, without one yet, headless, headless with all endpoints down, and without endpoints.
fn catalog() -> Catalog {
    let ports = r#""ports":[{"name":"http","port":80,"protocol":"tcp","target_port":8080},{"name":"dns","port":53,"protocol":"udp"}]"#;
    let plain = format!(r#"{{"v":1,{ports}}}"#);
    let headless = format!(r#"{{"v":1,"headless":true,{ports}}}"#);
    Catalog::new(
        &records(&[
            ("shop/web", &plain),
            ("shop/late", &plain),
            ("data/db", &headless),
            ("data/down", &headless),
            ("data/empty", &headless),
        ]),
        &records(&[("10.251.0.9", "shop/web")]),
        &records(&[
            ("shop/web/node-a/1", r#"{"overlay_ip":"10.244.1.2"}"#),
            ("data/db/node-a/1", r#"{"overlay_ip":"10.244.1.3","weight":3}"#),
            ("data/db/node-b/1", r#"{"overlay_ip":"10.244.2.3","ports":{"http":9090}}"#),
            ("data/db/node-b/2", r#"{"overlay_ip":"10.244.2.4","state":"draining"}"#),
            ("data/db/node-c/1", r#"{"overlay_ip":"10.244.3.4","state":"down"}"#),
            ("data/db/node-c/2", r#"{"overlay_ip":"10.244.3.5","weight":0}"#),
            ("data/down/node-a/1", r#"{"overlay_ip":"10.244.1.7","state":"down"}"#),
        ]),
        &Catalog::default(),
    )
}

fn zone() -> Zone {
    Zone::new("overlay").unwrap().with_reverse(vec!["10.251.0.0/16".parse().unwrap()])
}

fn zone_records() -> Records {
    Records::new(Arc::new(zone()), Arc::new(catalog()))
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn with_edns(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    message.set_edns(edns);
    message
}

/// The data of records as text, each behind its TTL.
fn texts(records: &[hickory_proto::rr::Record]) -> Vec<String> {
    records.iter().map(|record| format!("{} {}", record.ttl, text(&record.data))).collect()
}

fn text(data: &RData) -> String {
    data.to_string()
}
