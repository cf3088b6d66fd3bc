//! TLS of the connections to etcd. It accepts what Go's TLS accepts in etcdctl, as far as that is safe: P-521 keys, client
//! certificates of X.509 version 1, and a server certificate that is itself named by `--etcd-cafile`.

mod certificate;
mod identity;
mod pem;
mod refusal;
mod verifier;

use std::{fmt, path::PathBuf, sync::Arc};

use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        AlertDescription, ClientConfig, RootCertStore,
        crypto::{CryptoProvider, aws_lc_rs},
        pki_types::CertificateDer,
        sign::SingleCertAndKey,
    },
};

use super::server::Server;
use crate::store::StoreError;
use identity::Identity;
pub(super) use refusal::Refusal;
use verifier::Verifier;

pub(super) const CA_FILE: &str = "--etcd-cafile";
pub(super) const CERT_FILE: &str = "--etcd-certfile";
pub(super) const KEY_FILE: &str = "--etcd-keyfile";

/// The files of the TLS options.
#[derive(Clone, Debug)]
pub(super) struct TlsFiles {
    /// The CAs of the servers' certificates; `None` takes the system's CAs.
    pub(super) authorities: Option<PathBuf>,
    /// Our certificate and its key.
    pub(super) identity: Option<(PathBuf, PathBuf)>,
}

/// The contents of the files at one time, ready for one connection: certificates are renewed in place.
pub(super) struct Tls {
    config: Arc<ClientConfig>,
    verifier: Arc<Verifier>,
    identity: Option<Arc<Identity>>,
}

/// The certificates that a server is measured by.
#[derive(Clone, Debug)]
enum Trust {
    System,
    File(PathBuf),
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System => write!(f, "the system's CA certificates"),
            Self::File(file) => write!(f, "{CA_FILE} {}", file.display()),
        }
    }
}

impl Tls {
    /// Reads the files.
    /// Fails with the option and the file that cannot be used.
    pub(super) fn load(files: &TlsFiles) -> Result<Self, StoreError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = Arc::new(verifier(files, &provider)?);
        let identity = match &files.identity {
            Some((certificate, key)) => Some(Identity::load(certificate, key, &provider)?),
            None => None,
        };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| StoreError::failed("set up TLS", error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<_>);
        let (mut config, identity) = match identity {
            // Not `with_client_auth_cert`, which parses the certificate and knows version 3 only.
            Some((identity, key)) => {
                let config = builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
                (config, Some(Arc::new(identity)))
            }
            None => (builder.with_no_client_auth(), None),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self { config: Arc::new(config), verifier, identity })
    }

    /// The TLS handshake with a server.
    pub(super) async fn connect(
        &self,
        server: &Server,
        stream: TcpStream,
    ) -> Result<TlsStream<TcpStream>, Refusal> {
        let connecting = TlsConnector::from(Arc::clone(&self.config)).connect(server.name().clone(), stream);
        connecting.await.map_err(|error| match self.verifier.refusal() {
            Some(refusal) => refusal.clone(),
            None => Refusal::of_handshake(&error, self.identity.as_deref()),
        })
    }

    /// Turns alerts that arrive after the handshake into the server's reasons: in TLS 1.3, it judges our certificate only then.
    pub(super) fn alerts(&self) -> impl Fn(AlertDescription) -> Refusal + Send + Sync + use<> {
        let identity = self.identity.clone();
        move |alert| Refusal::of_alert(alert, identity.as_deref())
    }
}

fn verifier(files: &TlsFiles, provider: &Arc<CryptoProvider>) -> Result<Verifier, StoreError> {
    let (certificates, trust) = match &files.authorities {
        Some(file) => (pem::certificates(CA_FILE, file)?, Trust::File(file.clone())),
        None => (rustls_native_certs::load_native_certs().certs, Trust::System),
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates.iter().map(CertificateDer::clone));
    if roots.is_empty() {
        let why = match &trust {
            Trust::System => {
                "the system has no CA certificates: name the file of etcd's CA, or install ca-certificates"
                    .to_owned()
            }
            Trust::File(file) => {
                format!("cannot read the certificates in {}: they are damaged", file.display())
            }
        };
        return refuse(CA_FILE, why);
    }
    // Only a certificate that the operator named for etcd is trusted as a server's own.
    let named = if files.authorities.is_some() { certificates } else { Vec::new() };
    Verifier::new(roots, named, trust, provider).map_err(|error| StoreError::failed("set up TLS", error))
}

fn refuse<T>(option: &'static str, why: impl Into<String>) -> Result<T, StoreError> {
    Err(StoreError::Option { option, why: why.into() })
}
