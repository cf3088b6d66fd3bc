//! The connection to etcd: one endpoint that works, kept until it fails, then the next. Every request has a time limit.

use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error, GetOptions};
use tokio::{sync::Mutex, time::timeout};
use tracing::{debug, warn};

use super::{
    Etcd,
    error::{is_without_users, store_error},
    keys::Keys,
    options::{EtcdOptions, is_tls},
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

/// The current connection, if there is one.
#[derive(Default)]
pub(super) struct Current {
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

/// A connection, to be passed to [`Etcd::drop_connection`] when it fails.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    number: u64,
}

impl Etcd {
    /// Connects to the first endpoint that answers.
    pub(in crate::store) async fn connect(options: EtcdOptions) -> Result<Self, StoreError> {
        options.check_times()?;
        options.user()?;
        let servers = options.servers()?;
        if servers.iter().any(|url| is_tls(url)) {
            options.tls()?;
        }
        let etcd = Self { keys: Keys::new(&options.prefix), options, servers, current: Mutex::default() };
        etcd.connection().await?;
        Ok(etcd)
    }

    /// The servers' URLs, for messages.
    pub(in crate::store) fn endpoints(&self) -> String {
        self.servers.join(", ")
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
            let Some(url) = self.servers.get(index) else { continue };
            match self.connect_to(url).await {
                Ok(client) => {
                    debug!("connected to etcd at {url}");
                    *current =
                        Current { client: Some(client.clone()), number: current.number + 1, next: index };
                    return Ok(Connection { client, number: current.number });
                }
                Err(StoreError::Away { why, .. }) => refusals.push(format!("{url}: {why}")),
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
    pub(in crate::store) async fn forget_connection(&self) {
        self.current.lock().await.client = None;
    }

    /// Sends one request. An error that another connection may not give ends this one.
    pub(super) async fn request<T>(
        &self,
        operation: &str,
        request: impl AsyncFnOnce(Client) -> Result<T, Error>,
    ) -> Result<T, StoreError> {
        self.try_request(operation, request).await?.map_err(|error| store_error(operation, &error))
    }

    /// Like [`Self::request`], for requests of which some errors are answers: errors that do not concern the connection are
    /// returned as they are.
    pub(super) async fn try_request<T>(
        &self,
        operation: &str,
        request: impl AsyncFnOnce(Client) -> Result<T, Error>,
    ) -> Result<Result<T, Error>, StoreError> {
        let connection = self.connection().await?;
        let failure = match in_time(operation, REQUEST, request(connection.client.clone())).await {
            Ok(Ok(answer)) => return Ok(Ok(answer)),
            Ok(Err(error)) => {
                let failure = store_error(operation, &error);
                if matches!(failure, StoreError::Failed { .. }) {
                    return Ok(Err(error));
                }
                failure
            }
            Err(late) => late,
        };
        self.drop_connection(&connection).await;
        Err(failure)
    }

    async fn connect_to(&self, url: &str) -> Result<Client, StoreError> {
        let operation = format!("connect to etcd at {url}");
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(PING, PONG)
            // etcd closes connections that ping while no request is open.
            .with_keep_alive_while_idle(false)
            // A member cut off from the others would serve stale records.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if is_tls(url) {
            options = options.with_tls(self.options.tls()?);
        }
        let login = match self.options.user()? {
            Some((user, password)) => options.clone().with_user(user, password),
            None => options.clone(),
        };
        let attempt = async {
            let mut connected = Client::connect([url], Some(login)).await;
            if connected.as_ref().is_err_and(is_without_users) {
                warn!("etcd at {url} runs without users: --etcd-username is ignored");
                connected = Client::connect([url], Some(options)).await;
            }
            let mut client = connected.map_err(|error| store_error(&operation, &error))?;
            // The client connects at the first request. Missing rights show at the requests that need them.
            let probe = client.get(self.keys.full("config"), Some(GetOptions::new().with_count_only())).await;
            match probe.map_err(|error| store_error(&operation, &error)) {
                Err(away @ StoreError::Away { .. }) => Err(away),
                _ => Ok(client),
            }
        };
        in_time(&operation, CONNECT + REQUEST, attempt).await?
    }
}

/// The outcome of `request`, if it comes within the time limit.
pub(super) async fn in_time<T>(
    operation: &str,
    limit: Duration,
    request: impl Future<Output = T>,
) -> Result<T, StoreError> {
    timeout(limit, request)
        .await
        .map_err(|_| StoreError::away(operation, format!("no answer within {} s", limit.as_secs())))
}
