//! What is answered to a message. Pure.
//!
//! A message that is a response, or shorter than a header, is never answered: two servers would answer each other without end.

use hickory_proto::{
    op::{Edns, Header, Message, MessageType, OpCode, ResponseCode},
    rr::{DNSClass, RecordType},
    serialize::binary::{BinDecodable, BinDecoder, BinEncodable, BinEncoder},
};

use super::{
    records::{Found, Records},
    wire,
};

/// The size of answers over UDP that every client takes (RFC 1035 section 2.3.4).
const PLAIN_UDP: u16 = 512;
/// The EDNS version of this server (RFC 6891 section 6.1.3).
const EDNS_VERSION: u8 = 0;
/// Of a record in a response, the bytes in front of the OPT record's payload size: the root name and the type.
const OPT_START: [u8; 3] = [0, 0, wire::OPT as u8];

/// What to do about a message.
#[derive(Debug)]
pub enum Answer {
    /// Nothing: it is no query.
    None,
    /// Send this.
    Reply(Reply),
    /// Ask an upstream server.
    Forward(Question),
}

/// A response of this server.
#[derive(Debug)]
pub struct Reply {
    /// The response. Its OPT record, if it has one, has the payload size of the client.
    message: Message,
    /// The largest response over UDP that the client takes, in bytes.
    client_limit: u16,
}

/// A question for upstream servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The client's identifier of the query.
    pub(super) id: u16,
    /// Name, type and class as they are on the wire, in the case of the client.
    pub(super) bytes: Vec<u8>,
    /// The client checks signatures itself (RFC 4035 section 3.2.2).
    pub(super) checking_disabled: bool,
    /// The client understands the AD bit (RFC 6840 section 5.7).
    pub(super) wants_authentic: bool,
    /// The client's EDNS, if it has it: whether it wants DNSSEC records.
    pub(super) edns: Option<bool>,
    client_limit: u16,
}

/// Decides about a message.
pub fn answer(query: &[u8], records: &Records) -> Answer {
    // A header has no invalid values, so this fails for too few bytes only.
    let Ok(header) = Header::read(&mut BinDecoder::new(query)) else { return Answer::None };
    if header.message_type == MessageType::Response {
        return Answer::None;
    }
    let error = |code| Answer::Reply(Reply::error(&header, code));
    if header.op_code != OpCode::Query {
        return error(ResponseCode::NotImp);
    }
    // RFC 9619: exactly one question. None is for cookies (RFC 7873), which this server does not have.
    if header.counts.queries != 1 {
        return error(ResponseCode::FormErr);
    }
    let (Some(question), Ok(message)) = (wire::question(query), Message::from_vec(query)) else {
        return error(ResponseCode::FormErr);
    };
    let Some(asked) = message.queries.first() else { return error(ResponseCode::FormErr) };
    let client_limit = message.edns.as_ref().map_or(PLAIN_UDP, |edns| edns.max_payload().max(PLAIN_UDP));
    let reply = || {
        let mut response = Message::response(header.id, OpCode::Query);
        response.metadata.recursion_desired = header.recursion_desired;
        response.metadata.recursion_available = true;
        response.metadata.checking_disabled = header.checking_disabled;
        response.add_query(asked.clone());
        response.edns = message.edns.as_ref().map(|edns| {
            let mut own = Edns::new();
            own.set_version(EDNS_VERSION).set_dnssec_ok(edns.flags().dnssec_ok);
            own
        });
        Reply { message: response, client_limit }
    };
    let refuse = |code| Answer::Reply(reply().with_code(code));
    if message.edns.as_ref().is_some_and(|edns| edns.version() > EDNS_VERSION) {
        return refuse(ResponseCode::BADVERS);
    }
    if asked.query_class != DNSClass::IN && asked.query_class != DNSClass::ANY {
        return refuse(ResponseCode::Refused);
    }
    // Transfers of zones, of which this server has none.
    if [RecordType::AXFR, RecordType::IXFR].contains(&asked.query_type) {
        return refuse(ResponseCode::Refused);
    }
    let found = records.find(&asked.name, asked.query_type, usize::from(header.id));
    let negative = |code, apex| {
        let mut reply = reply().with_code(code).authoritative();
        reply.message.add_authority(records.zone().soa(&apex));
        Answer::Reply(reply)
    };
    match found {
        Found::Records { answers, additionals } => {
            let mut reply = reply().authoritative();
            reply.message.insert_answers(answers);
            reply.message.insert_additionals(additionals);
            Answer::Reply(reply)
        }
        Found::NoData { apex } => negative(ResponseCode::NoError, apex),
        Found::NoName { apex } => negative(ResponseCode::NXDomain, apex),
        // Without the wish for recursion, the client asks for what this server has itself.
        Found::Outside if !header.recursion_desired => refuse(ResponseCode::Refused),
        Found::Outside => Answer::Forward(Question {
            id: header.id,
            bytes: query.get(question).unwrap_or_default().to_vec(),
            checking_disabled: header.checking_disabled,
            wants_authentic: header.authentic_data,
            edns: message.edns.as_ref().map(|edns| edns.flags().dnssec_ok),
            client_limit,
        }),
    }
}

impl Reply {
    /// A response without a question, to a query that cannot be read.
    fn error(header: &Header, code: ResponseCode) -> Self {
        let mut message = Message::error_msg(header.id, header.op_code, code);
        message.metadata.recursion_desired = header.recursion_desired;
        Self { message, client_limit: PLAIN_UDP }
    }

    fn with_code(mut self, code: ResponseCode) -> Self {
        self.message.metadata.response_code = code;
        self
    }

    fn authoritative(mut self) -> Self {
        self.message.metadata.authoritative = true;
        self
    }

    /// The message.
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// Whether the same query has the same response as long as the records are the same, and asks for a name that exists. The order of
    /// several records depends on the query's identifier, and of names that do not exist there is no end.
    pub(super) fn is_stable(&self) -> bool {
        self.message.metadata.response_code == ResponseCode::NoError && self.message.answers.len() <= 1
    }

    /// Writes the response into `buffer` and returns whether it is truncated. `udp_payload` is the largest datagram that this server
    /// sends, in bytes; `None` is for TCP. Addresses of other names are left out first, which is no truncation (RFC 2181 section 9).
    /// When it cannot be encoded, `buffer` is empty.
    pub fn encode(mut self, udp_payload: Option<u16>, buffer: &mut Vec<u8>) -> bool {
        let limit = udp_payload.map_or(u16::MAX, |own| self.client_limit.min(own));
        if let Some(edns) = &mut self.message.edns {
            edns.set_max_payload(udp_payload.unwrap_or(super::DEFAULT_UDP_PAYLOAD));
        }
        if write(&self.message, limit, buffer) {
            return false;
        }
        self.message.additionals.clear();
        if write(&self.message, limit, buffer) {
            return false;
        }
        if !write(&self.message.truncate(), limit, buffer) {
            buffer.clear();
        }
        true
    }
}

/// Encodes a message. `false` when it is longer than `limit`.
fn write(message: &Message, limit: u16, buffer: &mut Vec<u8>) -> bool {
    buffer.clear();
    let mut encoder = BinEncoder::new(buffer);
    encoder.set_max_size(u16::MAX);
    let encoded = message.emit(&mut encoder).is_ok();
    // The encoder leaves out what exceeds its own limit, and says so in the header.
    let is_whole = message.metadata.truncation || buffer.get(2).is_some_and(|flags| flags & 2 == 0);
    encoded && is_whole && buffer.len() <= usize::from(limit)
}

impl Question {
    /// What the answer depends on: the question in lower case, and the bits that change the records in it.
    pub fn key(&self) -> Box<[u8]> {
        let flags = u8::from(self.checking_disabled) << 1 | u8::from(self.edns == Some(true));
        let (name, rest) = self.bytes.split_at(self.bytes.len().saturating_sub(4));
        let name = name.iter().map(u8::to_ascii_lowercase);
        name.chain(rest.iter().copied()).chain([flags]).collect()
    }

    /// The query for an upstream server, as bytes.
    pub fn query(&self, id: u16, with_edns: bool) -> Vec<u8> {
        let [high, low] = id.to_be_bytes();
        let flags = u8::from(self.wants_authentic) << 5 | u8::from(self.checking_disabled) << 4;
        let mut query = vec![high, low, 1, flags, 0, 1, 0, 0, 0, 0, 0, u8::from(with_edns)];
        query.extend_from_slice(&self.bytes);
        if with_edns {
            query.extend_from_slice(&opt(super::DEFAULT_UDP_PAYLOAD, self.edns == Some(true)));
        }
        query
    }

    /// The response that no upstream server has answered.
    pub fn failure(&self, code: ResponseCode, buffer: &mut Vec<u8>) {
        self.respond(&[0, 0, 0x81, 0x80 | code.low(), 0, 1, 0, 0, 0, 0, 0, 0], Some(PLAIN_UDP), buffer);
    }

    /// Finishes a response: `message` is one to this question without an OPT record. Returns whether it is truncated, because it is
    /// longer than what the client takes, and this server sends: `udp_payload` bytes; `None` is for TCP.
    pub fn respond(&self, message: &[u8], udp_payload: Option<u16>, buffer: &mut Vec<u8>) -> bool {
        let question_end = wire::HEADER + self.bytes.len();
        let limit = udp_payload.map_or(usize::from(u16::MAX), |own| usize::from(self.client_limit.min(own)));
        let opt =
            self.edns.map(|dnssec_ok| opt(udp_payload.unwrap_or(super::DEFAULT_UDP_PAYLOAD), dnssec_ok));
        let opt = opt.as_ref().map_or(&[][..], |opt| opt);
        buffer.clear();
        buffer.extend_from_slice(message);
        let is_truncated = buffer.len() + opt.len() > limit;
        if is_truncated || buffer.len() < question_end {
            buffer.resize(question_end, 0);
            wire::put(buffer, 6, &[0; 6]);
        }
        wire::put(buffer, 0, &self.id.to_be_bytes());
        wire::put(buffer, wire::HEADER, &self.bytes);
        let authentic = if self.wants_authentic || self.edns == Some(true) { 0x20 } else { 0 };
        if let Some([high, low]) = buffer.get_mut(2..4) {
            // QR and RD are set; AA is not, because the records come from elsewhere.
            *high = 0x81 | u8::from(is_truncated) << 1;
            *low = 0x80 | (*low & authentic) | u8::from(self.checking_disabled) << 4 | (*low & 0xf);
        }
        if !opt.is_empty() {
            let count = wire::u16_at(buffer, 10).unwrap_or(0).saturating_add(1);
            wire::put(buffer, 10, &count.to_be_bytes());
            buffer.extend_from_slice(opt);
        }
        is_truncated
    }
}

/// An OPT record (RFC 6891 section 6.1.2).
fn opt(payload: u16, dnssec_ok: bool) -> [u8; 11] {
    let [high, low] = payload.to_be_bytes();
    let [root, kind_high, kind_low] = OPT_START;
    [root, kind_high, kind_low, high, low, 0, EDNS_VERSION, u8::from(dnssec_ok) << 7, 0, 0, 0]
}
