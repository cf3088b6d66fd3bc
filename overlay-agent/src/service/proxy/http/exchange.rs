//! A request and its response.

use std::{error::Error as _, fmt, io, sync::Arc, time::Duration};

use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{HeaderMap, HeaderName},
    http::response,
    upgrade::{self, OnUpgrade},
};
use tokio::select;
use tracing::debug;

use super::{
    super::{
        balancer::{Choice, Table, VirtualPort},
        counters::Opened,
        endpoint::Endpoint,
        header::tcp_over_ipv4,
    },
    body::{ReplyBody, RequestBody},
    client::Client,
    head::{Host, Length, to_client, to_endpoint, wanted_upgrade},
    outgoing::Outgoing,
    pool::Connection,
    reply::Refusal,
    target::Found,
    tunnel::Tunnel,
};

/// A request that cannot be sent again takes no connection that has waited for longer: the endpoint may be about to close it. Servers that
/// close after a short time do so after 2 s (gunicorn) or 5 s (Apache, Node.js).
const FRESH: Duration = Duration::from_secs(1);

/// Passes a request on, and its response back.
pub(super) async fn exchange(mut request: Request<Incoming>, client: &Client) -> Response<ReplyBody> {
    let table = client.port.table();
    let upgrade = upgrade::on(&mut request);
    let (head, body) = request.into_parts();
    let found = Host::of(&head).and_then(|host| {
        let service = &table.service;
        match client.shared.find_target(&client.port, &table, host.name(), head.uri.path()) {
            Found::Port(port) => Ok((port, host)),
            Found::NoRoute => {
                let reason = format!("{service} has no route for this request, and no endpoints");
                Err(Refusal::new(StatusCode::NOT_FOUND, reason))
            }
            Found::Missing(target) => {
                let reason = format!("a route of {service} leads to {target}, which is missing");
                Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, reason))
            }
        }
    });
    let (tally, answered) = match found {
        Ok((port, host)) => {
            let tally = Arc::clone(&port.table().tally);
            tally.http().count_request();
            let passing = Passing { client, port: &port, upgrade: Some(upgrade) };
            (tally, passing.run(Request::from_parts(head, body), &host).await)
        }
        Err(refusal) => {
            table.tally.http().count_request();
            (Arc::clone(&table.tally), Err(refusal))
        }
    };
    let response = answered.unwrap_or_else(|refusal| {
        if refusal.status.is_server_error() && refusal.status != StatusCode::NOT_IMPLEMENTED {
            tally.http().count_failure();
        }
        refusal.into_response()
    });
    tally.http().count_status(response.status());
    response
}

/// A request on its way to the endpoints of a port.
struct Passing<'a> {
    client: &'a Client,
    port: &'a VirtualPort,
    /// The client's side of a tunnel.
    upgrade: Option<OnUpgrade>,
}

/// A response, and the connection on which its body follows.
struct Answer {
    response: Response<Incoming>,
    connection: Connection,
    opened: Arc<Opened>,
}

/// Why an endpoint has not answered.
#[derive(Debug)]
enum Failure {
    /// No connection.
    Connect(io::Error),
    /// The connection ended before a response.
    Lost(hyper::Error),
    /// The client's body ended with an error.
    Body(hyper::Error),
    /// It took too long.
    Late,
}

impl Passing<'_> {
    async fn run(mut self, request: Request<Incoming>, host: &Host) -> Result<Response<ReplyBody>, Refusal> {
        let Client { peer, shared, .. } = self.client;
        let (mut head, body) = request.into_parts();
        let body = RequestBody::new(body);
        let wants_upgrade = wanted_upgrade(&head).is_some();
        let is_head = head.method == Method::HEAD;
        let hash_key = self.port.table().http.as_ref().and_then(|http| http.hash_key.clone());
        let key = hash_key.and_then(|name| key(&head.headers, &name));
        to_endpoint(&mut head, host, *peer.ip(), &self.client.port.address.to_string(), Length::of(&body));
        let mut outgoing = Outgoing::new(head, body);

        let choice = match key {
            Some(key) => self.port.choose_by_key(key, shared),
            None => self.port.choose(*peer.ip(), shared),
        };
        let Some(mut choice) = choice else {
            let table = self.port.table();
            table.tally.count_failure();
            let reason = format!("no endpoint of {} takes requests", table.service);
            return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, reason));
        };
        let failure = match self.ask(&mut choice, &mut outgoing).await {
            Ok(answer) => {
                let endpoint = &answer.connection.endpoint;
                if choice.is_substitute() && key.is_none() {
                    self.port.keep(*peer.ip(), &choice.table, endpoint.address, shared);
                }
                return self.deliver(answer, wants_upgrade, is_head, &choice.table);
            }
            Err(failure) => failure,
        };
        let service = &choice.table.service;
        if matches!(failure, Failure::Body(_)) {
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "the body of the request cannot be read"));
        }
        choice.table.tally.count_failure();
        let status = match failure.is_late() {
            true => StatusCode::GATEWAY_TIMEOUT,
            false => StatusCode::BAD_GATEWAY,
        };
        Err(Refusal::new(status, format!("no endpoint of {service} answers: {failure}")))
    }

    /// Asks the chosen endpoint, and others as long as the request can be sent again.
    async fn ask(&self, choice: &mut Choice, outgoing: &mut Outgoing) -> Result<Answer, Failure> {
        let mut failure = None;
        while outgoing.can_be_sent()
            && let Some(endpoint) = choice.next()
        {
            if failure.is_some() {
                choice.table.tally.http().count_retry();
            }
            match self.ask_endpoint(&endpoint, outgoing, &choice.table).await {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    debug!(service = %choice.table.service, endpoint = %endpoint.address, %error, "request failed");
                    let is_last = matches!(error, Failure::Late | Failure::Body(_));
                    failure = Some(error);
                    if is_last {
                        break;
                    }
                }
            }
        }
        let missing = || Failure::Connect(io::ErrorKind::NotFound.into());
        Err(failure.unwrap_or_else(missing))
    }

    /// Asks over a connection that waits, and over a new one when that has ended meanwhile.
    async fn ask_endpoint(
        &self,
        endpoint: &Arc<Endpoint>,
        outgoing: &mut Outgoing,
        table: &Table,
    ) -> Result<Answer, Failure> {
        let Client { peer, shared, .. } = self.client;
        let opened = Arc::new(Opened::new(&table.tally, &endpoint.tally));
        let longest = match outgoing {
            Outgoing::Repeatable(_) => Duration::MAX,
            Outgoing::Once(_) => FRESH,
        };
        let reused = (!table.proxy_protocol).then(|| Connection::reuse(endpoint, longest, shared)).flatten();
        if let Some(connection) = reused {
            match self.send(connection, outgoing, &opened).await {
                Err(Failure::Lost(_)) if outgoing.can_be_sent() => table.tally.http().count_retry(),
                answered => return answered,
            }
        }
        let header = table.proxy_protocol.then(|| tcp_over_ipv4(*peer, self.client.port.address));
        let header = header.as_ref().map(<[u8; _]>::as_slice);
        let connection = Connection::open(endpoint, header, shared).await.map_err(|error| {
            endpoint.tally.count_failure();
            Failure::Connect(error)
        })?;
        opened.count_connection();
        let answered = self.send(connection, outgoing, &opened).await;
        if matches!(answered, Err(Failure::Lost(_))) {
            endpoint.tally.count_failure();
        }
        answered
    }

    async fn send(
        &self,
        mut connection: Connection,
        outgoing: &mut Outgoing,
        opened: &Arc<Opened>,
    ) -> Result<Answer, Failure> {
        let Some(request) = outgoing.take(opened) else {
            return Err(Failure::Connect(io::ErrorKind::InvalidInput.into()));
        };
        let Client { state, port, shared, .. } = self.client;
        let limit = shared.options.http.response_timeout;
        let sent = select! {
            sent = connection.sender.try_send_request(request) => sent,
            () = state.activity.limits(limit, port.reset_time()) => return Err(Failure::Late),
        };
        match sent {
            Ok(response) => Ok(Answer { response, connection, opened: Arc::clone(opened) }),
            Err(mut error) => {
                if let Some(request) = error.take_message() {
                    outgoing.put_back(request);
                }
                let error = error.into_error();
                // hyper calls an error of the body one of its user, and one whose cause is an error of the client's connection.
                let is_of_body =
                    error.is_user() && error.source().is_some_and(|cause| cause.is::<hyper::Error>());
                Err(if is_of_body { Failure::Body(error) } else { Failure::Lost(error) })
            }
        }
    }

    /// The response as the client gets it.
    fn deliver(
        &mut self,
        answer: Answer,
        wants_upgrade: bool,
        is_head: bool,
        table: &Table,
    ) -> Result<Response<ReplyBody>, Refusal> {
        let Answer { mut response, connection, opened } = answer;
        let is_switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let bad = |what: &str| {
            let reason = format!("an endpoint of {} answers with {what}", table.service);
            Refusal::new(StatusCode::BAD_GATEWAY, reason)
        };
        if is_switching && !wants_upgrade {
            return Err(bad("another protocol, which the request does not ask for"));
        }
        let server = upgrade::on(&mut response);
        let (mut head, body) = response.into_parts();
        let length = if is_head { Length::Empty } else { Length::of(&body) };
        to_client(&mut head, length).map_err(bad)?;
        keep_reason(&mut head);
        if is_switching && let Some(client) = self.upgrade.take() {
            let endpoint = Arc::clone(&connection.endpoint);
            self.client.state.set_tunnel(Tunnel { client, server, opened, endpoint });
            return Ok(Response::from_parts(head, ReplyBody::Text(None)));
        }
        Ok(Response::from_parts(head, ReplyBody::relayed(body, opened, connection)))
    }
}

/// Of hyper's notes about a response, only the words behind the status code are for the client.
fn keep_reason(head: &mut response::Parts) {
    let reason = head.extensions.remove::<hyper::ext::ReasonPhrase>();
    head.extensions.clear();
    reason.map(|reason| head.extensions.insert(reason));
}

/// A number for the choice of an endpoint, the same on all nodes: FNV-1a of the header's first value.
fn key(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    Some(headers.get(name)?.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, fold))
}

impl Failure {
    fn is_late(&self) -> bool {
        match self {
            Self::Connect(error) => error.kind() == io::ErrorKind::TimedOut,
            Self::Lost(_) | Self::Body(_) => false,
            Self::Late => true,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "no connection ({error})"),
            Self::Lost(error) => write!(f, "the connection ended without a response ({error})"),
            Self::Body(error) => write!(f, "the request's body failed ({error})"),
            Self::Late => f.write_str("no response in time"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_the_published_values_of_the_hash() {
        let mut headers = HeaderMap::new();
        let name = HeaderName::from_static("x-user");
        assert_eq!(key(&headers, &name), None);
        // Of the test suite by Landon Curt Noll: "", "a", "foobar".
        for (text, expected) in
            [("", 0xcbf2_9ce4_8422_2325), ("a", 0xaf63_dc4c_8601_ec8c), ("foobar", 0x8594_4171_f739_67e8)]
        {
            headers.insert(&name, text.parse().unwrap());
            assert_eq!(key(&headers, &name), Some(expected), "{text}");
        }
    }
}
