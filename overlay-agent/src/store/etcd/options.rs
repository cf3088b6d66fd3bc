//! Options of the etcd store, checked before the first request.

use std::{path::PathBuf, time::Duration};

use secrecy::{ExposeSecret as _, SecretString};

use super::{server::Server, tls::TlsFiles};
use crate::store::StoreError;

/// Time to live of a host's lease without a renewal: flannel's 24 hours.
pub const LEASE_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// flannel's `-subnet-lease-renew-margin`: an hour.
pub const RENEW_MARGIN: Duration = Duration::from_secs(60 * 60);
/// Time to live of an agent's claim on its public address: how long a host that died blocks the address. It is renewed
/// three times as often, so it is also a load on etcd: 10,000 hosts make 1,000 renewals per second, which never reach its
/// disk.
pub const OWNER_TTL: Duration = Duration::from_secs(30);

pub(super) const ENDPOINTS: &str = "--etcd-endpoints";

/// Endpoints, prefix and credentials of etcd, and the times to live of what this host writes there.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// URLs, or `host:port`, which is https when a TLS file is named. One that works is kept until it fails.
    pub endpoints: Vec<String>,
    /// Prefix of all keys of the network.
    pub prefix: String,
    /// CA that signed the servers' certificates, or these certificates themselves; `None` takes the system's CAs.
    pub ca_file: Option<PathBuf>,
    /// Our certificate, with `key_file`.
    pub cert_file: Option<PathBuf>,
    /// Its private key.
    pub key_file: Option<PathBuf>,
    /// User, with `password`.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<SecretString>,
    /// Time to live of the lease on a subnet.
    pub lease_ttl: Duration,
    /// The lease is renewed at the latest this long before it ends, and never later than half-way.
    pub renew_margin: Duration,
    /// Time to live of the claim on the public address.
    pub owner_ttl: Duration,
    /// Identity of this host among hosts with the same address; `None` takes the machine's boot id and the network namespace,
    /// which a restarted agent shares and no other host does.
    pub instance: Option<String>,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:4001".to_owned(), "http://127.0.0.1:2379".to_owned()],
            prefix: "/coreos.com/network".to_owned(),
            ca_file: None,
            cert_file: None,
            key_file: None,
            username: None,
            password: None,
            lease_ttl: LEASE_TTL,
            renew_margin: RENEW_MARGIN,
            owner_ttl: OWNER_TTL,
            instance: None,
        }
    }
}

impl EtcdOptions {
    /// The servers behind the endpoints.
    pub(super) fn servers(&self) -> Result<Vec<Server>, StoreError> {
        let any_tls_file = self.ca_file.is_some() || self.cert_file.is_some();
        let servers: Vec<_> = self
            .endpoints
            .iter()
            .map(|endpoint| endpoint.trim())
            .filter(|endpoint| !endpoint.is_empty())
            .map(|endpoint| Server::parse(endpoint, any_tls_file))
            .collect::<Result<_, _>>()?;
        if servers.is_empty() {
            return refuse(ENDPOINTS, "it is empty: name at least one, such as http://10.0.0.1:2379");
        }
        if any_tls_file && !servers.iter().any(Server::is_tls) {
            let why = "TLS files are named, but every endpoint is http://: write https://, or drop the files";
            return refuse(ENDPOINTS, why);
        }
        Ok(servers)
    }

    /// The user and password, both or none.
    pub(super) fn user(&self) -> Result<Option<(String, String)>, StoreError> {
        let username = self.username.clone().filter(|username| !username.is_empty());
        match (username, &self.password) {
            (Some(username), Some(password)) => Ok(Some((username, password.expose_secret().to_owned()))),
            (Some(_), None) => refuse("--etcd-username", "there is no password for it: give --etcd-password"),
            (None, Some(password)) if !password.expose_secret().is_empty() => {
                refuse("--etcd-password", "there is no user for it: give --etcd-username")
            }
            (None, _) => Ok(None),
        }
    }

    /// The files of the TLS settings: a certificate and its key, both or none.
    pub(super) fn tls_files(&self) -> Result<TlsFiles, StoreError> {
        let identity = match (&self.cert_file, &self.key_file) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (Some(_), None) => {
                return refuse("--etcd-certfile", "its private key is missing: give --etcd-keyfile");
            }
            (None, Some(_)) => {
                return refuse("--etcd-keyfile", "its certificate is missing: give --etcd-certfile");
            }
            (None, None) => None,
        };
        Ok(TlsFiles { authorities: self.ca_file.clone(), identity })
    }

    /// Whether the times to live fit together.
    pub(super) fn check_times(&self) -> Result<(), StoreError> {
        if self.lease_ttl < Duration::from_secs(2) || self.owner_ttl < Duration::from_secs(2) {
            let why = "it is less than 2 s, too short to be renewed in time";
            return refuse("the lease's time to live", why);
        }
        if self.renew_margin >= self.lease_ttl {
            let why = format!(
                "it is {} min, and a lease lasts {} min: choose a shorter one",
                self.renew_margin.as_secs() / 60,
                self.lease_ttl.as_secs() / 60
            );
            return refuse("--subnet-lease-renew-margin", why);
        }
        Ok(())
    }
}

fn refuse<T>(option: &'static str, why: impl Into<String>) -> Result<T, StoreError> {
    Err(StoreError::Option { option, why: why.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(endpoints: &[&str]) -> EtcdOptions {
        EtcdOptions {
            endpoints: endpoints.iter().map(|&endpoint| endpoint.to_owned()).collect(),
            ..EtcdOptions::default()
        }
    }

    fn refused<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_password_is_never_shown() {
        let options = EtcdOptions {
            username: Some("flannel".to_owned()),
            password: Some("hunter2".to_owned().into()),
            ..options(&["http://u:hunter2@10.0.0.1:2379"])
        };
        let shown = format!("{:?} {}", options.password, refused(options.servers()));
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(shown.contains("--etcd-username"), "{shown}");
    }

    #[test]
    fn endpoints_without_a_scheme_are_https_when_there_are_tls_files() {
        let urls = |options: &EtcdOptions| -> Vec<_> {
            options.servers().unwrap().iter().map(Server::to_string).collect()
        };
        let mut options = options(&["10.0.0.1:2379", " http://10.0.0.2:2379/ ", ""]);
        assert_eq!(urls(&options), ["http://10.0.0.1:2379", "http://10.0.0.2:2379"]);
        options.ca_file = Some("/ca.pem".into());
        assert_eq!(urls(&options), ["https://10.0.0.1:2379", "http://10.0.0.2:2379"]);
    }

    #[test]
    fn what_does_not_fit_together_is_refused_by_name() {
        let default = EtcdOptions::default;
        let tls_files = EtcdOptions { ca_file: Some("/ca.pem".into()), ..options(&["http://10.0.0.1:2379"]) };
        let no_key = EtcdOptions { cert_file: Some("/dev/null".into()), ..default() };
        let no_certificate = EtcdOptions { key_file: Some("/dev/null".into()), ..default() };
        let no_password = EtcdOptions { username: Some("flannel".to_owned()), ..default() };
        let late = EtcdOptions { renew_margin: LEASE_TTL, ..default() };
        for (refusal, part) in [
            (refused(options(&[""]).servers()), "--etcd-endpoints"),
            (refused(options(&["unix:///run/etcd"]).servers()), "neither"),
            (refused(tls_files.servers()), "https://"),
            (refused(no_key.tls_files()), "--etcd-keyfile"),
            (refused(no_certificate.tls_files()), "--etcd-certfile"),
            (refused(no_password.user()), "--etcd-password"),
            (refused(late.check_times()), "--subnet-lease-renew-margin"),
        ] {
            assert!(refusal.contains(part), "{refusal}");
        }
    }
}
