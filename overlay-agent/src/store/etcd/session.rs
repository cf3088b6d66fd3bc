//! The connection to etcd: one endpoint that works, kept until it fails, then the next. Every request has a time limit.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use etcd_client::{Channel, Client, ConnectOptions, Error, GetOptions};
use tokio::{sync::Mutex, time::timeout};
use tracing::{debug, warn};

use super::{
    Etcd,
    connector::{CONNECT, Connector},
    error::{is_no_etcd, is_without_right, is_without_users, store_error},
    keys::Keys,
    options::EtcdOptions,
    server::Server,
    tls::Tls,
};
use crate::store::{StoreError, archive::Identity};

/// Time for one request. etcd itself gives up a request after 5 s plus two elections, and says so.
pub(super) const REQUEST: Duration = Duration::from_secs(8);

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
    /// No connection yet. The endpoint that is tried first is a random one: the agents of a network spread over the servers.
    /// Fails when the options cannot be used.
    pub(in crate::store) fn new(options: EtcdOptions) -> Result<Self, StoreError> {
        options.check_times()?;
        options.user()?;
        let servers = options.servers()?;
        let tls_files = options.tls_files()?;
        if servers.iter().any(Server::is_tls) {
            Tls::load(&tls_files)?;
        }
        let next = rand::random_range(0..servers.len().max(1));
        let current = Mutex::new(Current { next, ..Current::default() });
        let (keys, warned_of_users) = (Keys::new(&options.prefix), AtomicBool::new(false));
        Ok(Self { keys, options, servers, current, warned_of_users })
    }

    /// Connects to an endpoint that answers, unless there is a connection.
    pub(in crate::store) async fn reach(&self) -> Result<(), StoreError> {
        self.connection().await.map(drop)
    }

    /// What the records on disk belong to.
    pub(in crate::store) fn identity(&self) -> Identity {
        let endpoints = self.servers.iter().map(Server::to_string).collect();
        Identity { prefix: self.keys.location(""), endpoints }
    }

    /// The servers' URLs, for messages.
    pub(in crate::store) fn endpoints(&self) -> String {
        self.servers.iter().map(Server::to_string).collect::<Vec<_>>().join(", ")
    }

    /// The connection that works, or a new one.
    pub(super) async fn connection(&self) -> Result<Connection, StoreError> {
        let mut current = self.current.lock().await;
        if let Some(client) = &current.client {
            return Ok(Connection { client: client.clone(), number: current.number });
        }
        let mut refusals = Refusals::default();
        for offset in 0..self.servers.len() {
            let index = (current.next + offset) % self.servers.len();
            let Some(server) = self.servers.get(index) else { continue };
            match self.connect_to(server).await {
                Ok(client) => {
                    debug!("connected to etcd at {server}");
                    *current =
                        Current { client: Some(client.clone()), number: current.number + 1, next: index };
                    return Ok(Connection { client, number: current.number });
                }
                Err(error) => refusals.add(index, server, error)?,
            }
        }
        Err(refusals.into_error(self.endpoints()))
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
                if is_without_right(&error) {
                    return Err(failure);
                }
                failure
            }
            Err(late) => late,
        };
        self.drop_connection(&connection).await;
        Err(failure)
    }

    async fn connect_to(&self, server: &Server) -> Result<Client, StoreError> {
        let operation = format!("connect to etcd at {server}");
        let options = ConnectOptions::new()
            // A member cut off from the others would serve stale records.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        let login = match self.options.user()? {
            Some((user, password)) => options.clone().with_user(user, password),
            None => options.clone(),
        };
        let connector = Connector::new(server.clone(), self.options.tls_files()?);
        let attempt = async {
            let channel = Channel::Tonic(connector.channel().await?);
            let mut connected = Client::from_channel(channel.clone(), Some(login)).await;
            if connected.as_ref().is_err_and(is_without_users) {
                if !self.warned_of_users.swap(true, Ordering::Relaxed) {
                    warn!("etcd at {server} runs without users: --etcd-username is ignored");
                }
                connected = Client::from_channel(channel, Some(options)).await;
            }
            let mut client = connected.map_err(|error| store_error(&operation, &error))?;
            // Missing rights show at the requests that need them.
            let probe = client.get(self.keys.full("config"), Some(GetOptions::new().with_count_only())).await;
            if probe.as_ref().is_err_and(is_no_etcd) {
                let why = "the server does not know etcd's requests: check host and port in --etcd-endpoints"
                    .to_owned();
                return Err(StoreError::Unusable { endpoints: server.to_string(), why, heals: false });
            }
            match probe.map_err(|error| store_error(&operation, &error)) {
                Err(away @ StoreError::Away { .. }) => Err(away),
                _ => Ok(client),
            }
        };
        match in_time(&operation, CONNECT + REQUEST, attempt).await.flatten() {
            Err(away @ StoreError::Away { .. }) => Err(connector.failure().unwrap_or(away)),
            outcome => outcome,
        }
    }
}

/// Why no endpoint can be used, as far as they were tried.
#[derive(Debug, Default)]
struct Refusals {
    /// By the position of the endpoint, so that the text is the same whatever endpoint was tried first.
    whys: BTreeMap<usize, (String, String)>,
    /// A file of ours, which all endpoints share.
    file: Option<StoreError>,
    /// At least one server does not answer.
    is_away: bool,
    /// At least one server may be usable later without an operator's help.
    heals: bool,
}

impl Refusals {
    /// Adds an endpoint's error. Returns one to which the other endpoints would only agree.
    fn add(&mut self, index: usize, server: &Server, error: StoreError) -> Result<(), StoreError> {
        if matches!(error, StoreError::Option { .. }) {
            self.file = Some(error);
            return Ok(());
        }
        self.is_away |= matches!(error, StoreError::Away { .. });
        self.heals |= matches!(error, StoreError::Unusable { heals: true, .. });
        let (StoreError::Away { why, .. }
        | StoreError::Unusable { why, .. }
        | StoreError::Failed { why, .. }) = error
        else {
            return Err(error);
        };
        self.whys.insert(index, (server.to_string(), why));
        Ok(())
    }

    /// One error for all endpoints. A server that is away may come back, whatever is wrong with the others.
    fn into_error(self, endpoints: String) -> StoreError {
        let Self { whys, file, is_away, heals } = self;
        let whys: Vec<_> = whys.into_values().collect();
        let mut texts: Vec<String> = match whys.as_slice() {
            // The endpoint stands before it already.
            [(_, why)] if file.is_none() => vec![why.clone()],
            several => several.iter().map(|(server, why)| format!("{server}: {why}")).collect(),
        };
        match file {
            Some(file) if texts.is_empty() => return file,
            Some(file) => texts.push(file.to_string()),
            None => {}
        }
        let why = texts.join("; ");
        if is_away {
            StoreError::Unreachable { endpoints, why }
        } else {
            StoreError::Unusable { endpoints, why, heals }
        }
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
