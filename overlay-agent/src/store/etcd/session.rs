//! The connection to etcd: one endpoint that works, kept until it fails, then the next. Every request has a time limit.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, ConnectOptions, Error, GetOptions};
use tokio::{sync::Mutex, time::timeout};
use tracing::{debug, warn};

use super::{
    error::{self, EtcdError},
    keys::Keys,
    options::{Endpoint, EtcdOptions},
};

/// Time for a TCP connection and the TLS handshake.
const CONNECT: Duration = Duration::from_secs(3);
/// Time for one request. etcd itself gives up a request after 5 s plus two elections, and says so.
pub(super) const REQUEST: Duration = Duration::from_secs(8);
/// A connection without traffic is tried this often. etcd closes those that try more often than every 5 s.
const PING: Duration = Duration::from_secs(10);
/// A connection that does not answer a try for this long is dead.
const PONG: Duration = Duration::from_secs(5);

/// A stream that has lasted this long is one that works: the next failure is a first one again.
pub(super) const STEADY: Duration = Duration::from_secs(5);

/// What all parts of one store share.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) options: EtcdOptions,
    pub(super) keys: Keys,
    servers: Vec<Endpoint>,
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    client: Option<Client>,
    /// Which connection it is: a late failure of an earlier one must not end this one.
    number: u64,
    /// Index of the server that is tried first.
    next: usize,
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The client's own options hold the password.
        write!(f, "connection {}", self.number)
    }
}

/// A connection, to be handed back when it fails.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    number: u64,
}

impl Session {
    pub(super) fn new(options: EtcdOptions) -> Result<Self, EtcdError> {
        options.check_times()?;
        options.user()?;
        let servers = options.servers()?;
        if servers.iter().any(|server| server.tls) {
            options.tls()?;
        }
        let keys = Keys::new(&options.prefix);
        Ok(Self { options, keys, servers, current: Mutex::default() })
    }

    /// The servers' URLs, for messages.
    pub(super) fn endpoints(&self) -> String {
        self.servers.iter().map(|server| server.url.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// The connection that works, or a new one.
    pub(super) async fn connection(&self) -> Result<Connection, EtcdError> {
        let mut current = self.current.lock().await;
        if let Some(client) = &current.client {
            return Ok(Connection { client: client.clone(), number: current.number });
        }
        let mut refusals = Vec::new();
        for offset in 0..self.servers.len() {
            let index = (current.next + offset) % self.servers.len();
            let Some(server) = self.servers.get(index) else { continue };
            match self.connect(server).await {
                Ok(client) => {
                    debug!("connected to etcd at {}", server.url);
                    *current =
                        Current { client: Some(client.clone()), number: current.number + 1, next: index };
                    return Ok(Connection { client, number: current.number });
                }
                Err(EtcdError::Away { why, .. }) => refusals.push(format!("{}: {why}", server.url)),
                // No other server would say otherwise.
                Err(error) => return Err(error),
            }
        }
        Err(EtcdError::Unreachable { endpoints: self.endpoints(), why: refusals.join("; ") })
    }

    /// Gives a connection up; the next one goes to the next server.
    pub(super) async fn drop_connection(&self, connection: &Connection) {
        let mut current = self.current.lock().await;
        if current.number == connection.number && current.client.take().is_some() {
            current.next = (current.next + 1) % self.servers.len().max(1);
        }
    }

    /// The next request makes a new connection. For when this host has another address: what was sent from the old one
    /// is not answered any more, and only a long silence would tell.
    pub(super) async fn forget_connection(&self) {
        self.current.lock().await.client = None;
    }

    /// One request. An error that another connection may not give ends this one.
    pub(super) async fn request<T, F, Answer>(&self, operation: &str, request: F) -> Result<T, EtcdError>
    where
        F: FnOnce(Client) -> Answer,
        Answer: Future<Output = Result<T, Error>>,
    {
        self.try_request(operation, request).await?.map_err(|error| EtcdError::of(operation, &error))
    }

    /// Like [`Self::request`], for requests of which some errors are answers: those that say nothing about the connection
    /// come back as they are.
    pub(super) async fn try_request<T, F, Answer>(
        &self,
        operation: &str,
        request: F,
    ) -> Result<Result<T, Error>, EtcdError>
    where
        F: FnOnce(Client) -> Answer,
        Answer: Future<Output = Result<T, Error>>,
    {
        let connection = self.connection().await?;
        match timeout(REQUEST, request(connection.client.clone())).await {
            Ok(Ok(answer)) => Ok(Ok(answer)),
            Ok(Err(error)) if error::is_no_lease(&error) || !error::breaks_connection(&error) => {
                Ok(Err(error))
            }
            Ok(Err(error)) => {
                self.drop_connection(&connection).await;
                Err(EtcdError::of(operation, &error))
            }
            Err(_) => {
                self.drop_connection(&connection).await;
                Err(EtcdError::Away {
                    operation: operation.to_owned(),
                    why: format!("no answer within {} s", REQUEST.as_secs()),
                })
            }
        }
    }

    async fn connect(&self, server: &Endpoint) -> Result<Client, EtcdError> {
        let operation = format!("connect to etcd at {}", server.url);
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(PING, PONG)
            // etcd ends connections that are tried while nothing is asked on them.
            .with_keep_alive_while_idle(false)
            // A member cut off from the others would serve old records and never say that they are old.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if server.tls {
            options = options.with_tls(self.options.tls()?);
        }
        let attempt = async {
            let mut client = match self.options.user()? {
                Some((user, password)) => {
                    match Client::connect([&server.url], Some(options.clone().with_user(user, password)))
                        .await
                    {
                        Err(error) if error::is_without_users(&error) => {
                            warn!(
                                "etcd at {} runs without users: going on without --etcd-username",
                                server.url
                            );
                            Client::connect([&server.url], Some(options)).await
                        }
                        result => result,
                    }
                }
                None => Client::connect([&server.url], Some(options)).await,
            }
            .map_err(|error| EtcdError::of(&operation, &error))?;
            // The client connects at the first request. What it may read shows when it is asked for more than this.
            let probe = client.get(self.keys.config(), Some(GetOptions::new().with_count_only())).await;
            match probe {
                Err(error) if error::is_away(&error) => Err(EtcdError::of(&operation, &error)),
                _ => Ok(client),
            }
        };
        timeout(CONNECT + REQUEST, attempt).await.unwrap_or_else(|_| {
            Err(EtcdError::Away {
                operation: operation.clone(),
                why: format!("no answer within {} s", (CONNECT + REQUEST).as_secs()),
            })
        })
    }
}

/// Pauses between attempts: short at first, never long, and not in step with other hosts that wait for the same etcd.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    const SHORTEST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(5);

    /// The next attempt is the first again.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// How long to wait before the next attempt.
    pub(super) fn next(&mut self) -> Duration {
        let pause = Self::SHORTEST.saturating_mul(1 << self.failures.min(10)).min(Self::LONGEST);
        self.failures += 1;
        pause.mul_f64(rand::random_range(0.5..=1.0))
    }
}

/// A session that several tasks use.
pub(super) type Shared = Arc<Session>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_start_short_again() {
        let mut backoff = Backoff::default();
        assert!(backoff.next() <= Backoff::SHORTEST);
        for _ in 0..40 {
            assert!(backoff.next() <= Backoff::LONGEST);
        }
        assert!(backoff.next() >= Backoff::LONGEST / 2);
        backoff.reset();
        assert!(backoff.next() <= Backoff::SHORTEST);
    }
}
