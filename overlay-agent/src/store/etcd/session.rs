//! The connection to etcd: one endpoint that works, kept until it fails, then the next. Every request has a time limit.

use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error, GetOptions};
use tokio::{sync::Mutex, time::timeout};
use tracing::{debug, warn};

use super::{
    error,
    keys::Keys,
    options::{Endpoint, EtcdOptions},
};
use crate::store::StoreError;

/// Time for a TCP connection and the TLS handshake.
const CONNECT: Duration = Duration::from_secs(3);
/// Time for one request. etcd itself gives up a request after 5 s plus two elections, and says so.
pub(super) const REQUEST: Duration = Duration::from_secs(8);
/// Interval of HTTP/2 pings on a connection without traffic. etcd closes connections that ping more often than every 5 s.
const PING: Duration = Duration::from_secs(10);
/// A connection that does not answer a ping for this long is dead.
const PONG: Duration = Duration::from_secs(5);

/// One network in etcd: options, keys and the current connection.
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
    /// Counts connections: a late failure of an earlier one must not end this one.
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

/// A connection, to be passed to [`Session::drop_connection`] when it fails.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    number: u64,
}

impl Session {
    pub(super) fn new(options: EtcdOptions) -> Result<Self, StoreError> {
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
    pub(super) async fn connection(&self) -> Result<Connection, StoreError> {
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
                Err(StoreError::Away { why, .. }) => refusals.push(format!("{}: {why}", server.url)),
                // The other servers would answer the same.
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::Unreachable { endpoints: self.endpoints(), why: refusals.join("; ") })
    }

    /// Gives up a connection that failed; the next one goes to the next server.
    pub(super) async fn drop_connection(&self, connection: &Connection) {
        let mut current = self.current.lock().await;
        if current.number == connection.number && current.client.take().is_some() {
            current.next = (current.next + 1) % self.servers.len().max(1);
        }
    }

    /// The next request opens a new connection. For a host whose address changed: packets to the old one no longer arrive,
    /// and only a long timeout would show it.
    pub(super) async fn forget_connection(&self) {
        self.current.lock().await.client = None;
    }

    /// Sends one request. An error that another connection may not give ends this one.
    pub(super) async fn request<T, F, Answer>(&self, operation: &str, request: F) -> Result<T, StoreError>
    where
        F: FnOnce(Client) -> Answer,
        Answer: Future<Output = Result<T, Error>>,
    {
        self.try_request(operation, request).await?.map_err(|error| error::store_error(operation, &error))
    }

    /// Like [`Self::request`], for requests of which some errors are answers: errors that do not concern the connection are
    /// returned as they are.
    pub(super) async fn try_request<T, F, Answer>(
        &self,
        operation: &str,
        request: F,
    ) -> Result<Result<T, Error>, StoreError>
    where
        F: FnOnce(Client) -> Answer,
        Answer: Future<Output = Result<T, Error>>,
    {
        let connection = self.connection().await?;
        match timeout(REQUEST, request(connection.client.clone())).await {
            Ok(Ok(answer)) => Ok(Ok(answer)),
            Ok(Err(error)) if !error::breaks_connection(&error) => Ok(Err(error)),
            Ok(Err(error)) => {
                self.drop_connection(&connection).await;
                Err(error::store_error(operation, &error))
            }
            Err(_) => {
                self.drop_connection(&connection).await;
                Err(StoreError::Away {
                    operation: operation.to_owned(),
                    why: format!("no answer within {} s", REQUEST.as_secs()),
                })
            }
        }
    }

    async fn connect(&self, server: &Endpoint) -> Result<Client, StoreError> {
        let operation = format!("connect to etcd at {}", server.url);
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(PING, PONG)
            // etcd closes connections that ping while no request is open.
            .with_keep_alive_while_idle(false)
            // A member cut off from the others would serve stale records.
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
                            warn!("etcd at {} runs without users: --etcd-username is ignored", server.url);
                            Client::connect([&server.url], Some(options)).await
                        }
                        result => result,
                    }
                }
                None => Client::connect([&server.url], Some(options)).await,
            }
            .map_err(|error| error::store_error(&operation, &error))?;
            // The client connects at the first request. Missing rights show at the requests that need them.
            let probe = client.get(self.keys.full("config"), Some(GetOptions::new().with_count_only())).await;
            match probe {
                Err(error) if error::is_away(&error) => Err(error::store_error(&operation, &error)),
                _ => Ok(client),
            }
        };
        timeout(CONNECT + REQUEST, attempt).await.unwrap_or_else(|_| {
            Err(StoreError::Away {
                operation: operation.clone(),
                why: format!("no answer within {} s", (CONNECT + REQUEST).as_secs()),
            })
        })
    }
}
